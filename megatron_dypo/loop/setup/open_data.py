"""The data of a run on a replica's leader: prompt files and evaluation sets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_dypo.config.grading import BUILT_IN_VERIFIERS
from megatron_dypo.config.tree import Config
from megatron_dypo.data.prompts import PromptDataset, open_prompts
from megatron_dypo.data.row_check.verdicts import TraceVerdicts, wrong_traces
from megatron_dypo.data.teacher_table import teacher_table
from megatron_dypo.data.tokenizer.open import Tokenizer, check_vocabulary, load_tokenizer
from megatron_dypo.eval.prompts import EvalSet, open_sets
from megatron_dypo.grading.naming import row_verifier_problem, unused_sources, verifier_of
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.loop.setup.teachers import judge_by, verifier_key
from megatron_dypo.parallel.collectives import gather_objects

log = logging.getLogger("megatron_dypo")

_JUDGED_OF_TEACHER = 50
"""Number of traces of each teacher that are judged at the start of a run; the log shows the share of correct ones."""


def open_tokenizer(config: Config, vocab_size: int) -> Tokenizer:
    """Load the policy's tokenizer with the settings of the config.

    Raises:
        ValueError: a broken file, or ids that the model's embedding of ``vocab_size`` rows lacks.
    """
    folder = Path(config.model.hf_path)
    tokenizer = load_tokenizer(
        folder,
        chat_template=config.data.chat_template,
        chat_template_args=config.data.chat_template_args,
        stop_token_ids=config.rollout.stop_token_ids,
    )
    check_vocabulary(tokenizer, vocab_size, folder / "config.json")
    return tokenizer


def open_dataset(config: Config, leaders: dist.ProcessGroup, tokenizer: Tokenizer) -> PromptDataset:
    """Open and check the prompt files. The first leader does the work; the others read its result.

    Raises:
        ValueError: bad rows, or every prompt is too long.
    """
    with first_leader_first(leaders):
        return open_prompts(
            config.data.prompts,
            config.data,
            tokenizer,
            cache_dir=Path(config.run.dir),
            show_progress=leaders.rank() == 0,
        )


def open_held_out(
    config: Config, leaders: dist.ProcessGroup, tokenizer: Tokenizer, stack: contextlib.ExitStack
) -> dict[str, EvalSet]:
    """Open the evaluation sets: name → set. Their traces, if any, are not read."""
    with first_leader_first(leaders):
        return open_sets(
            config.eval, config.data, tokenizer, stack, seed=config.run.seed, cache_dir=Path(config.run.dir)
        )


def check_against_verifier(config: Config, dataset: PromptDataset, verifier: Verifier) -> None:
    """Check the data against the verifiers that will judge it, before anything is sampled.

    Raises:
        ValueError: a row names a verifier that it may not name; an answer is an object and its verifier reads only
            text; or a verifier asks for the row's other columns, which ``data.keep_row`` leaves out.
    """
    grading = config.grading
    problems = [found for name in sorted(dataset.verifiers) if (found := row_verifier_problem(grading, name))]
    if problems:
        raise ValueError("\n".join(problems))
    dataset.require_text_answers(
        lambda own, source: verifier_of(grading, own=own, source=source) not in BUILT_IN_VERIFIERS
    )
    used = dataset.verifiers.union(name for _, name in grading.named_verifiers())  # others are those of eval.sets
    takers = [] if config.data.keep_row else [n for n in verifier.takers_of(("row", "extra_info")) if n in used]
    if takers:
        raise ValueError(f"data.keep_row=false: {', '.join(takers)} asks for the row's other columns: set it to true")
    for line in unused_sources(grading, dataset.sources):
        log.warning("%s", line)
    style = (grading.answer_format, grading.thinking)
    if style != ("auto", "after") and not any(name in BUILT_IN_VERIFIERS for _, name in grading.named_verifiers()):
        log.warning(
            "grading.answer_format=%s and grading.thinking=%s are for built-in verifiers: none is in use", *style
        )


def judge_traces(
    config: Config, leaders: dist.ProcessGroup, dataset: PromptDataset, tokenizer: Tokenizer, verifier: Verifier
) -> TraceVerdicts | None:
    """Let the verifier judge the teachers' traces, and log the result for each teacher.

    With ``data.drop_wrong_traces`` every trace is judged, else a sample. The result is kept in the run folder.

    Returns:
        The verdicts that ``data.drop_wrong_traces`` needs, else None.

    Raises:
        ValueError: no trace would be left.
    """
    if not dataset.teachers:
        return None
    judges_all = config.data.drop_wrong_traces
    with first_leader_first(leaders):
        verdicts = wrong_traces(
            dataset,
            judge_by(verifier),
            tokenizer=tokenizer,
            data=config.data,
            verifier_key=verifier_key(config.grading),
            limit_per_teacher=None if judges_all else _JUDGED_OF_TEACHER,
            seed=config.run.seed,
            show_progress=leaders.rank() == 0,
        )
    if leaders.rank() == 0:
        for line in teacher_table(dataset, config.data, verdicts):
            log.info("%s", line)
    return verdicts if judges_all else None


@contextlib.contextmanager
def first_leader_first(leaders: dist.ProcessGroup) -> Iterator[None]:
    """Run the block on the first replica's leader, and then on the others."""
    if leaders.rank() != 0:
        gather_objects(None, leaders)
    yield
    if leaders.rank() == 0:
        gather_objects(None, leaders)
