"""Progress: a bar on a terminal, few lines in a log."""

from __future__ import annotations

import io

import pytest

from megatron_dypo.metrics.progress import progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_no_line_for_a_short_task_that_went_well() -> None:
    log = io.StringIO()
    with progress(5, "rollouts", "prompts", stream=log) as bar:
        for _ in range(5):
            bar.update(1)
    assert log.getvalue() == ""


def test_a_log_gets_a_line_for_each_period_that_passed() -> None:
    log = io.StringIO()
    with progress(3, "grading", "answers", stream=log, every_s=0.0) as bar:
        bar.update(1)
        bar.update(2)
    heads = [line.split(",")[0] for line in log.getvalue().splitlines()]
    assert heads == ["grading: 1/3 answers", "grading: 3/3 answers", "grading: 3/3 answers"]


def test_a_terminal_gets_a_bar_that_is_rewritten_in_place() -> None:
    terminal = _Terminal()
    with progress(4, "rollouts", "prompts", stream=terminal) as bar:
        bar.update(4)
    assert "\r" in terminal.getvalue()
    assert "rollouts" in terminal.getvalue()


def _fail_after_one(log: io.StringIO) -> None:
    with progress(4, "rollouts", "prompts", stream=log) as bar:
        bar.update(1)
        raise ValueError("stop")


def test_a_log_shows_how_far_a_failed_task_came() -> None:
    log = io.StringIO()
    with pytest.raises(ValueError, match="stop"):
        _fail_after_one(log)
    assert log.getvalue().startswith("rollouts: 1/4 prompts")


def test_disabled_progress_is_silent() -> None:
    log = io.StringIO()
    with progress(4, "rollouts", "prompts", enabled=False, stream=log) as bar:
        bar.update(4)
    assert log.getvalue() == ""
