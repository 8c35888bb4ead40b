"""The table of teachers, which the start of a run and ``megatron-dypo check`` show."""

from __future__ import annotations

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.row_check.verdicts import TraceVerdicts
from megatron_dypo.data.statistics import TeacherStatistics, teacher_statistics
from megatron_dypo.data.values import printable
from megatron_dypo.metrics.intervals import wilson_interval

_HEADER = (
    "teacher",
    "traces",
    "coverage",
    "median",
    "p99",
    "too long",
    "right by the verifier (95% interval)",
    "judged",
)


def teacher_table(dataset: PromptDataset, data: DataConfig, verdicts: TraceVerdicts | None = None) -> list[str]:
    """Return a header and a line for each teacher: traces, coverage, lengths in tokens, accuracy, number judged.

    The table is empty if no row has a trace. Without ``verdicts`` it has no accuracy.
    """
    return render_teachers(teacher_statistics(dataset, data, verdicts))


def render_teachers(teachers: list[TeacherStatistics]) -> list[str]:
    """Return the lines of :func:`teacher_table` for given statistics."""
    if not teachers:
        return []
    rows = [_HEADER, *(_cells(teacher) for teacher in teachers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def accuracy_text(teacher: TeacherStatistics) -> str:
    """Return, as text, the share of right traces of a teacher among those judged, with its 95% Wilson interval."""
    if teacher.accuracy is None:
        return "not judged"
    low, high = wilson_interval(teacher.accuracy, teacher.num_right + teacher.num_wrong)
    return f"{teacher.accuracy:.1%} ({low:.1%} to {high:.1%})"


def _cells(teacher: TeacherStatistics) -> tuple[str, ...]:
    lengths = teacher.lengths
    return (
        printable(teacher.teacher) + ("" if teacher.is_used else " (not in data.teachers)"),
        str(teacher.num_traces),
        f"{teacher.coverage:.1%}",
        str(lengths.median) if lengths else "-",
        str(lengths.p99) if lengths else "-",
        str(teacher.num_too_long),
        accuracy_text(teacher),
        str(teacher.num_right + teacher.num_wrong),
    )
