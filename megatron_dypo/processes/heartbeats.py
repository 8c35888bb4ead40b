"""Heartbeats of ranks: the activity of the main thread, in a small file of the run folder (see :mod:`.watchdog`)."""

from __future__ import annotations

import json
import linecache
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megatron_dypo.json_text import parse_json
from megatron_dypo.processes.identity import ProcessIdentity

FOLDER = "heartbeats"
_BYTES = 2048
_MAX_FRAMES = 8
_MAX_STACK = 1000
"""Characters of a stack, so that a heartbeat fits into its file."""


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The heartbeat of one rank."""

    attempt: str
    rank: int
    host: str
    process: ProcessIdentity
    beats: int
    part: str
    where: str
    """Innermost function of the main thread, with file and line."""
    is_in_collective: bool
    stack: str
    """Innermost functions of the main thread, the innermost first."""
    idle_s: float
    """Seconds since the main thread last moved."""
    part_s: float = 0.0
    """Seconds of the main thread in ``part``, within its step."""
    is_last: bool = False
    """Whether the rank has ended normally."""

    def name(self) -> str:
        """Return rank, host and process, for people."""
        return f"rank {self.rank} on {self.host} (process {self.process.pid})"

    def place(self) -> str:
        """Return the part of a step and the place in the code."""
        return f"{self.part} at {self.where}"


def blame(beats: Sequence[Heartbeat]) -> list[Heartbeat]:
    """Return the ranks for which the others wait: those outside of collectives, else the smallest group at one
    place."""
    outside = [beat for beat in beats if not beat.is_in_collective]
    if outside and len(outside) < len(beats):
        return outside
    by_place: dict[tuple[str, str], list[Heartbeat]] = defaultdict(list)
    for beat in beats:
        by_place[beat.part, beat.where].append(beat)
    return min(by_place.values(), key=len)


def stack_signature(frame: FrameType | None) -> list[tuple[int, int]]:
    """Return a value that stays the same as long as the thread is at the same instruction of the same calls."""
    signature = []
    while frame is not None:
        signature.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return signature


def where(frame: FrameType | None) -> str:
    """Return the innermost function with file and line, for people."""
    if frame is None:
        return "its end"
    code = frame.f_code
    return f"{code.co_name} ({'/'.join(Path(code.co_filename).parts[-3:])}:{frame.f_lineno})"


def stack_of(frame: FrameType | None) -> str:
    """Return the innermost functions with file and line, on one line."""
    found: list[str] = []
    while frame is not None and len(found) < _MAX_FRAMES:
        found.append(where(frame))
        frame = frame.f_back
    return " < ".join(found)[:_MAX_STACK]


def is_in_collective(frame: FrameType | None) -> bool:
    """Return whether the main thread waits for other ranks, in torch.distributed or in Megatron's communication."""
    if frame is None:
        return False
    name = frame.f_code.co_filename
    waits = ".wait(" in linecache.getline(name, frame.f_lineno)
    return "/torch/distributed/" in name or ("/megatron/core/" in name and waits)


def heartbeat_path(run_dir: Path, rank: int) -> Path:
    """Return the file of a rank's heartbeat."""
    return run_dir / FOLDER / f"rank_{rank:05d}.json"


def write_heartbeat(run_dir: Path, beat: Heartbeat) -> None:
    """Overwrite the file in place with the same number of bytes, which works on a full disk too."""
    text = json.dumps(asdict(beat)).ljust(_BYTES - 1) + "\n"
    path = heartbeat_path(run_dir, beat.rank)
    try:
        with path.open("r+" if path.exists() else "w") as file:
            file.write(text)
    except OSError as error:
        print(f"megatron-dypo: {path} cannot be written: {error}", file=sys.stderr)


def read_heartbeat(run_dir: Path, rank: int) -> Heartbeat | None:
    """Read a rank's heartbeat; None if it is not written yet or is being written."""
    try:
        found = parse_json(heartbeat_path(run_dir, rank).read_text())
        return Heartbeat(**{**found, "process": ProcessIdentity(**found["process"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
