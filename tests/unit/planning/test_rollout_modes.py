"""The effect of ``rollout.oversample`` and ``rollout.mode`` on a step."""

import dataclasses
import random

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.planning.lengths import survival
from megatron_dypo.planning.rollouts import drain_tokens, rollout_round
from megatron_dypo.planning.serving import decode_step_s, make_server, prefill_s
from megatron_dypo.planning.step import step_time
from tests.support.planning_cases import ROOT, from_file

ASYNC = ("rollout.mode=async", "old_logp.source=server")


def setting(*overrides):
    return from_file("llama3_70b", *overrides)


@pytest.mark.parametrize("max_in_flight", [64, 1024], ids=["requests wait", "all at once"])
def test_a_synchronous_round_ends_with_its_longest_response(max_in_flight):
    """It consists of full batches, then the drain to the limit, in which the longest response runs alone at last."""
    made = setting(f"rollout.max_in_flight={max_in_flight}")
    cfg, server, response = made.config.rollout, make_server(made), made.assumed.response_tokens
    requests = cfg.prompts_per_round * cfg.group_size / made.num_servers
    batch = min(requests, max_in_flight * made.data / made.num_servers)
    full = (requests - batch) * response / batch * decode_step_s(made, server, batch)
    points = [(place + 0.5) / 1000 * cfg.max_new_tokens for place in range(1000)]
    drain = sum(
        cfg.max_new_tokens / 1000 * decode_step_s(
            made, server, max(1, batch * survival(response, cfg.max_new_tokens, at)), made.assumed.prompt_tokens + at
        )
        for at in points
    )  # fmt: skip
    prefill = prefill_s(made, cfg.prompts_per_round / made.num_servers * made.assumed.prompt_tokens)
    found = rollout_round(made)
    assert found.seconds == pytest.approx(full + drain + prefill, rel=0.005)
    assert found.prompts == cfg.prompts_per_round
    assert found.aborted == 0


@pytest.mark.parametrize("max_in_flight", [64, 1024], ids=["requests wait", "all at once"])
def test_oversampling_ends_a_round_sooner_and_aborts_what_it_began_too_much(max_in_flight):
    rounds = [
        rollout_round(setting(f"rollout.oversample={factor}", f"rollout.max_in_flight={max_in_flight}"))
        for factor in (1.01, 1.25, 2.0)
    ]
    seconds, aborted = [made.seconds for made in rounds], [made.aborted for made in rounds]
    assert seconds == sorted(seconds, reverse=True)
    assert aborted == sorted(aborted)
    assert aborted[0] > 0
    needed = rounds[-1].prompts * 8 * 2048
    assert aborted[-1] <= needed * 1.0001, "twice as many groups: as many tokens again"
    free = setting(f"rollout.max_in_flight={max_in_flight}")
    batch = min(needed / 2048 / free.num_servers * 2, max_in_flight * free.data / free.num_servers)
    bound = needed / free.num_servers / batch * decode_step_s(free, make_server(free), batch)
    assert seconds[-1] > bound, "servers that never drain"


@pytest.mark.parametrize("oversample", [1.25, 1.5, 2.0])
def test_the_length_of_a_drain_is_that_of_simulated_groups(oversample):
    """All groups begin at once with exponential lengths: the drain ends when enough groups are complete."""
    cfg = dataclasses.replace(setting().config.rollout, oversample=oversample, max_new_tokens=10**9)
    wanted, mean, random_lengths = 400, 1000.0, random.Random(7)
    begun = round(wanted * oversample)
    ends = [
        sorted(max(random_lengths.expovariate(1 / mean) for _ in range(cfg.group_size)) for _ in range(begun))[
            wanted - 1
        ]
        for _ in range(20)
    ]
    assert drain_tokens(cfg, mean, wanted / begun, cfg.group_size) == pytest.approx(sum(ends) / len(ends), rel=0.03)


def test_a_drain_is_bounded_by_the_limit_and_by_a_mean_response():
    cfg = dataclasses.replace(setting().config.rollout, oversample=1.5)
    assert drain_tokens(cfg, 2048, 1.0, 8) == cfg.max_new_tokens
    assert drain_tokens(cfg, 2048, 0.0, 8) == 2048
    lengths = [drain_tokens(cfg, 2048, share / 20, 8) for share in range(21)]
    assert lengths == sorted(lengths)


def test_an_asynchronous_stream_takes_over_what_a_synchronous_one_aborts():
    sync, parallel = (
        rollout_round(setting("rollout.oversample=1.5", *mode)) for mode in (("old_logp.source=server",), ASYNC)
    )
    assert sync.aborted > parallel.aborted == 0
    assert parallel.seconds < sync.seconds


def test_the_time_of_a_step_is_that_of_the_loop_that_the_config_asks_for():
    sync, parallel = (step_time(setting(*mode)) for mode in (("old_logp.source=server",), ASYNC))
    assert sync.total == sync.sequential == pytest.approx(sync.rollout + sync.trainer + sync.common)
    assert parallel.total == parallel.overlapped == max(parallel.rollout, parallel.trainer) + parallel.common
    assert parallel.total < parallel.sequential
    assert min(parallel.trainer_idle, parallel.rollout_idle) == pytest.approx(0), "the slower side never waits"


def test_the_report_of_an_asynchronous_run_names_the_overlapped_time_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["plan", "tests/planning_configs/llama3_70b.yaml", *ASYNC])
    assert done.exit_code == 0
    time = step_time(setting(*ASYNC))
    (line,) = (line for line in done.stdout.splitlines() if "trained tokens/s" in line)
    assert line.split()[:2] == ["total", f"{time.overlapped:.1f}"]
    assert f"one part after the other {time.sequential:.1f} s (" in line
    assert done.stdout.index("  overlapped ") < done.stdout.index("  synchronous ")


def test_the_report_names_the_tokens_that_are_sampled_for_nothing(monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["plan", "tests/planning_configs/llama3_70b.yaml", "rollout.oversample=1.5"])
    aborted = step_time(setting("rollout.oversample=1.5")).aborted
    assert f"and {aborted:,.0f} aborted" in done.stdout
