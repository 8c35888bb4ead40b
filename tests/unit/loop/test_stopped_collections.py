"""A request to stop that comes while rollouts are collected."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.loop.collect import collect_in_rounds
from megatron_dypo.loop.collect_from_stream import collect_from_stream
from megatron_dypo.processes.stop_requests import StopFlag
from tests.support.fake_sglang import FakeSGLang
from tests.support.loop_cases import leader_of, make_config, make_run


@pytest.mark.parametrize("rollout", [{}, {"mode": "async"}, {"oversample": 1.5}], ids=["sync", "async", "oversample"])
def test_a_request_to_stop_ends_a_collection_that_hangs_and_loses_no_prompt(
    tmp_path: Path, rollout: dict[str, Any]
) -> None:
    stop = StopFlag()

    def hang(_index: int, _body: dict[str, Any]) -> str:
        stop.set()
        return "hang"

    with FakeSGLang(hang) as fake:
        run = make_run([fake.url], make_config(tmp_path, rollout=rollout))
        collector = dataclasses.replace(run.collector, stop=stop)
        collect = collect_from_stream if collector.uses_stream(0) else collect_in_rounds
        with pytest.raises(RunEnded) as caught:
            collect(collector, 0)
        run.servers.stream.stop()
        assert caught.value.cause is Cause.STOPPED
        found = run.accounts.balance(run.progress.batch)
        assert found.difference == 0
        assert found.open.in_flight == found.ledger.drawn == leader_of(run).draws.cursor > 0
        fake.release()
