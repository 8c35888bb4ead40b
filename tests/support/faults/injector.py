"""Faults that a rank does to itself, or causes, when it enters a given part of a step."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_dypo.processes import stop_requests
from tests.support.faults.matrix import DAY_S, SERVER_FAULT_S, SLOW_FILE_S
from tests.support.faults.server_faults import ask, await_refusal
from tests.support.faults.witness import write_witness

PARTS: Mapping[str, str] = {
    "start": "checking weights",
    "rollouts": "collecting rollouts",
    "scoring": "computing log-probs",
    "update": "updating",
    "refit": "refitting the servers",
    "evaluation": "evaluating",
    "save": "saving a checkpoint",
    "export": "saving and exporting",
}
"""Phase → the activity that the watchdog is told when the phase begins."""


@dataclass(frozen=True, kw_only=True)
class Injection:
    """One fault of one rank."""

    kind: str
    phase: str
    rank: int
    after_step: int = 0
    """Leave out the phase as long as the run has made fewer steps in this start."""
    urls: tuple[str, ...] = ()
    """Servers, for a fault of a server."""
    seconds: float = SERVER_FAULT_S
    """Time for which a server fails."""
    witness: str
    """File that gets a line when the fault happens: the proof that it did."""


class Injector:
    """It waits for the phases of its injections, one after the other; each happens once."""

    def __init__(self, injections: list[Injection], key: str) -> None:
        self._waiting = list(injections)
        self._key = key
        self._steps = 0
        self.policy: Any = None
        self._has_slow_disk = False

    def install(self) -> None:
        """Listen to the parts of a step, and to the policy when it is built."""
        from megatron_dypo.loop import megatron_policy
        from megatron_dypo.processes.pace import Pace

        enter, begin_step = Pace.enter, Pace.begin_step
        build = megatron_policy.MegatronPolicy.__init__

        def noticed_enter(pace: Pace, part: str, now: float) -> None:
            enter(pace, part, now)
            # A task that only shows the watchdog that this rank lives is no part of the loop.
            if asyncio._get_running_loop() is None:
                self._notice(part)

        def noticed_step(pace: Pace, now: float) -> None:
            begin_step(pace, now)
            self._steps += 1

        def noticed_build(policy: Any, *args: Any, **options: Any) -> None:
            build(policy, *args, **options)
            self.policy = policy

        Pace.enter, Pace.begin_step = noticed_enter, noticed_step  # type: ignore[method-assign,assignment]
        megatron_policy.MegatronPolicy.__init__ = noticed_build  # type: ignore[method-assign,assignment]

    def _notice(self, part: str) -> None:
        if not self._waiting or part != PARTS[self._waiting[0].phase]:
            return
        injection = self._waiting[0]
        if self._steps < injection.after_step or not self._takes_part(injection):
            return
        del self._waiting[0]
        if not injection.urls:  # the witness of a server's fault is a request that meets it
            write_witness(self._facts(injection))
        FAULTS[injection.kind](self, injection)

    def _takes_part(self, injection: Injection) -> bool:
        """Return whether a server that is to go takes part in the run: it is back, and has got the weights again."""
        if injection.kind != "a server is gone" or injection.phase == "start":
            return True
        with ask(f"{injection.urls[0]}/model_info", self._key) as answer:
            return bool(json.load(answer)["weight_version"] != "default")

    def _facts(self, injection: Injection) -> dict[str, Any]:
        return {**asdict(injection), "steps": self._steps}

    def kill(self, injection: Injection) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def stop(self, injection: Injection) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def ask_to_stop(self, injection: Injection) -> None:
        """Do what a launcher does that gets SIGTERM, SIGINT or SIGUSR1."""
        os.kill(os.getpid(), signal.SIGUSR1)

    def terminate(self, injection: Injection) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def terminate_twice(self, injection: Injection) -> None:
        self.terminate(injection)
        time.sleep(2 * stop_requests.ECHO_S)  # a second one that comes sooner counts as the first
        self.terminate(injection)
        signal.pause()

    def leave(self, injection: Injection) -> None:
        os._exit(9)

    def quit(self, injection: Injection) -> None:
        sys.exit(9)

    def fail(self, injection: Injection) -> None:
        raise RuntimeError("a fault of the matrix")

    def fill_disk(self, injection: Injection) -> None:
        """Make every write beyond a file's first page fail in this process, as on a full disk.

        Semaphores, which are small files in memory, are not on the disk and can still be made.
        """
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))

    def slow_disk(self, injection: Injection) -> None:
        """From now on the disk takes its time for each file."""
        if self._has_slow_disk:
            return
        self._has_slow_disk, sync = True, os.fsync

        def slow_sync(descriptor: Any) -> None:
            time.sleep(SLOW_FILE_S)
            sync(descriptor)

        os.fsync = slow_sync  # type: ignore[assignment]

    def tear(self, injection: Injection) -> None:
        """Leave half a line at the end of every file that grows, and die."""
        run_dir = Path(injection.witness).parent / "run"
        growing = [run_dir / "metrics.jsonl", *run_dir.glob("journal/**/*"), *run_dir.glob("samples/*.jsonl")]
        for path in growing:
            if path.is_file():
                with path.open("ab") as file:
                    file.write(b'{"step": 1')
        os.kill(os.getpid(), signal.SIGKILL)

    def set_clock(self, injection: Injection) -> None:
        """Set the time of day of this process back by a day, and from the next look on ahead by one."""
        real, looks = time.time, [0]

        def wrong() -> float:
            looks[0] += 1
            return real() + (DAY_S if looks[0] > 1 else -DAY_S)

        time.time = wrong

    def run_out_of_memory(self, injection: Injection) -> None:
        import torch

        torch.empty(2**55)

    def spoil_weight(self, injection: Injection) -> None:
        self._spoil(".mlp.linear_fc2.weight")

    def spoil_unused_weight(self, injection: Injection) -> None:
        self._spoil("word_embeddings.weight")

    def _spoil(self, name: str) -> None:
        import torch

        with torch.no_grad():
            self._parameter(name)[0, 0] = float("nan")

    def _parameter(self, name: str) -> Any:
        named = [pair for chunk in self.policy.chunks for pair in chunk.named_parameters()]
        return next(parameter for full, parameter in named if full.endswith(name))

    def spoil_gradient(self, injection: Injection) -> None:
        """Make the next gradient of one weight NaN, before it is added to those of other microbatches and replicas."""

        def spoilt(gradient: Any) -> Any:
            handle.remove()
            return gradient * float("nan")

        handle = self._parameter(".mlp.linear_fc2.weight").register_hook(spoilt)

    def spoil_logprob(self, injection: Injection) -> None:
        """Make one of the next log-probs NaN."""
        kind = type(self.policy)
        compute = kind.logprobs

        def spoilt(policy: Any, samples: Any) -> Any:
            found = compute(policy, samples)
            if found:
                kind.logprobs = compute
                found[0][-1] = float("nan")
            return found

        kind.logprobs = spoilt

    def kill_verifiers(self, injection: Injection) -> None:
        killed = 0
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if "megatron_dypo.grading.workers" in line and "guard" not in line:
                    process.kill()
                    killed += 1
        assert killed, "no verifier was there to be killed"

    def fail_servers(self, injection: Injection) -> None:
        kind = injection.kind.removeprefix("a server ").removeprefix("is ")
        kind = {"answers 503": "busy"}.get(kind, kind)
        body = json.dumps({"kind": kind, "seconds": injection.seconds, "facts": self._facts(injection)}).encode()
        for url in injection.urls:
            ask(f"{url}/fault", self._key, body).close()
        if kind == "gone":
            await_refusal(injection.urls[0], self._facts(injection))


FAULTS: Mapping[str, Callable[[Injector, Injection], None]] = {
    "SIGKILL": Injector.kill,
    "SIGSTOP": Injector.stop,
    "a request to stop": Injector.ask_to_stop,
    "SIGTERM": Injector.terminate,
    "SIGTERM twice": Injector.terminate_twice,
    "exit": Injector.leave,
    "sys.exit": Injector.quit,
    "an error": Injector.fail,
    "out of memory": Injector.run_out_of_memory,
    "disk full": Injector.fill_disk,
    "slow disk": Injector.slow_disk,
    "torn write": Injector.tear,
    "clock step": Injector.set_clock,
    "NaN in a weight": Injector.spoil_weight,
    "NaN in a weight that no token reads": Injector.spoil_unused_weight,
    "NaN in a gradient": Injector.spoil_gradient,
    "NaN in a log-prob": Injector.spoil_logprob,
    "verifiers killed": Injector.kill_verifiers,
    "a server answers 503": Injector.fail_servers,
    "a server is slow": Injector.fail_servers,
    "a server hangs": Injector.fail_servers,
    "a server is gone": Injector.fail_servers,
}
"""Name of a fault → the function that does it."""
