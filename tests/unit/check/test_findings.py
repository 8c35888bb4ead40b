"""Problems and notes: which errors become which, and what happens to the package's own warnings."""

from __future__ import annotations

import logging

import pytest

from megatron_dypo.checks import require
from megatron_dypo.metrics.findings import Findings

LOG = logging.getLogger("megatron_dypo.somewhere")


def test_an_error_of_input_is_a_problem_and_another_one_is_raised() -> None:
    found = Findings()
    with found.noting("data.prompts"):
        require(False, "x=1", "must be 2")
    assert found.problems == ["data.prompts: x=1: must be 2"]
    with pytest.raises(ValueError, match="invalid literal"), found.noting():
        int("x")
    with pytest.raises(KeyError), found.noting():
        raise KeyError("a bug")
    assert len(found.problems) == 1


def test_warnings_become_notes_once_however_blocks_are_nested(caplog: pytest.LogCaptureFixture) -> None:
    found = Findings()
    with found.noting("outer"):
        LOG.warning("first")
        with found.noting("inner"):
            LOG.warning("second %d", 2)
            LOG.info("not a warning")
        LOG.warning("third")
    assert found.notes == ["outer: first", "inner: second 2", "outer: third"]
    assert caplog.text == ""
    LOG.warning("after")
    assert "after" in caplog.text, "the log is as it was"


@pytest.mark.parametrize(
    ("dry_run", "strict", "refused"),
    [(True, False, "p"), (True, True, "pmn"), (False, False, "pm"), (False, True, "pmn")],
)
def test_missing_files_end_a_start_and_notes_end_what_is_strict(dry_run: bool, strict: bool, refused: str) -> None:
    found = Findings(problems=["p"], missing=["m"], notes=["n"])
    assert "".join(found.refused(dry_run=dry_run, strict=strict)) == refused
