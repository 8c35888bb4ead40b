"""Compare the reading of answers by a leader with reading them as JSON into lists, in its event loop.

    python benchmarks/controller.py

Stub servers answer as SGLang does: a whole group of rollouts of 8,192 tokens with their log-probs as one JSON. Two
kinds of leaders ask them in turn, each in a process of its own:

- ``columns``: the product's client, which cuts tokens and log-probs out of the bytes and converts them in a thread;
- ``lists``: the same client with ``json.loads`` and a check of each number, both in the event loop.

``few`` asks for 512 rollouts at once, in groups of k = 8 and 32, without and with the text of the rollouts (decoded by
a tokenizer). ``many`` asks 64 servers for 4,096 groups at once. The servers hold all requests until each has 60, then
all together answer 8 groups, half a million tokens, a second; the leader ends when it has packed 128 groups. So
all other requests stay open while it is measured, and its processor time has a part for each of them.

``routes`` asks for 128 rollouts in groups of 8, without and with the routes of Qwen3-30B-A3B (8 experts in each of 48
layers): 17 MB of base64 for each rollout. ``together`` runs 8 leaders at once, each with 4,096 open requests to the
same 64 servers. On a machine with few cores their groups a second and lags say nothing about a cluster, where each has
a node of its own; their processor time for a rollout and their memory do.

Printed for each round: groups a second; processor time of the leader for a rollout, all its threads, from the socket to
a packed microbatch; the lag of the event loop, its median, 99th percentile and maximum; the processor time of the
longest step of the event loop, one callback or one task up to its next wait; peak memory. ``idle`` is the lag of an
event loop without work in another process at the same time: the part of the lag that is the machine's.

The last line is one JSON object: ``cpu_vs_lists``, ``cpu_vs_lists_with_text`` and ``cpu_vs_lists_with_routes``, ratios
of medians of the processor time, the worse of k = 8 and 32; ``longest_step_ms`` of ``columns``, over all rounds of one
leader; ``lag_p99_vs_lists``, with many requests; ``cpu_8_vs_1``, a leader's processor time among 8, divided by that of
one alone; ``mib_of_8``, the largest peak memory of the 8.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import measure

FOLDER = measure.ROOT / "benchmarks"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One measurement. ``prompts`` must be a multiple of ``servers``."""

    servers: int
    processes: int
    prompts: int
    answers: int
    k: int
    tokens: int
    gap_ms: int = 0
    """Mean time between two answers of a server."""
    text: bool = False
    routes: bool = False
    leaders: int = 1

    @property
    def name(self) -> str:
        extra = f"{', with text' if self.text else ''}{', with routes' if self.routes else ''}"
        return f"{self.prompts} requests, k = {self.k}{extra}"


