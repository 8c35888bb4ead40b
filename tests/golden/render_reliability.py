"""Write docs/reliability.md again: ``python -m tests.golden.render_reliability``."""

from pathlib import Path

from megatron_dypo.ending import cause_of_status
from tests.support.faults.matrix import LAYOUTS, PHASES, ROWS, Row

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"

_HEAD = f"""\
# What happens when something breaks

A run may be left alone for days. This page says what each fault does to it, and which test does that fault to a real run.

## The fault matrix

`tests/dist/test_fault_matrix.py` trains with two real ranks and two stand-ins for SGLang servers, in two layouts
({", ".join(LAYOUTS)}). It does every fault below in every phase that is marked. Each fault leaves a *witness*, one line in a file:
the test requires exactly one for each fault, and none in the run without faults. At the end, books, losses and accuracies of every step
and the exported model must be those of the run without faults, bit for bit.

- **ends**: the start ends on every rank, within the deadline, with the exit status of the cause; the next start goes on from the last
  checkpoint and the [journal](resuming.md).
- **goes on**: no rank ends.

"""

_TAIL = """
This table is `tests/support/faults/matrix.py`, rendered. Faults that need a real server or a real Slurm have their own tests:

| fault | outcome | test |
|---|---|---|
| a real SGLang is killed in rollouts and at each call of a refit | fenced, started again, takes part in the next refit | `tests/e2e/test_killed_servers.py` |
| a real SGLang is stopped in a refit | fenced after half of `refit.deadline_s`; the others get the weights | `tests/e2e/test_refit_of_servers.py` |
| the router of a job is killed | it is started again, and the requests are repeated | `tests/e2e/test_slurm.py` |
| a server behind the router is killed | no group is lost | `tests/e2e/test_sglang_router.py` |
| a bit of a checkpoint flips; a file is truncated, emptied, deleted or doubled | the file is named and the older checkpoint taken | `tests/dist/test_damaged_checkpoints.py` |
| weights, gradients, rewards or log-probs are not finite | named with parameter, prompt, member and token; dumped; skipped, stopped or rolled back as `optimizer.on_bad_step` says | `tests/dist/test_bad_updates.py` |
| a rank is stopped | named within three steps and a minute, with host, activity and stack | `tests/e2e/test_stalled_runs.py` |
| a rank, a launcher or a node of a Slurm job is lost | the trainer starts again in place, on a spare node if there is one | `tests/e2e/test_slurm.py` |
| SIGKILL at 44 random moments of four runs | the same steps, bit for bit; finished groups are made once | `tests/dist/test_runs_killed_at_random.py` |

## How much of the time is training

`goodput` in every run's report is the share of the wall time that its steps took which were not made again. The rest is listed by
cause: starting, saving, evaluating, steps that were made again, and the time between two starts.

## A soak

`tools/soak.py CONFIG --hours 2 --faults 100` trains a config once undisturbed and once under faults: it kills ranks, launchers, servers
and verifiers, stops ranks and servers for a while, asks the run to stop, and flips bits of checkpoints, at random times of a seeded
schedule. After that it checks for every step that the books balance, that no step is missing and that the servers' log-probs are the
trainer's; that no process outlived its run and none grew by more than 2%; and that the accuracy is that of the undisturbed run within
the intervals.

"""

SOAK = """Result of 2026-11-27 (commit d7cdcbf3, 2 cores with other work beside it, Megatron-Core 0.16.1, SGLang 0.5.23), without Slurm:

    python tools/soak.py examples/quickstart/dypo.yaml run.steps=20000 optimizer.lr=4.0e-5 eval.every=50 checkpoint.every=10 \\
      --hours 2 --faults 160 --together

| fault | times | training again after, median and longest, s |
|---|---|---|
| the command is asked to stop (SIGTERM) | 21 | 1, 188 |
| a bit of a checkpoint flips | 10 | 62, 189 |
| a rank is killed | 18 | 68, 197 |
| a server is killed | 20 | 35, 146 |
| a verifier is killed | 17 | 4, 62 |
| the launcher is killed | 18 | 49, 113 |
| a rank is stopped for 3 to 20 s | 14 | 22, 62 |
| a server is stopped for 3 to 20 s | 21 | 18, 105 |

139 faults in 7,201 s ended 61 starts: 22 as `stopped`, 19 by SIGKILL, 17 as `rank_lost`, 3 as `servers_gone`. Every law held: no process
was left behind; the largest growth was 0.3% of memory (a rank), with no more descriptors or threads. At step 800 98.0% [96.1, 99.0] of
400 held-out additions were right, without faults 97.0% [94.8, 98.3]. Goodput was 45%, with a fault every 52 s: 16% of the time went into
starts, 15% into steps that were made again, 18% into the pauses between starts.
"""


def _causes(statuses: tuple[int, ...]) -> str:
    names = []
    for status in statuses:
        cause = cause_of_status(status)
        names.append("SIGKILL" if status == -9 else f"{status}" + (f" `{cause.label}`" if cause else ""))
    return " or ".join(names)


def _row(name: str, row: Row) -> str:
    outcome = (
        row.outcome if row.outcome == "goes on" else f"ends; {_causes(row.victim)}, the others {_causes(row.others)}"
    )
    marks = " | ".join("x" if phase in row.phases else "" for phase in PHASES)
    return f"| {name} | {marks} | {outcome} | {row.deadline_s:g} s | {row.told_by} |"


def render() -> str:
    columns = " | ".join(PHASES)
    lines = [
        f"| fault | {columns} | outcome | deadline | where it is seen |",
        "|---" * (len(PHASES) + 4) + "|",
        *(_row(name, row) for name, row in ROWS.items()),
    ]
    return _HEAD + "\n".join(lines) + "\n" + _TAIL + SOAK


if __name__ == "__main__":
    DOCUMENT.write_text(render())
