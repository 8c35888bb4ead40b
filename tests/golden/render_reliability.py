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
the test requires exactly one for each fault, and none in the run without faults. The witness of a server's fault is the first request
that meets it. At the end, books, losses and accuracies of every step and the exported model must be those of the run without faults,
bit for bit. Only a killed verifier may cost groups: those that it had in its hands.

- **ends**: the start ends on every rank, within the deadline, with the exit status of the cause; the next start goes on from the last
  checkpoint and the [journal](resuming.md).
- **goes on**: no rank ends, and the run shows that it goes on (the record of a step, the next fault, its end) within the deadline and a
  usual step.

The test looks for each fault in every place of the last column, and requires that a run without faults has no such line. There,
`optimizer.on_bad_step` is `stop`.

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
| all servers answer 503 for a minute | the run waits and goes on; nothing is lost | `tests/dist/test_fault_matrix.py` |
| weights, gradients, rewards or log-probs are not finite | named with parameter, prompt, member and token; dumped; skipped, stopped or rolled back as `optimizer.on_bad_step` says | `tests/dist/test_bad_updates.py` |
| an update makes weights that are not finite of finite gradients | no server, checkpoint or reference gets them; the weight is named; stopped or rolled back as `optimizer.on_bad_step` says | `tests/dist/test_spoilt_weights.py` |
| a rank is stopped | named within three steps and a minute, with host, activity and stack | `tests/e2e/test_stalled_runs.py` |
| a whole run is suspended for longer than its deadlines | it goes on; requests that were open are made again | `tests/e2e/test_stalled_runs.py` |
| a rank is slow in each step | named by the log and `perf/slowest_rank` | `tests/dist/test_busy_ranks.py` |
| a rank, a launcher or a node of a Slurm job is lost | the trainer starts again in place, on a spare node if there is one | `tests/e2e/test_slurm.py` |
| SIGKILL at 55 random moments of five runs | the same steps, bit for bit; finished groups are made once | `tests/dist/test_runs_killed_at_random.py` |

## On a Slurm cluster

Tests run jobs on a real Slurm of one host. Its nodes share an address, or (`tests/e2e/test_slurm_nodes.py`) have addresses, host files,
`/dev/shm` and local disks of their own. Functions of the scripts are also tried without Slurm, in `tests/unit/slurm/`.

| what differs or breaks | outcome | test |
|---|---|---|
| a preemption with a grace time: Slurm sends SIGTERM to every process of each step | the trainer saves, and the job is requeued and goes on | `tests/e2e/test_slurm_nodes.py`, `tests/unit/slurm/test_slurm_sites.py` |
| a stop request before the roles have started | requeued; the second attempt in a row without a step fails | `tests/e2e/test_slurm_nodes.py`, `tests/unit/slurm/test_slurm_ends.py` |
| `LOG_ROOT` on a disk that the nodes do not share | the last line names the node of which nothing was heard, before anything starts | `tests/e2e/test_slurm_nodes.py` |
| an input that only one node sees; a rank that crashes; servers that cannot start | the last line names cause, role and the node where it began | `tests/e2e/test_slurm_nodes.py`, `tests/unit/slurm/test_slurm_ends.py` |
| attempts that end before they make a step (a short `--time`) | no third one | `tests/e2e/test_slurm_nodes.py`, `tests/unit/slurm/test_slurm_ends.py` |
| attempts that save nothing: the save is longer than `GRACE_S`, or a rank or a node is lost each time | the third in a row fails and names the checkpoint | `tests/unit/slurm/test_slurm_requeues.py` |
| a node does not know another one's name, or takes it for itself (127.0.1.1) | it is a bad node, named before anything starts | `tests/e2e/test_slurm_nodes.py`, `tests/unit/slurm/test_slurm_sites.py` |
| a firewall stops connections to a rollout node, or it is down | the trainer ends after a minute and names the server | `tests/unit/rollout/test_reach.py` |
| nodes know their own names by 127.0.1.1; names are IPv6 addresses | the run trains and refits | `tests/e2e/test_slurm_nodes.py`, `tests/unit/parallel/test_interfaces.py` |
| the port at which trainer nodes meet is taken | the trainer starts again in place, at another port | `tests/e2e/test_slurm_nodes.py` |
| a rank, a launcher or a node is lost | the trainer starts again in place, or the job is requeued without the node | `tests/e2e/test_slurm.py` |
| all servers of a node, or the router, die too often | the job is requeued if it got further in this attempt, without the node if that happened there before; else it fails | `tests/e2e/test_slurm.py`, `tests/unit/slurm/test_slurm_ends.py` |
| more GPUs than are used; few CPUs; a relative `LOG_ROOT`; a dry run without the packages | used, or said in one line | `tests/unit/slurm/test_slurm_sites.py` |
| memory by GPU or CPU instead of by node | the job runs | `tests/e2e/test_slurm_nodes.py`, `tests/unit/slurm/test_slurm_sites.py` |
| `attach.sh JOB` without the settings of the job; the end of a good job | the roles are listed; `srun` reports no killed task | `tests/e2e/test_slurm_nodes.py` |
| caches of kernels; limits of files and locked memory | on each node's own disk; raised, never lowered | `tests/e2e/test_slurm_nodes.py`, `tests/unit/slurm/test_slurm_sites.py` |

