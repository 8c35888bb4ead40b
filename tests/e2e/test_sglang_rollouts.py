"""Rollouts from a real SGLang server on a tiny model."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from megatron_dypo.config.distillation.teacher_servers import TeacherServersConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.collect import collect
from megatron_dypo.rollout.server.probe import log_probs_are_untempered
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.rollout.server.servers import ServerPool
from megatron_dypo.rollout.teacher.check import require_same_tokenizer
from megatron_dypo.rollout.teacher.client import TeacherClient
from megatron_dypo.rollout.teacher.logprobs import teacher_logprobs
from megatron_dypo.types import Prompt, RolloutGroup, Sample, SampleKind, Treatment
from tests.support.hf_models import import_transformers, make_hf_model

STOP_IDS = tuple(range(2, 22))
"""Many ids, so that a random model with 131 tokens stops soon."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2")


@pytest.fixture(scope="module")
def pool(sglang_servers: Any, model_path: Path) -> ServerPool:
    return sglang_servers(model_path, max_restarts=0)


def make_client(pool: ServerPool, *, run_seed: Any = None, **fields: Any) -> SGLangClient:
    cfg = RolloutConfig(**{"max_new_tokens": 24, "request_deadline_s": 120.0, **fields})
    return SGLangClient(
        pool.urls,
        pool.api_key,
        cfg=cfg,
        decode=str,
        stop_token_ids=STOP_IDS,
        check=pool.check,
        backoff_s=0.1,
        run_seed=run_seed,
    )


def make_prompts(count: int, length: int = 12) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(
            prompt_id=str(i),
            visit=0,
            order=i,
            tokens=rng.integers(22, 131, length).astype(np.int32),
            text="",
            answer="",
            source="",
        )
        for i in range(count)
    ]


