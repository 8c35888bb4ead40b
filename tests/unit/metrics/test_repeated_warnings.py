"""Log lines that repeat."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.metrics import repeats
from megatron_dypo.metrics.repeats import MAX_KINDS, WINDOW_S, RepeatedWarnings

log = logging.getLogger("test_repeated_warnings")


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines():
    handler = Lines()
    log.addHandler(handler)
    yield handler.lines
    log.removeHandler(handler)


def test_the_first_is_written_and_those_of_the_window_are_counted(lines):
    warnings = RepeatedWarnings(clock := Clock())
    for index in range(312):
        warnings.warn(log, "request %d failed", index)
    assert lines == ["request 0 failed"]
    clock.now += WINDOW_S
    warnings.warn(log, "request %d failed", 312)
    assert lines[1:] == ["request 312 failed (and 311 more like it)"]
    warnings.flush()
    assert len(lines) == 2


def test_the_end_writes_what_was_counted_once(lines):
    warnings = RepeatedWarnings(Clock())
    for index in range(313):
        warnings.warn(log, "request %d failed", index)
    warnings.flush()
    warnings.flush()
    assert lines == ["request 0 failed", "request 312 failed (and 311 more like it)"]


def test_another_warning_writes_the_count_of_a_kind_that_went_silent(lines):
    warnings = RepeatedWarnings(clock := Clock())
    warnings.warn(log, "a %d", 0)
    warnings.warn(log, "a %d", 1)
    clock.now += WINDOW_S
    warnings.warn(log, "b")
    assert lines == ["a 0", "a 1", "b"]


def test_a_text_with_percent_signs_and_no_arguments_is_written_as_it_is(lines):
    RepeatedWarnings(Clock()).warn(log, "100% of %s")
    assert lines == ["100% of %s"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 2 * WINDOW_S)), max_size=60))
def test_every_warning_is_written_or_counted_exactly_once(calls):
    handler = Lines()
    log.addHandler(handler)
    warnings = RepeatedWarnings(clock := Clock())
    for kind, pause in calls:
        clock.now += pause
        warnings.warn(log, f"kind {kind}")
    warnings.flush()
    log.removeHandler(handler)
    for kind in range(6):
        mine = [line.removeprefix(f"kind {kind}") for line in handler.lines if line.startswith(f"kind {kind}")]
        assert sum(1 + int(rest[6:].split()[0]) if rest else 1 for rest in mine) == sum(k == kind for k, _ in calls)


def test_memory_is_bounded_and_nothing_is_lost_by_it(lines):
    warnings = RepeatedWarnings(Clock())
    for kind in range(3 * MAX_KINDS):
        warnings.warn(log, f"kind {kind}")
        warnings.warn(log, f"kind {kind}")
    assert len(warnings) == MAX_KINDS
    warnings.flush()
    assert len(lines) == 6 * MAX_KINDS


def test_the_module_counts_over_all_callers(lines):
    repeats.warn_often(log, "%s", 1)
    repeats.warn_often(log, "%s", 2)
    repeats.flush_repeated()
    assert lines == ["1", "2"]