## How much of the time is training

`goodput` in every run's report is the share of the wall time that its steps took which were not made again. The rest is listed by
cause: starting, saving, evaluating, steps that were made again, and the time between two starts.

## A soak

`tools/soak.py CONFIG --hours 2 --faults 100` trains a config once undisturbed and once under faults: it kills ranks, launchers, servers
and verifiers, stops ranks and servers for a while, asks the run to stop, and flips bits of checkpoints, at random times of a seeded
schedule. After that it checks

* every step of both runs: no step is missing; the books balance, and the prompts that wait are those in the queues; the queues, the buffer
  and the prompts in flight are within the bounds of the config; the weights that sampled were no newer than the step and no older than
  the mode allows; each update that learned from rollouts measured their log-probs, and those of servers and trainer agree;
* the processes: none outlived its run, and the ranks, servers, their schedulers and detokenizers, and verifiers did not grow: memory by at
  most 2%, descriptors and threads by at most 8. Of a life of six minutes or more two halves are compared, without the first three
  minutes or the first third; for the memory of a rank it must be twenty, and the first ten do not count. The middle one of a role's
  processes counts. The tool says how many were measured, and the longest life; what neither run could measure counts as a broken law;
* the damage: the run named each checkpoint whose bit was flipped, unless it saved a newer one before its next start, or never started
  again;
* the accuracy, which must be that of the undisturbed run within the intervals.

With `--slurm OPTIONS` the run under faults is a Slurm job, which starts its trainer again itself, in place or after a
requeue; all of its nodes must be on this host, since the tool looks for their processes here.

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

On a Slurm of one host (28 November 2026, commit 93e82ed6, 2 cores with tests and a benchmark beside it), as a job of a trainer node with
two ranks and a rollout node:

    GPUS_PER_NODE=2 ROLLOUT_NODES=1 VENV=$PWD/.venv python tools/soak.py examples/quickstart/dypo.yaml run.steps=20000 \\
      optimizer.lr=4.0e-5 eval.every=50 checkpoint.every=10 --hours 2 --faults 205 --together --slurm "--nodes=2 --gpus-per-node=2"

| fault | times | training again after, median and longest, s |
|---|---|---|
| the job is told that its time is over (SIGUSR1), and is requeued | 23 | 70, 276 |
| a bit of the newest checkpoint flips, then a rank is killed | 11 | 106, 317 |
| a rank is killed | 22 | 48, 286 |
| a server is killed | 16 | 39, 200 |
| a verifier is killed | 16 | 6, 35 |
| the launcher is killed | 17 | 40, 77 |
| a rank is stopped for 3 to 20 s | 20 | 14, 235 |
| a server is stopped for 3 to 20 s | 20 | 18, 66 |

145 faults in 7,170 s, one every 49 s. Every law held: the books, versions, queues and log-prob gaps of every step were right, no process was
left behind, and the run named all 11 flipped bits. Once four starts in a row were lost before a checkpoint, so the job ended, as it must
(`MAX_RESTARTS`), and was submitted again. At step 400 82.8% [78.7, 86.1] of 400 held-out additions were right, without faults 82.0%.
Memory grew by 0.5% at most without faults (a rank, 7,191 s) and by 0.9% with them (a scheduler of a server); descriptors and threads by none.
With a fault every 49 s no rank lived for the six minutes that its growth needs; the run without faults measured it. Goodput was 31%.
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
    seen = "; ".join(map(str, row.told_by))
    return f"| {name} | {marks} | {outcome} | {row.deadline_s:g} s | {seen} |"


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
