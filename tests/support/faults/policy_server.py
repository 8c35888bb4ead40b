"""A fake SGLang server with everything that a run needs: rollouts that follow from prompt and version, refits, faults.

A POST to ``/fault`` with ``{"kind": …, "seconds": …, "facts": …}`` makes it fail for a while, as the fault matrix asks.
The first request that meets the fault, at any server of this process, writes the witness.
"""

from __future__ import annotations

import hashlib
import math
import random
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_control import FakeServer, running
from tests.support.faults.matrix import SLOW_S
from tests.support.faults.witness import write_witness

VOCAB = range(3, 131)
"""Ids of the words of the parity task."""
KINDS = ("busy", "slow", "hangs", "gone")
_LOCK = threading.Lock()
_MET: set[tuple[str, str, int]] = set()
"""Witness file, phase and number of steps of each fault that a request has met."""


@dataclass
class PolicyServer(FakeServer):
    """A server whose responses are the same in every run: tokens are drawn by prompt, version and member."""

    stop_id: int = 2
    fault: str = ""
    until: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    met: list[tuple[str, str]] = field(default_factory=list)
    """Phase of a fault, and path of a request that met it, for each such request."""

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/fault":
            self._begin(body["kind"], body["seconds"], body["facts"])
            return 200, {}
        if self.fault and time.monotonic() < self.until:
            self._meet(path)
            if self.fault == "busy":
                return 503, {"error": "no room"}
            time.sleep(SLOW_S if self.fault == "slow" else max(0.0, self.until - time.monotonic()))
        if path == "/generate":
            return 200, self._generate(body)
        return super().answer(path, body)

    def _meet(self, path: str) -> None:
        self.met.append((self.facts["phase"], path))
        with _LOCK:
            fault = (self.facts["witness"], self.facts["phase"], self.facts["steps"])
            if fault not in _MET:
                _MET.add(fault)
                write_witness({**self.facts, "path": path})

    def _begin(self, kind: str, seconds: float, facts: dict[str, Any]) -> None:
        assert kind in KINDS
        if kind != "gone":
            self.facts, self.fault, self.until = facts, kind, time.monotonic() + seconds
            return
        threading.Thread(target=self._go, args=(seconds,), daemon=True).start()

    def _go(self, seconds: float) -> None:
        time.sleep(0.05)  # the caller gets its answer
        self.die()
        time.sleep(seconds)
        self.come_back()

    def _generate(self, body: dict[str, Any]) -> Any:
        sampling = body["sampling_params"]
        count, seed = sampling.get("n", 1), sampling.get("sampling_seed", 0)
        responses = [self._response(body["input_ids"], sampling["max_new_tokens"], seed, i) for i in range(count)]
        return responses if count > 1 else responses[0]

    def _response(self, prompt: list[int], most: int, seed: int, member: int) -> dict[str, Any]:
        name = hashlib.sha256(f"{prompt} {self.version} {seed} {member}".encode()).hexdigest()
        draw = random.Random(name)
        tokens = [draw.choice(VOCAB) for _ in range(draw.randrange(2, most))] + [self.stop_id]
        return {
            "output_ids": tokens,
            "meta_info": {
                "finish_reason": {"type": "stop", "matched": self.stop_id},
                "weight_version": self.version,
                "output_token_logprobs": [[-math.log(len(VOCAB)), token, None] for token in tokens],
            },
        }


def policy_servers(count: int, **state: Any) -> AbstractContextManager[list[PolicyServer]]:
    """Start ``count`` servers; see :func:`tests.support.fake_control.running`."""
    return running([PolicyServer(**state) for _ in range(count)])
