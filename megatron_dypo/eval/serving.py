"""The servers of an evaluation: started for an HF folder in the way a training run starts them, or reached by URL."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.checks import require
from megatron_dypo.config.eval_command import EvalCommandConfig
from megatron_dypo.config.evaluation import SetSettings
from megatron_dypo.config.urls import require_urls
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.eval.endpoints import Api, Endpoint, OpenAIEndpoint, SGLangEndpoint
from megatron_dypo.eval.model import hf_folder_of
from megatron_dypo.eval.reaching import reach_openai, url_without_path
from megatron_dypo.parallel.device import device_kind
from megatron_dypo.processes.running_time import running_time
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.http_client import HttpClient
from megatron_dypo.rollout.keys import read_api_key
from megatron_dypo.rollout.server.probe import HEALTH_EVERY_S, http_status, require_answer
from megatron_dypo.rollout.server.servers import ServerPool, start_servers

_WATCH_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model of an evaluation, and its servers."""

    model: str
    """The user's argument: a folder, or the name of a model at an endpoint."""
    api: Api
    urls: tuple[str, ...]
    """URLs of the servers; () if the command starts them."""
    folder: Path | None
    """The HF folder with the model's tokenizer and, for servers that are started, its weights. None: the endpoint
    renders prompts or accepts them as text."""


def target_of(model: str, cfg: EvalCommandConfig, *, urls: Sequence[str], api: Api, tokenizer: Path | None) -> Target:
    """Return the model and servers that the arguments of the command name.

    Raises:
        ValueError: the arguments do not fit together, or there is no such model.
    """
    given = tuple(url.rstrip("/") for url in urls) or cfg.rollout.servers.urls
    if api == "sglang":
        require(
            tokenizer is None, f"--tokenizer={tokenizer}", "is for --api completions: SGLang's own API takes MODEL's"
        )
        require_urls(given, "url")
        return Target(model=model, api=api, urls=given, folder=hf_folder_of(model))
    require(bool(given), f"--api={api}", "needs --url, the endpoint")
    require(
        tokenizer is None or api == "completions",
        f"--tokenizer={tokenizer}",
        "is for --api completions: with --api chat the endpoint renders the messages",
    )
    for url in given:
        url_without_path(url)
    return Target(model=model, api=api, urls=given, folder=tokenizer)


class Serving:
    """A running endpoint. If the command started the servers, it restarts a server that dies and asks it again."""

    def __init__(self, endpoint: Endpoint, pool: ServerPool | None, deadline_s: float) -> None:
        self.endpoint, self._pool, self._deadline_s = endpoint, pool, deadline_s

    async def watch(self) -> None:
        """Check the servers that the command started every second. Without such servers, wait indefinitely.

        Raises:
            ServerDiedError: the servers are lost for good.
        """
        if self._pool is None:
            await asyncio.Event().wait()
        gone = set[str]()
        while self._pool is not None:
            gone.update(await asyncio.to_thread(self._pool.take_lost))
            are_back: bool = await asyncio.to_thread(self._are_healthy, gone)
            if gone and are_back:
                self._ask_all_again()
                gone.clear()
            await asyncio.sleep(_WATCH_EVERY_S)

    def await_return(self) -> bool:
        """Wait until one of the servers that the command started answers again; return False if none can.

        Raises:
            ServerDiedError: the servers are lost for good.
        """
        if self._pool is None or not self._pool.may_return():
            return False
        deadline = running_time() + self._deadline_s
        while running_time() < deadline:
            self._pool.check()
            if any(self._are_healthy({url}) for url in self._pool.urls):
                self._ask_all_again()
                return True
            time.sleep(HEALTH_EVERY_S)
        return False

    def _are_healthy(self, urls: Collection[str]) -> bool:
        assert self._pool is not None
        return all(http_status(f"{url}/health", self._pool.api_key) == 200 for url in urls)

    def _ask_all_again(self) -> None:
        client = self.endpoint.client
        assert self._pool is not None
        assert isinstance(client, SGLangClient)
        client.use_servers(self._pool.urls)


@contextlib.contextmanager
def serving(
    target: Target, cfg: EvalCommandConfig, settings: Mapping[str, SetSettings], tokenizer: Tokenizer | None, logs: Path
) -> Iterator[Serving]:
    """Start or reach the servers for the block.

    Raises:
        ValueError: nothing answers at a URL, or its server refuses the key or does not serve the model.
        ServerDiedError: a server that this function started has ended.
        NotHealthyError: a server that this function started does not answer in time.
    """
    servers = cfg.rollout.servers
    if target.api != "sglang":
        yield Serving(_open_ai(target, cfg, settings), None, servers.start_deadline_s)
        return
    assert tokenizer is not None
    assert target.folder is not None
    pool, api_key, urls = None, read_api_key(servers.api_key_env), target.urls
    with contextlib.ExitStack() as stack:
        if urls:
            _require_sglang(urls, api_key, servers.api_key_env)
        else:
            seed, device = cfg.seed, device_kind()
            pool = stack.enter_context(start_servers(servers, target.folder, cfg.dtype, logs, seed=seed, device=device))
            api_key, urls = pool.api_key, pool.urls
        client = SGLangClient(
            urls,
            api_key,
            cfg=cfg.rollout,
            decode=lambda tokens: tokenizer.decode(tokens.tolist()),
            stop_token_ids=tokenizer.eos_ids,
            router=servers.router,
        )
        yield Serving(SGLangEndpoint(client, settings), pool, servers.start_deadline_s)


def _require_sglang(urls: Sequence[str], api_key: str | None, key_name: str) -> None:
    for url in urls:
        status = http_status(f"{url}/model_info", api_key)
        require_answer(url, status, key_name)
        if status != 200:
            raise ValueError(
                f"{url}/model_info: HTTP {status}: not an SGLang server, or one that is not ready; for another "
                "server with OpenAI's API give --api chat or completions"
            )


def _open_ai(target: Target, cfg: EvalCommandConfig, settings: Mapping[str, SetSettings]) -> Endpoint:
    key_name = cfg.rollout.servers.api_key_env
    api_key = read_api_key(key_name)
    hosts, base = reach_openai(target.urls, model=target.model, api_key=api_key, key_name=key_name)
    assert target.api != "sglang"
    return OpenAIEndpoint(
        HttpClient(hosts, api_key, cfg=cfg.rollout),
        base=base,
        model=target.model,
        api=target.api,
        rollout=cfg.rollout,
        settings=settings,
    )
