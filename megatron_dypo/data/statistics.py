"""Statistics of a data set for a table at a run's start: lengths, drops, and each teacher's coverage and accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.row_check.verdicts import TraceVerdicts


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Quantiles of token counts. Each is the length of some prompt or trace."""

    shortest: int
    median: int
    p90: int
    p99: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class PromptStatistics:
    """The prompts of a data set."""

    num_rows: int
    """Rows that are drawn."""
    num_skipped: int
    """Bad rows that are left out (``data.on_bad_row=skip``)."""
    num_too_long: int
    """Rows longer than ``data.max_prompt_tokens``, which are drawn and dropped."""
    num_without_trace: int
    """Rows without a usable trace of any teacher in use. If Hard, they are dropped."""
    num_failed_checks: int
    """Traces left out by ``data.fields.trace_checks``."""
    lengths: Lengths


@dataclass(frozen=True, kw_only=True)
class TeacherStatistics:
    """The traces of one teacher."""

    teacher: str
    is_used: bool
    """Whether ``data.teachers`` includes this teacher."""
    num_traces: int
    coverage: float
    """Share of the rows that have a trace of this teacher."""
    num_too_long: int
    """Traces longer than ``data.max_trace_tokens``: dropped."""
    num_right: int
    num_wrong: int
    num_no_verdict: int
    """Traces on which the verifier failed. Traces that are not used are not judged."""
    lengths: Lengths | None
    """Lengths of its traces as targets; None if all rows with one are bad."""

    @property
    def accuracy(self) -> float | None:
        """Share of right traces among those with a verdict; None without a verdict."""
        judged = self.num_right + self.num_wrong
        return self.num_right / judged if judged else None


def prompt_statistics(dataset: PromptDataset, data: DataConfig) -> PromptStatistics:
    """Describe the prompts of a data set that was opened with a tokenizer."""
    checked, rows = dataset.checked, dataset.numbers
    is_usable = _is_usable(dataset, data)
    with_trace = np.zeros(len(checked.prompt_tokens), np.bool_)
    with_trace[_row_of_trace(dataset)[is_usable]] = True
    return PromptStatistics(
        num_rows=len(rows),
        num_skipped=len(checked.problems),
        num_too_long=dataset.num_too_long,
        num_without_trace=int((~with_trace[rows]).sum()),
        num_failed_checks=checked.num_failed_checks,
        lengths=_lengths(checked.prompt_tokens[rows]),
    )


def teacher_statistics(
    dataset: PromptDataset, data: DataConfig, verdicts: TraceVerdicts | None = None
) -> list[TeacherStatistics]:
    """Describe each teacher of a data set that was opened with a tokenizer, in the order of their names."""
    checked = dataset.checked
    is_good_row = np.zeros(len(checked.prompt_tokens), np.bool_)
    is_good_row[dataset.numbers] = True
    is_good = is_good_row[_row_of_trace(dataset)]
    found = []
    for number, name in enumerate(checked.teachers):
        indices = np.flatnonzero(is_good & (checked.trace_teacher == number))
        lengths = checked.trace_tokens[indices]
        right, wrong, failed = (0, 0, 0) if verdicts is None else verdicts.counts(indices)
        found.append(
            TeacherStatistics(
                teacher=name,
                is_used=data.teachers is None or name in data.teachers,
                num_traces=len(indices),
                coverage=len(indices) / len(dataset),
                num_too_long=int((lengths > data.max_trace_tokens).sum()),
                num_right=right,
                num_wrong=wrong,
                num_no_verdict=failed,
                lengths=_lengths(lengths) if len(lengths) else None,
            )
        )
    return found


def _row_of_trace(dataset: PromptDataset) -> npt.NDArray[np.int64]:
    starts = dataset.checked.trace_start
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def _is_usable(dataset: PromptDataset, data: DataConfig) -> npt.NDArray[np.bool_]:
    checked = dataset.checked
    is_in_use = np.array([data.teachers is None or name in data.teachers for name in checked.teachers], np.bool_)
    return is_in_use[checked.trace_teacher] & (checked.trace_tokens <= data.max_trace_tokens)


def _lengths(counts: npt.NDArray[np.int32]) -> Lengths:
    quantiles = np.quantile(counts, [0, 0.5, 0.9, 0.99, 1], method="nearest")
    shortest, median, p90, p99, longest = (int(value) for value in quantiles)
    return Lengths(shortest=shortest, median=median, p90=p90, p99=p99, longest=longest)
