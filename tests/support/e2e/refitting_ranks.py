"""Run trainer ranks for the refit tests: TP2 × PP2 over gloo, against real servers.

Rank functions return plain data; the tests judge it.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

HANG_DEADLINE_S = 40.0
"""Deadline of a refit to a server that hangs. Half of it passes in the test."""
VERSIONS = {"broadcast": 1, "disk": 2, "pause": 3, "abort": 4, "hung": 5, "resumed": 8}
PROMPT = list(range(3, 15))
IN_FLIGHT_TOKENS = 2000
"""Enough tokens for a refit to begin before a request ends, also on a loaded machine."""


@dataclass(frozen=True)
class Servers:
    """The servers to refit to, and where."""

    urls: tuple[str, ...]
    api_key: str
    served: str
    """HF folder that the servers were started with."""
    run_dir: str


class Trainer:
    """One rank with a model. It can take the weights of any HF folder of the same architecture."""

    def __init__(self, servers: Servers, **axes: int) -> None:
        """Build the model. ``axes`` are the trainer's; default: TP2 × PP2."""
        from megatron_dypo.config.model import ModelConfig, ParallelConfig
        from megatron_dypo.mcore.model import build_model
        from megatron_dypo.mcore.start import start_megatron
        from megatron_dypo.models.architecture import load_architecture

        sizes: dict[str, Any] = axes or {"tensor": 2, "pipeline": 2}
        parallel = ParallelConfig(**sizes)
        self.servers = servers
        self.layout = start_megatron(parallel)
        self.arch = load_architecture(servers.served)
        model = ModelConfig(hf_path=servers.served, dtype="float32")
        self.chunks = build_model(self.arch, model, parallel, self.layout)

    def become(self, hf_path: str) -> None:
        from megatron_dypo.models.hf.read import HFReader
        from megatron_dypo.models.load import load_hf_weights

        layout = self.layout
        load_hf_weights(self.params(), HFReader(hf_path), self.arch, layout)

    def params(self) -> Iterator[tuple[str, Any]]:
        from megatron_dypo.mcore.chunks import named_global_weights

        return named_global_weights(self.chunks)

    def refitter(self, *, params: Any = None, urls: Any = None, **config: Any) -> Any:
        from megatron_dypo.config.refit import RefitConfig
        from megatron_dypo.refit.refitter import Refitter

        return Refitter(
            self.layout,
            self.arch,
            params or self.params,
            urls=urls or self.servers.urls,
            api_key=self.servers.api_key,
            config=RefitConfig(**{"bucket_mib": 1, "deadline_s": 60.0, **config}),
            run_dir=Path(self.servers.run_dir),
            hf_reference=Path(self.servers.served),
        )


@dataclass
class Running:
    """A streamed request that is under way on one server."""

    servers: Servers
    url: str
    tokens: int = IN_FLIGHT_TOKENS
    last: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._started.wait(60), "no token came"

    def _read(self) -> None:
        body = {
            "input_ids": PROMPT,
            "sampling_params": {"temperature": 1.0, "max_new_tokens": self.tokens, "ignore_eos": True},
            "stream": True,
        }
        with urllib.request.urlopen(request(self.servers, self.url, "/generate", body), timeout=120) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    self.last = json.loads(line.removeprefix(b"data: "))
                    self._started.set()

    def meta(self) -> dict[str, Any]:
        """Return ``meta_info`` of the request once it has ended."""
        self._thread.join(120)
        assert not self._thread.is_alive()
        return self.last["meta_info"]


def request(servers: Servers, url: str, path: str, body: dict | None = None) -> urllib.request.Request:
    headers = {"Authorization": f"Bearer {servers.api_key}", "Content-Type": "application/json"}
    return urllib.request.Request(url + path, json.dumps(body).encode() if body is not None else None, headers)


def ask(servers: Servers, url: str, path: str, body: dict | None = None) -> Any:
    with urllib.request.urlopen(request(servers, url, path, body), timeout=60) as answer:
        return json.load(answer)


def checksums(servers: Servers, url: str) -> dict[str, str]:
    """Return a hash of every parameter of a server's first rank."""
    return checksums_by_rank(servers, url)[0]


