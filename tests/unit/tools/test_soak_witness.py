"""The witnesses of a soak's damage: lines of a run's log that name the checkpoint, or show which one it took."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from tools.soak_parts.faults import DAMAGE
from tools.soak_parts.witness import find_flips

NOON = datetime(2026, 11, 27, 12, 0, 0, tzinfo=UTC).timestamp()
WORDS = "bit 5 of byte 388 of step_000020/mcore/hf/tokenizer.json; then SIGKILL to a rank, process 8922"


def taken(second: int, step: int) -> str:
    line = f"2026-11-27 12:00:{second:02d}+0000 I megatron_dypo: resuming from /a b/"
    return f"{line}step_{step:06d}: {step} of 90 steps are done"


def named(second: int, step: int) -> str:
    line = f"2026-11-27 12:00:{second:02d}+0000 E megatron_dypo.mcore.checkpoints.choose: DAMAGED CHECKPOINT: /a b/"
    return f"{line}step_{step:06d}/mcore/x.distcp: bytes 0 to 9 are not those that were written: set aside as y, taking"


def outcome(run_dir: Path, *lines: str, moments: tuple[float, ...] = (10.7,)) -> list[str]:
    """Return what became of bits of step 20 that were flipped at these seconds."""
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "rank_00000.log").write_text("".join(f"{line}\n" for line in lines))
    events = [("kill a rank", "SIGKILL to a rank, process 1", NOON), *((DAMAGE, WORDS, NOON + at) for at in moments)]
    found = find_flips(events, run_dir)
    return [kind for kind, flips in vars(found).items() for _ in flips]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((named(15, 20), taken(16, 10)), "named"),
        ((named(10, 20), taken(10, 10)), "named"),
        ((taken(16, 20),), "silent"),
        ((taken(16, 10),), "silent"),
        ((named(5, 20), taken(6, 10), taken(16, 20)), "silent"),
        ((taken(16, 20), named(30, 20), taken(31, 10)), "silent"),
        ((named(15, 30), taken(16, 10)), "silent"),
        ((taken(16, 30),), "unread"),
        ((taken(5, 20),), "unread"),
        ((), "unread"),
    ],
)
def test_a_flip_is_named_or_silent_if_the_next_start_could_read_it(
    tmp_path: Path, lines: tuple[str, ...], expected: str
) -> None:
    assert outcome(tmp_path, *lines) == [expected]


def test_two_flips_of_one_step_need_a_line_each(tmp_path: Path) -> None:
    lines = (named(15, 20), taken(16, 10), taken(40, 20))
    assert outcome(tmp_path, *lines, moments=(10.7, 30.0)) == ["named", "silent"]


def test_a_silent_flip_is_told_with_the_checkpoint_that_was_taken(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_00003.log").write_text(taken(16, 20) + "\n")
    found = find_flips([(DAMAGE, WORDS, NOON)], tmp_path)
    assert found.silent == [f"{WORDS}: was never called damaged, and the next start took step_000020"]
