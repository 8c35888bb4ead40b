"""The verifier's verdicts on the teachers' traces. They are judged once, at the start of a run, and stored with the row
check."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.array_files import read_arrays, write_arrays
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.tokenising import end_trace, make_prompt, render_prompt
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.metrics.progress import progress
from megatron_dypo.types import Prompt

log = logging.getLogger(__name__)

Verify = Callable[[Sequence[tuple[Prompt, str]]], Sequence[bool | None]]
"""(prompt, response) pairs → whether each is correct; None for no verdict."""

_NOT_JUDGED, _NO_VERDICT, _WRONG, _RIGHT = -2, -1, 0, 1
_BATCH = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceVerdicts:
    """One verdict for each of the M traces of a data set's check."""

    codes: npt.NDArray[np.int8]
    """[M] 1: right, 0: wrong, −1: the verifier failed, −2: not judged, because the trace is not used or not in the
    sample."""
    is_sample: bool = False
    """Whether some used traces were not judged. Such verdicts must not be used to drop traces."""

    def is_wrong(self, index: int) -> bool:
        """Return whether the trace at an index of the check was judged wrong."""
        return bool(self.codes[index] == _WRONG)

    def counts(self, indices: npt.NDArray[np.int64]) -> tuple[int, int, int]:
        """Return how many of these traces are right, wrong and without a verdict."""
        codes = self.codes[indices]
        return int((codes == _RIGHT).sum()), int((codes == _WRONG).sum()), int((codes == _NO_VERDICT).sum())


def wrong_traces(
    dataset: PromptDataset,
    verify: Verify,
    *,
    tokenizer: Tokenizer,
    data: DataConfig,
    verifier_key: str,
    show_progress: bool = False,
    limit_per_teacher: int | None = None,
    seed: int = 0,
) -> TraceVerdicts:
    """Let ``verify`` judge every trace that the run may learn from, as the response to its prompt.

    Traces of other teachers and traces over a length limit are not judged. If the data set has a stored row check, the
    result is stored with it under ``verifier_key``, which contains everything the verdicts depend on besides the data;
    '' stores nothing. Raises ValueError if ``data.drop_wrong_traces`` would leave no trace.

    With ``limit_per_teacher`` only that many traces of each teacher are judged, drawn by ``seed``. This is enough for a
    table, but not for dropping traces (``TraceVerdicts.is_sample``).
    """
    used = used_traces(dataset, data)
    num_used = int(used.sum())
    if limit_per_teacher is not None:
        used = _sampled(used, dataset.checked.trace_teacher, limit_per_teacher, seed)
    is_sample = bool(used.sum() < num_used)
    key = hashlib.sha256(verifier_key.encode() + b"\0" + used.tobytes()).hexdigest()[:16]
    file = None if dataset.check_file is None else dataset.check_file.with_suffix(f".{key}.npz")
    arrays = None if file is None else read_arrays(file, ("codes",))
    if arrays is not None and arrays["codes"].shape == used.shape:
        verdicts = TraceVerdicts(codes=arrays["codes"], is_sample=is_sample)
    else:
        codes = _judge(dataset, verify, used, tokenizer, data, show_progress)
        verdicts = TraceVerdicts(codes=codes, is_sample=is_sample)
        if file is not None and verifier_key:
            write_arrays(file, {"codes": verdicts.codes})
    num_right, num_wrong, num_failed = verdicts.counts(np.flatnonzero(used))
    if num_failed:
        log.warning("the verifier gave no verdict on %d of %d teachers' traces: they are used", num_failed, used.sum())
    if data.drop_wrong_traces and not is_sample and num_wrong and not num_right + num_failed:
        raise ValueError(
            f"data.drop_wrong_traces=true: the verifier calls each of the {num_wrong} teachers' traces wrong, so none "
            "would be left; look at the answers and at grading.verifier"
        )
    return verdicts


def used_traces(dataset: PromptDataset, data: DataConfig) -> npt.NDArray[np.bool_]:
    """Return [M] whether the run may learn from a trace: its row is good, its teacher in use, its length in limits."""
    checked = dataset.checked
    is_row_used = np.zeros(len(checked.prompt_tokens), np.bool_)
    is_row_used[dataset.numbers] = True
    is_row_used &= checked.prompt_tokens <= data.max_prompt_tokens
    row_of_trace = np.repeat(np.arange(len(is_row_used)), np.diff(checked.trace_start))
    in_use = [data.teachers is None or name in data.teachers for name in checked.teachers]
    is_teacher_used = np.array(in_use, np.bool_)[checked.trace_teacher]
    return is_row_used[row_of_trace] & is_teacher_used & (checked.trace_tokens <= data.max_trace_tokens)


def _sampled(
    used: npt.NDArray[np.bool_], teacher: npt.NDArray[np.int32], limit: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Return [M] a selection of at most ``limit`` used traces of each teacher.

    Raw Philox words give the same draw in every version of NumPy.
    """
    words = np.random.Philox(seed).random_raw(len(used))
    kept = np.zeros(len(used), np.bool_)
    for number in np.unique(teacher[used]):
        indices = np.flatnonzero(used & (teacher == number))
        kept[indices[np.argsort(words[indices], kind="stable")[:limit]]] = True
    return kept


def _judge(
    dataset: PromptDataset,
    verify: Verify,
    used: npt.NDArray[np.bool_],
    tokenizer: Tokenizer,
    data: DataConfig,
    show_progress: bool,
) -> npt.NDArray[np.int8]:
    codes = np.full(len(used), _NOT_JUDGED, np.int8)
    indices: list[int] = []
    pairs: list[tuple[Prompt, str]] = []

    def flush() -> None:
        said = verify(pairs)
        assert len(said) == len(pairs), f"the verifier judged {len(said)} of {len(pairs)} traces"
        codes[indices] = [_NO_VERDICT if is_right is None else int(is_right) for is_right in said]
        bar.update(len(pairs))
        indices.clear()
        pairs.clear()

    with progress(int(used.sum()), "judging teachers' traces", "traces", enabled=show_progress) as bar:
        for number in range(len(dataset)):
            wanted = {name: index for name, index in dataset.trace_indices(number).items() if used[index]}
            if not wanted:
                continue
            row = dataset[number]
            tokens = render_prompt(row.prompt, tokenizer, data)
            prompt = make_prompt(row, tokens, tokenizer, visit=0, order=number, traces={})
            for name, index in wanted.items():
                indices.append(index)
                # A server's response has no special tokens either.
                pairs.append((prompt, tokenizer.decode(end_trace(row.traces[name], tokenizer, tokens).tolist())))
            if len(pairs) >= _BATCH:
                flush()
        if pairs:
            flush()
    return codes