def checksums_by_rank(servers: Servers, url: str) -> list[dict[str, str]]:
    answer = ask(servers, url, "/weights_checker", {"action": "checksum"})
    return [rank["checksums"] for rank in answer["ranks"]]


def rank_refit(servers: Servers, first: str, second: str) -> dict[str, Any]:
    """Refit by each transport, also with requests in flight; return what rank 0 saw."""
    trainer = Trainer(servers)
    seen: dict[str, Any] = {}
    is_first = trainer.layout.rank == 0
    for transport, weights in (("broadcast", first), ("disk", second)):
        trainer.become(weights)
        refitter = trainer.refitter(transport=transport)
        seen[transport] = refitter.refit(VERSIONS[transport])
        if is_first:
            seen[f"{transport} checksums"] = [checksums(servers, url) for url in servers.urls]
            seen[f"{transport} info"] = [ask(servers, url, "/model_info") for url in servers.urls]
        refitter.close()
    trainer.become(first)
    for in_flight in ("pause", "abort"):
        refitter = trainer.refitter(in_flight=in_flight)
        running = [Running(servers, url) for url in servers.urls] if is_first else []
        refitter.refit(VERSIONS[in_flight])
        seen[in_flight] = [one.meta() for one in running]
        refitter.close()
    return seen


def rank_refit_while_a_server_dies(servers: Servers, weights: str) -> dict[str, Any]:
    """Refit while the last server is killed and requests are in flight on the first.

    The deadline is longer than that of any test: nobody can have waited for half of it."""
    trainer = Trainer(servers)
    trainer.become(weights)
    victim, survivor = servers.urls[-1], servers.urls[0]
    armed = threading.Event()

    def params() -> Iterator[tuple[str, Any]]:
        for index, pair in enumerate(trainer.params()):
            if armed.is_set() and trainer.layout.rank == 0 and index == 10:
                armed.clear()
                kill_server(victim)
            yield pair

    is_first = trainer.layout.rank == 0
    refitter = trainer.refitter(params=params, deadline_s=1000.0)
    refitter.refit(VERSIONS["resumed"])
    armed.set()
    running = Running(servers, survivor) if is_first else None
    report = refitter.refit(VERSIONS["resumed"] + 1)
    seen = {"report": report, "serving": refitter.serving}
    if running is not None:
        seen["in flight"] = running.meta()
        seen["version"] = ask(servers, survivor, "/model_info")["weight_version"]
        seen["checksums"] = checksums(servers, survivor)
    refitter.close()
    return seen


def rank_refit_while_a_server_hangs(servers: Servers, weights: str) -> dict[str, Any]:
    """Refit a server that hangs with a request in flight, and refit again once it has woken up."""
    trainer = Trainer(servers)
    trainer.become(weights)
    victim, is_first = servers.urls[-1], trainer.layout.rank == 0
    refitter = trainer.refitter(deadline_s=HANG_DEADLINE_S)
    refitter.refit(VERSIONS["hung"])
    running = Running(servers, victim) if is_first else None
    processes = server_family(victim) if is_first else []
    for process in processes:
        process.suspend()
    reports = [refitter.refit(VERSIONS["hung"] + 1)]
    serving = [refitter.serving]
    for process in processes:
        process.resume()
    reports.append(refitter.refit(VERSIONS["hung"] + 2))
    serving.append(refitter.serving)
    refitter.close()
    seen: dict[str, Any] = {"reports": reports, "serving": serving}
    if running is not None:
        seen["in flight"] = running.meta()
        seen["versions"] = [ask(servers, url, "/model_info")["weight_version"] for url in servers.urls]
        seen["checksums"] = [checksums(servers, url) for url in servers.urls]
    return seen


def kill_server(url: str) -> None:
    """Send SIGKILL to the process that listens at the URL, and to all its children."""
    for process in server_family(url):
        process.kill()


def server_family(url: str) -> list[psutil.Process]:
    """Return all children of the process that listens at the URL, and then that process."""
    port = int(url.rsplit(":", 1)[1])
    (pid,) = {
        one.pid for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    }
    server = psutil.Process(pid)
    return [*server.children(recursive=True), server]
