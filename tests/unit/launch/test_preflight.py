"""The check of a host's devices: on CPUs here, with faults of every kind that it names."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from megatron_dypo.launch.preflight import Finding, find_fault, judge

GOOD = Finding(digests=["a"] * 3, seconds=1.0, is_sum_exact=True)


def finding(**changes: object) -> Finding:
    return Finding(**{"digests": ["a"] * 3, "seconds": 1.0, "is_sum_exact": True, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (finding(digests=["a", "b", "a"]), "device 2 computes another product"),
        (finding(digests=["b"] * 3), "device 2 computes another product"),
        (finding(is_sum_exact=False), "the sum over all devices is wrong on device 2"),
        (finding(seconds=1.6), "device 2 takes 1.6 times as long"),
    ],
)
def test_the_device_that_differs_is_named(odd: Finding, words: str) -> None:
    assert judge({0: GOOD, 1: GOOD, 2: odd, 3: GOOD}).startswith(words)
    assert judge(dict.fromkeys(range(4), GOOD)) == ""


def test_two_devices_that_differ_are_named_together() -> None:
    assert judge({0: GOOD, 1: finding(digests=["b"]), 2: GOOD, 3: finding(digests=["c"])}).startswith("devices 1, 3")


def test_two_cpus_are_well() -> None:
    fault = find_fault(2, 300.0)
    assert not fault or "times as long for a product" in fault, "another program may have taken one of them"


def run_as(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each device's process run ``program`` in place of the check."""
    script = folder / "python"
    script.write_text(f"#!{sys.executable}\n{program}\n")
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))


CHATTY = """
import json, pathlib, sys, time
index, here = sys.argv[sys.argv.index("--device") + 1], pathlib.Path(sys.argv[sys.argv.index("--store") + 1]).parent
for stream in (sys.stdout, sys.stderr):
    for number in range(20_000):
        print(f"node1:12:34 [{index}] NCCL INFO Channel {number:05}: a line of its log", file=stream, flush=True)
(here / f"at_sum_{index}").touch()
while len(list(here.glob("at_sum_*"))) < 2:
    time.sleep(0.05)
print(json.dumps(dict(digests=["a"], seconds=1.0, is_sum_exact=True)), flush=True)
print("NCCL INFO comm destroyed")
"""
"""A device whose library logs a megabyte before the sum in which it waits for the other one."""


def test_devices_whose_libraries_log_a_lot_are_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as(CHATTY, tmp_path, monkeypatch)
    assert find_fault(2, 60.0) == ""


@pytest.mark.parametrize(
    ("program", "deadline_s", "words"),
    [
        (
            "import sys; print('no room', file=sys.stderr); print('out of luck', file=sys.stderr); sys.exit(3)",
            60.0,
            "device 0 failed: out of luck",
        ),
        ("import sys; sys.exit(3)", 60.0, "device 0 failed: status 3"),
        ("import time; time.sleep(600)", 1.0, "devices 0, 1 gave no answer in 1 s"),
    ],
)
def test_a_device_that_fails_or_hangs_is_named_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, deadline_s: float, words: str
) -> None:
    run_as(program, tmp_path, monkeypatch)
    began = time.monotonic()
    assert find_fault(2, deadline_s) == words
    assert time.monotonic() - began < 60.0
