"""Write docs/exit_statuses.md again: ``python -m tests.golden.render_exit_statuses``."""

from pathlib import Path

from megatron_dypo.ending import Cause

DOCUMENT = Path(__file__).parents[2] / "docs" / "exit_statuses.md"

_HEAD = """\
# How a run ends

`megatron-dypo train` ends with one of these statuses, on one rank and on many, alone, under torchrun and in a Slurm job.
Every process of a run ends with the status of the cause that came first. This table is `megatron_dypo/ending.py`, rendered.

| status | cause | what happened | what to do | started again by Slurm's scripts |
|---|---|---|---|---|
"""

_TAIL = """
Status 2 is the command line's: an option or an argument that it does not know. `megatron-dypo plan` ends with 1 where a run
does not fit. A process that was killed by a signal *n* is seen by its shell as 128 + *n*.

## What is said where

- **On the terminal** (the standard error of the command, or `trainer.NODE.log` of a Slurm job): one line,
  `megatron-dypo: CAUSE (status N): …` with what was found, the steps and counts, and what to do. A mistake in an input is told
  in its own words, as `megatron-dypo: error: …`. Only a bug prints a traceback.
- **`run.dir/status.json`**, which is replaced as a whole: `state` (`running` or `ended`), `cause`, `status`, `requeue`,
  `message`, `what_to_do`, `step` and `steps`, `first_step` (steps that were done before this start), `counts`, the `rank`
  that wrote it (-1: the launcher), its `host` and `pid`, `started`, `ended`, `version`. The first process that says why the run
  ended counts; ranks that only lost their connections to it end with the same status and say nothing.
  A `state` of `running` with no `run.lock` beside it, or with one whose process is gone, is a start that was killed from
  outside together with its launcher.
- **`run.dir/logs/rank_00000.log`**: the same line last, whichever rank said it. What another rank saw of the end is in its own log.

## Signals

The first SIGUSR1, SIGTERM, SIGINT (Ctrl-C) or SIGHUP, to the command, to the launcher or to any rank, asks the run to finish its
step, save a checkpoint and end with 75. Before the first step of a start there is nothing to save, and it ends at once, with 75
too. A second SIGINT ends it at once with 130, a second SIGTERM with 143. A SIGHUP that `nohup` ignores stays ignored.
A rank that gets SIGTERM from its launcher ends at once.

## One run for one folder

A run holds `run.dir/run.lock`, which names host, process and time; it is touched every 30 s. A second `train` on the folder is refused
with status 73 before it touches anything. The lock of a run that has ended without removing it is taken over: at once if its
process was on this machine and is gone, or if it belongs to an earlier attempt or start of the same Slurm job; else once it was
not touched for 180 s.

## A rank that hangs

Each rank writes `run.dir/heartbeats/rank_00003.json` every 10 s: what its main thread is at, its stack, and for how long it has not moved.

A run learns how long its steps, and each part of a step, usually take (medians of the last 32 steps, from the third on). A rank without a
sign of life for 40 s (three usual steps and 19 s, if that is longer; 300 s while it imports, until a step is done) is named at once, from the
start of the run on, in one line of `logs/rank_00000.log` and on the terminal:

    stall: rank 5 on node01 (process 4711) has given no sign of life for 45 s (a step usually takes 2.1 s); it was updating at step (…) < …

So is a part of a step that takes three times as long as usual (or 1.5 times as long as the second longest of the last 32), and 19 s: the
line names the rank that is in no collective, for which the others wait, and each rank writes the stacks of its threads to its own log. A
part without a usual time, as the first step, the first evaluations, saving and exporting, is named only if no rank moves for half of
`run.watchdog_s`. If [py-spy](https://github.com/benfred/py-spy) is installed, the stacks of the named rank, even of a stopped process, are
in the log as well. A line `stall over: …` follows when the rank goes on.

After `run.watchdog_s` (1800; 0: never, and no warnings) without a sign of life from a rank, or in which no rank moves, the run ends with
76, to be started again. The message names the rank, its host and process, and what it was doing; the stacks of all its threads are in the
ranks' logs. Waiting for other ranks, for servers that start within their deadline, or for rollouts that come one by one, is no hang; nor is
work that is counted on a bar, such as checks of data and checkpoints. Only monotonic clocks count, so a step of the time of day fires
nothing. Neither does the suspension of the whole job (`scontrol suspend`): the watchdog leaves that time out, and so do the deadlines of
requests, of refits and of servers that start. Requests that were open are made again. Collectives have torch's own clock: if one was open,
a suspension of more than half an hour may end the run, to be started again.

## A server that hangs

The first rank asks each server and the router for `/health` every 10 s, and `megatron-dypo serve` asks those of its node. A server that
accepts connections but gives no answer for 30 s (it is stopped, or its event loop hangs) or whose host does not answer is named in a line
`stall: the server http://…`; `stall over: …` follows if it answers again. The process that started the server (the first rank, or
`megatron-dypo serve`) also sees that one of its inner processes, such as a scheduler, is stopped while `/health` is still answered; it
writes the stacks by py-spy. After `run.watchdog_s` it ends the server, which starts again as if it had died
(`rollout.servers.max_restarts`).

A scheduler that hangs within a batch is ended by SGLang's own watchdog after 300 s (`--watchdog-timeout` in `rollout.servers.extra_args`).
A scheduler that hangs between two batches is not seen: its `/health` is answered, and only its requests end at their deadline. The requests
of a server that hangs go to others after `rollout.request_deadline_s`, and a refit leaves it out after `refit.deadline_s`.
"""


def _started_again(cause: Cause) -> str:
    return "requeued" if cause.requeue else "in place" if cause.restart else ""


def render() -> str:
    rows = (
        f"| {cause.status} | `{cause.label}` | {cause.value.meaning} | {cause.value.advice} | {_started_again(cause)} |"
        for cause in Cause
    )
    return _HEAD + "\n".join(rows) + "\n" + _TAIL


if __name__ == "__main__":
    DOCUMENT.write_text(render())
