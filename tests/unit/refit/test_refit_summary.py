from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from megatron_dypo.refit.plan.refit_plan import Mesh, ServerMesh, make_plan
from megatron_dypo.refit.plan.summary import predict, summarize, to_json, to_text
from tests.support.architectures import make_arch
from tests.support.big_models import plan
from tests.support.refit_cases import cases

A, B = (0, 0), (1, 0)


def test_sources_that_never_meet_take_as_long_as_their_bytes():
    assert predict({0: [{A: 30}, {B: 30}], 1: [{B: 30}, {A: 30}]}, bandwidth=10.0) == pytest.approx(6.0)


def test_sources_that_meet_share_what_the_server_rank_can_receive():
    assert predict({0: [{A: 30}, {B: 30}], 1: [{A: 30}, {B: 30}]}, bandwidth=10.0) == pytest.approx(12.0)


def test_a_source_is_as_slow_as_its_most_loaded_server_rank_allows():
    phases = {0: [{A: 20, B: 20}], 1: [{A: 40}]}
    # A's load is 1/2 + 1, until both end: 40 bytes at 10 ÷ 1.5.
    assert predict(phases, bandwidth=10.0) == pytest.approx(6.0)


def test_a_source_without_anything_to_send_takes_no_time():
    assert predict({0: [], 1: []}, bandwidth=10.0) == 0.0


@given(cases())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_order_beats_the_limit(case):
    summary = summarize(make_plan(case.arch, case.source, case.servers), bandwidth=1e9)
    assert summary.predicted_s >= summary.limit_s * (1 - 1e-6)


def test_ranks_begin_with_different_servers_or_they_would_queue_up():
    made = plan("llama-3-70b")
    starts = [made.servers_of(rank)[0] for rank in range(made.source.world_size)]
    assert all(starts.count(server) == len(starts) // 8 for server in range(8))
    links = made.link_bytes()
    same_order = {
        rank: [
            {(server, t): links[rank, server, t] for t in range(8) if (rank, server, t) in links} for server in range(8)
        ]
        for rank in range(made.source.world_size)
    }
    assert predict(same_order, 50e9) > 1.5 * summarize(made, 50e9).predicted_s


def test_each_holder_of_the_same_data_talks_to_its_own_servers():
    source = Mesh(tensor=2, data=4)
    arch = make_arch(num_layers=8, hidden_size=64, vocab_size=64)
    made = make_plan(arch, source, [ServerMesh(tensor=2)] * 4)
    for rank in range(source.world_size):
        dp_rank = rank // source.tensor
        assert set(made.servers_of(rank)) == {dp_rank}


def test_text_and_json_carry_the_totals():
    made = make_plan(make_arch(), Mesh(tensor=2), [ServerMesh(tensor=2), ServerMesh(tensor=1)])
    summary = summarize(made, bandwidth=1e6)
    total = sum(summary.links.values())
    report = to_json(summary)
    assert report["total_bytes"] == total == sum(row["bytes"] for row in report["received"])
    assert total == sum(row["bytes"] for row in report["sent"]) == sum(row["bytes"] for row in report["links"])
    text = to_text(made, summary)
    assert f"{total / 1e6:.3f} MB" in text
    assert "predicted" in text


def test_a_bandwidth_of_nothing_is_refused():
    with pytest.raises(ValueError, match="bandwidth=0: must be positive"):
        summarize(make_plan(make_arch(), Mesh(), [ServerMesh(tensor=1)]), bandwidth=0)