def start(script: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(measure.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def flags(**values: object) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@contextlib.contextmanager
def stubs(setting: Setting) -> Iterator[list[str]]:
    """Run the stub servers; give their URLs."""
    own = setting.servers // setting.processes
    with contextlib.ExitStack() as stack:
        urls: list[str] = []
        for seed in range(setting.processes):
            requests = setting.leaders * setting.prompts
            hold = max(requests // setting.servers * 15 // 16, 1)  # a connection that failed may go elsewhere
            given = flags(servers=own, k=setting.k, tokens=setting.tokens, hold=hold, gap_ms=setting.gap_ms, seed=seed)
            given += flags(routes=int(setting.routes))
            process = stack.enter_context(start("controller_servers.py", given))
            assert process.stdin is not None
            assert process.stdout is not None
            stack.callback(process.stdin.close)
            urls += json.loads(process.stdout.readline())
        yield urls


def run_leaders(client: str, setting: Setting, urls: Sequence[str]) -> list[dict[str, Any]]:
    """Run leaders at once, to their end; return what each measured, and the lag of an idle loop beside them."""
    given = flags(client=client, urls=json.dumps(urls), prompts=setting.prompts, answers=setting.answers)
    given += [*flags(k=setting.k, tokens=setting.tokens), *(["--text"] if setting.text else [])]
    given += ["--routes"] if setting.routes else []
    with contextlib.ExitStack() as stack:
        idle = stack.enter_context(start("controller_leader.py", flags(client="idle")))
        leaders = [stack.enter_context(start("controller_leader.py", given)) for _ in range(setting.leaders)]
        outputs = [leader.communicate()[0] for leader in leaders]
        beside, _ = idle.communicate()
    failed = [leader.returncode for leader in leaders if leader.returncode]
    if failed:
        raise SystemExit(f"a leader ended with exit status {failed[0]}")
    idle_p99_ms = json.loads(beside)["lag_p99_ms"]
    found = [{**json.loads(output.splitlines()[-1]), "idle_p99_ms": idle_p99_ms} for output in outputs]
    for one in found:
        print(
            f"{setting.name}: {client:>7}: {one['groups_per_s']:.1f} groups/s, "
            f"{one['cpu_ms']:.2f} ms a rollout, lag {one['lag_p50_ms']:.1f}, {one['lag_p99_ms']:.0f}, "
            f"{one['lag_max_ms']:.0f} ms (idle {one['idle_p99_ms']:.0f}), "
            f"longest step {one['step_ms']:.1f} ms, {one['peak_mib']:.0f} MiB",
            flush=True,
        )
    return found


def measured(setting: Setting, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run both kinds of leaders in turn."""
    found: dict[str, list[dict[str, Any]]] = {"lists": [], "columns": []}
    with stubs(setting) as urls:
        for index in range(rounds):
            for client in reversed(list(found)) if index % 2 else found:
                found[client] += run_leaders(client, setting, urls)
    return found


def median(found: dict[str, list[dict[str, Any]]], client: str, field: str) -> float:
    return statistics.median(float(one[field]) for one in found[client])


def ratio(found: dict[str, list[dict[str, Any]]], field: str) -> float:
    return median(found, "columns", field) / median(found, "lists", field)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    measure.print_header()
    rounds, tokens, many = (1, 600, 64) if options.smoke else (options.rounds, 8192, 4096)
    few = [
        Setting(servers=8, processes=2, prompts=512 // k, answers=512 // k, k=k, tokens=tokens, text=text)
        for k in (8, 32)
        for text in (False, True)
    ]
    small = Setting(servers=8, processes=2, prompts=16, answers=16, k=8, tokens=tokens)
    by_few = {setting: measured(setting, rounds) for setting in few}
    by_routes = {setting: measured(setting, rounds) for setting in (small, replace(small, routes=True))}
    crowd = Setting(
        servers=8 if options.smoke else 64,
        processes=4,
        prompts=many,
        answers=max(many // 32, 16),
        k=8,
        tokens=tokens,
        gap_ms=10 if options.smoke else 8000,
    )
    by_many = measured(crowd, min(rounds, 2))
    together = replace(crowd, leaders=2 if options.smoke else 8, gap_ms=crowd.gap_ms // 4)
    print(f"# {together.leaders} leaders at once, {together.leaders * together.prompts} requests:", flush=True)
    with stubs(together) as urls:
        at_once = {"columns": run_leaders("columns", together, urls)}
    steps = [one["step_ms"] for found in (*by_few.values(), *by_routes.values(), by_many) for one in found["columns"]]
    cpu = {
        text: max(ratio(found, "cpu_ms") for one, found in by_few.items() if one.text == bool(text)) for text in (0, 1)
    }
    measure.print_result(
        {
            "cpu_vs_lists": round(cpu[0], 3),
            "cpu_vs_lists_with_text": round(cpu[1], 3),
            "cpu_vs_lists_with_routes": round(ratio(by_routes[replace(small, routes=True)], "cpu_ms"), 3),
            "longest_step_ms": round(max(steps), 1),
            "lag_p99_vs_lists": round(ratio(by_many, "lag_p99_ms"), 4),
            "cpu_8_vs_1": round(median(at_once, "columns", "cpu_ms") / median(by_many, "columns", "cpu_ms"), 2),
            "mib_of_8": round(max(one["peak_mib"] for one in at_once["columns"])),
        }
    )


if __name__ == "__main__":
    main()