def post(pool: ServerPool, path: str) -> int:
    request = urllib.request.Request(
        pool.urls[0] + path, data=b"{}", headers={"Authorization": f"Bearer {pool.api_key}"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def rollout_samples(group: RolloutGroup) -> list[Sample]:
    return [
        Sample(
            order=group.prompt.order,
            member=member,
            treatment=Treatment.REINFORCE,
            kind=SampleKind.ROLLOUT,
            tokens=np.concatenate([group.prompt.tokens, rollout.tokens]),
            num_prompt_tokens=len(group.prompt.tokens),
            policy_version=0,
        )
        for member, rollout in enumerate(group.rollouts)
    ]


def logp_of_transformers(model_path: Path, group: RolloutGroup) -> list[torch.Tensor]:
    model = import_transformers().AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    logps = []
    for rollout in group.rollouts:
        tokens_L = torch.tensor(np.concatenate([group.prompt.tokens, rollout.tokens]), dtype=torch.long)
        with torch.no_grad():
            logp_LV = model(tokens_L[None]).logits[0].log_softmax(-1)
        start = len(group.prompt.tokens)
        logps.append(logp_LV[start - 1 : -1].gather(1, tokens_L[start:, None])[:, 0])
    return logps


@pytest.mark.parametrize(
    "fields", [{"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.9}], ids=["plain", "tempered"]
)
def test_log_probs_are_those_of_transformers_at_temperature_1(
    pool: ServerPool, model_path: Path, fields: dict[str, float]
) -> None:
    groups, stats = collect(make_prompts(2), make_client(pool, **fields), group_size=4, progress=False)
    assert stats.rollouts == 8
    for group in groups:
        for rollout, expected in zip(group.rollouts, logp_of_transformers(model_path, group), strict=True):
            np.testing.assert_allclose(rollout.logp, expected.numpy(), rtol=0, atol=1e-4)


def test_a_group_with_seeds_is_a_group_as_any_other(pool: ServerPool, model_path: Path) -> None:
    """This server ignores them; it is asked in the same form as one that honours them."""
    assert not pool.honours_seeds()
    (group,), stats = collect(make_prompts(1), make_client(pool, run_seed=7), group_size=8, progress=False)
    assert stats.rollouts == 8
    assert len({tuple(rollout.tokens) for rollout in group.rollouts}) >= 7
    for rollout, expected in zip(group.rollouts, logp_of_transformers(model_path, group), strict=True):
        np.testing.assert_allclose(rollout.logp, expected.numpy(), rtol=0, atol=1e-4)


def test_a_teachers_log_probs_are_those_of_transformers(pool: ServerPool, model_path: Path) -> None:
    groups, _ = collect(make_prompts(2), make_client(pool), group_size=4, progress=False)
    cfg = TeacherServersConfig(urls=pool.urls, request_deadline_s=120.0)
    for group in groups:
        samples = rollout_samples(group)
        found = teacher_logprobs(samples, TeacherClient(cfg, pool.api_key, vocab_size=131), progress=False)
        for logp, expected in zip(found, logp_of_transformers(model_path, group), strict=True):
            assert isinstance(logp, np.ndarray), logp
            np.testing.assert_allclose(logp, expected.numpy(), rtol=0, atol=1e-4)


def test_a_server_that_knows_no_text_is_refused_as_a_teacher(pool: ServerPool, model_path: Path) -> None:
    """The servers of a run have no tokenizer."""
    with pytest.raises(ValueError, match="/tokenize does not answer as SGLang and vLLM do"):
        require_same_tokenizer(
            TeacherServersConfig(urls=pool.urls), pool.api_key, load_tokenizer(model_path), policy=str(model_path)
        )


def test_a_server_of_the_run_passes_the_check_for_untempered_log_probs(pool: ServerPool) -> None:
    assert log_probs_are_untempered(pool.urls[0], pool.api_key)


def test_the_samples_of_a_group_are_distinct(pool: ServerPool) -> None:
    groups, _ = collect(make_prompts(4), make_client(pool), group_size=8, progress=False)
    for group in groups:
        assert len({tuple(rollout.tokens) for rollout in group.rollouts}) >= 7
    firsts = [rollout.tokens[0] for group in groups for rollout in group.rollouts]
    assert len(set(firsts)) > len(groups)


def test_stopped_rollouts_keep_their_stop_token_and_truncated_ones_are_marked(pool: ServerPool) -> None:
    groups, stats = collect(make_prompts(8), make_client(pool, max_new_tokens=6), group_size=8, progress=False)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    stopped = [rollout for rollout in rollouts if rollout.finish == "stop"]
    truncated = [rollout for rollout in rollouts if rollout.finish == "length"]
    assert stopped
    assert truncated
    assert all(rollout.tokens[-1] in STOP_IDS for rollout in stopped)
    assert all(len(rollout.tokens) == 6 for rollout in truncated)
    assert not any(np.isin(rollout.tokens[:-1], STOP_IDS).any() for rollout in rollouts)
    assert stats.truncated == len(truncated)
    assert {rollout.policy_version for rollout in rollouts} == {0}


def test_evaluation_can_be_greedy(pool: ServerPool) -> None:
    client = make_client(pool)
    first, _ = collect(make_prompts(2), client, group_size=1, temperature=0.0, max_new_tokens=8, progress=False)
    again, _ = collect(make_prompts(2), client, group_size=1, temperature=0.0, max_new_tokens=8, progress=False)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.rollouts[0].tokens, b.rollouts[0].tokens)


def test_a_prompt_beyond_the_context_length_is_dropped_alone_with_sglangs_words(
    pool: ServerPool, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [*make_prompts(1, length=600), *make_prompts(1)]
    groups, stats = collect(prompts, make_client(pool), group_size=2, progress=False)
    assert [len(group.prompt.tokens) for group in groups] == [12]
    assert (len(stats.dropped), stats.retries) == (1, 0)
    assert re.search(r"HTTP 400: .*context length", caplog.text)


def test_cancelled_groups_stop_at_the_server(pool: ServerPool) -> None:
    """The server cannot flush its cache while requests run. These would sample a quarter of a million tokens."""

    async def cancel_midway() -> None:
        client = SGLangClient(pool.urls, pool.api_key, cfg=RolloutConfig(), decode=str, stop_token_ids=())
        async with client:
            sampling = client.sampling(64, max_new_tokens=490)
            prompts = make_prompts(8)
            task = asyncio.gather(*(client.generate(prompt.tokens, sampling) for prompt in prompts))
            while await asyncio.to_thread(post, pool, "/flush_cache") == 200:
                assert not task.done()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            deadline = time.monotonic() + 20
            while await asyncio.to_thread(post, pool, "/flush_cache") != 200:
                assert time.monotonic() < deadline

    asyncio.run(cancel_midway())


def family_of(url: str) -> list[psutil.Process]:
    """Return a server's guard, server, scheduler and detokenizer processes: only they have its port as an argument."""
    port = url.rpartition(":")[2]
    roots = [process for process in psutil.process_iter(["cmdline"]) if port in (process.info["cmdline"] or [])]
    return list({process: None for root in roots for process in [root, *root.children(recursive=True)]})


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process is alive; a zombie that init has yet to reap is not."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_trainer_that_is_killed_leaves_no_process_of_its_server(model_path: Path, tmp_path: Path) -> None:
    code = f"""
import signal
from pathlib import Path
from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.rollout.server.servers import start_servers
cfg = ServersConfig(port=31000)
pool = start_servers(cfg, Path({str(model_path)!r}), "float32", Path({str(tmp_path)!r}), seed=1, device="cpu")
print(pool.urls[0], flush=True)
signal.pause()
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    with trainer.stdout:
        url = trainer.stdout.readline().strip()
    family = family_of(url)
    assert len([process for process in family if is_alive(process)]) >= 4  # guard, server, scheduler, detokenizer
    trainer.send_signal(signal.SIGKILL)
    trainer.wait(10)
    deadline = time.monotonic() + 30
    while any(is_alive(process) for process in family):
        assert time.monotonic() < deadline


def test_a_crash_in_a_server_ends_a_collection_at_once_and_nothing_is_left(pool: ServerPool) -> None:
    """This test is the last one: it kills the server."""
    family = family_of(pool.urls[0])
    (scheduler,) = [process for process in family if process.name().startswith("sglang::sched")]

    def crash_then_check() -> None:
        if is_alive(scheduler):
            scheduler.kill()
        pool.check()

    cfg = RolloutConfig(max_new_tokens=490, request_deadline_s=3600.0)
    client = SGLangClient(pool.urls, pool.api_key, cfg=cfg, decode=str, stop_token_ids=(), check=crash_then_check)
    # The collection ended at once: the deadline of its requests is longer than this test's.
    with pool, pytest.raises(ServerDiedError, match=r"(?s)SGLang server 0 .*sglang_0\.log"):
        collect(make_prompts(4), client, group_size=8, progress=False)
    assert not [process for process in family if is_alive(process)]
