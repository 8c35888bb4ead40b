"""A fake SGLang server with everything that a run needs: rollouts that follow from prompt and version, refits, faults.

A POST to ``/fault`` with ``{"kind": …, "seconds": …}`` makes it fail for a while, as the fault matrix asks.
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

VOCAB = range(3, 131)
"""Ids of the words of the parity task."""
KINDS = ("busy", "slow", "hangs", "gone")
_SLOW_S = 0.3


@dataclass
class PolicyServer(FakeServer):
    """A server whose responses are the same in every run: tokens are drawn by prompt, version and member."""

    stop_id: int = 2
    fault: str = ""
    until: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    """Kind of fault → calls that met it."""

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/fault":
            self._begin(body["kind"], body["seconds"])
            return 200, {}
        if self.fault and time.monotonic() < self.until:
            self.refused[self.fault] = self.refused.get(self.fault, 0) + 1
            if self.fault == "busy":
                return 503, {"error": "no room"}
            time.sleep(_SLOW_S if self.fault == "slow" else max(0.0, self.until - time.monotonic()))
        if path == "/generate":
            return 200, self._generate(body)
        return super().answer(path, body)

    def _begin(self, kind: str, seconds: float) -> None:
        assert kind in KINDS
        if kind != "gone":
            self.fault, self.until = kind, time.monotonic() + seconds
            return
        self.refused[kind] = self.refused.get(kind, 0) + 1
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
