"""``megatron-dypo eval`` on a real SGLang server: killed and started again, it ends with the figures of one go."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.eval.records import Record, read_records, records_path
from megatron_dypo.rollout.server.servers import ServerPool
from tests.support.e2e.commands import finished, start, wait_until
from tests.support.eval_cases import write_sums, write_tokenizer
from tests.support.hf_models import make_hf_model

ITEMS = 40


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_hf_model("qwen2", tmp_path_factory.mktemp("models") / "qwen2")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pool(sglang_servers: Any, model_path: Path) -> ServerPool:
    return sglang_servers(model_path, max_restarts=0)


def records(out: Path) -> list[Record]:
    return read_records(records_path(out, "sums"))


def test_a_killed_evaluation_goes_on_to_the_same_figures(pool: ServerPool, model_path: Path, tmp_path: Path) -> None:
    sets = tmp_path / "sets.yaml"
    path = write_sums(tmp_path / "sums.jsonl", ITEMS)
    sets.write_text(
        json.dumps(
            {
                "rollout": {"max_new_tokens": 24, "max_in_flight": 1},
                "grading": {"verifier": "exact", "workers": 1},
                # Greedy: responses are compared, and SGLang on a CPU takes no seed of a request.
                "eval": {"temperature": 0, "sets": {"sums": {"path": str(path)}}},
            }
        )
    )

    def command(out: Path) -> Any:
        arguments = ("eval", model_path, "--sets", sets, "--out", out, "--url", pool.urls[0])
        return start(*arguments, DYPO_SGLANG_API_KEY=str(pool.api_key))

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    killed = command(cut)
    wait_until(killed, lambda: len(records(cut)) >= 3)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    kept = records(cut)
    assert 3 <= len(kept) < ITEMS
    assert not (cut / "summary.json").exists()
    output = finished(command(cut))
    assert f"{len(kept)} of {ITEMS} responses have a record" in output
    assert records(cut)[: len(kept)] == kept
    finished(command(whole))
    assert records(cut) == records(whole)
    assert json.loads((cut / "summary.json").read_text()) == json.loads((whole / "summary.json").read_text())
