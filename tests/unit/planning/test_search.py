"""`megatron-dypo plan --search`: layouts and divisions of nodes, and why."""

import dataclasses
import functools
import json
import time

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.planning.footprint import fullest
from megatron_dypo.planning.layouts import end_stages, layouts
from megatron_dypo.planning.memory import trainer_footprints
from megatron_dypo.planning.proposals import overrides
from megatron_dypo.planning.scaling import splits
from megatron_dypo.planning.search import FREE, search
from megatron_dypo.planning.serving import server_footprint
from megatron_dypo.planning.step import step_time
from tests.support.planning_cases import ROOT, from_file
from tests.support.slow import slow_unless

BAR_S = 60
CASES = {"llama3_70b": 12, "qwen3_235b_a22b": 32}
"""Config → nodes."""
NAMES = slow_unless("llama3_70b".__eq__, CASES)


@functools.cache
def found(name):
    """Return the proposals of a case, and the seconds of processor time that the search took."""
    setting, start = from_file(name), time.process_time()
    return search(setting, CASES[name]), time.process_time() - start


@pytest.mark.parametrize("name", NAMES)
def test_a_search_takes_a_minute_of_one_core_at_most(name):
    proposals, seconds = found(name)
    nodes = CASES[name]
    assert seconds < BAR_S
    assert len(proposals) == 3
    assert all(proposal.trainer_nodes + proposal.server_nodes == nodes for proposal in proposals)
    assert len({proposal.trainer_nodes for proposal in proposals}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_proposals_fit_with_room_and_the_fastest_is_first(name):
    proposals, _ = found(name)
    totals = [proposal.time.total for proposal in proposals]
    assert totals == sorted(totals)
    for proposal in proposals:
        setting = proposal.setting
        assert fullest(trainer_footprints(setting)).spare >= FREE * setting.gpu.memory
        assert server_footprint(setting).spare >= 0
        assert setting.trainer_gpus == 8 * proposal.trainer_nodes
        assert setting.rollout_gpus == 8 * proposal.server_nodes


def test_the_best_is_no_slower_than_any_division_with_the_configs_own_layout():
    best = found("llama3_70b")[0][0].time.total
    setting = from_file("llama3_70b")
    roomy = dataclasses.replace(
        setting,
        config=dataclasses.replace(
            setting.config, rollout=dataclasses.replace(setting.config.rollout, max_in_flight=10**6)
        ),
    )
    own = [split.time.sequential for split in splits(roomy)]
    assert len(own) > 1
    assert best <= min(own)


def test_no_layout_of_the_space_is_faster_than_the_proposals():
    """By brute force over the layouts of the proposal's own division."""
    best = found("llama3_70b")[0][0]
    for config in layouts(best.setting, best.setting.trainer_gpus):
        rollout = dataclasses.replace(config.rollout, max_in_flight=10**6)
        other = dataclasses.replace(best.setting, config=dataclasses.replace(config, rollout=rollout))
        if fullest(trainer_footprints(other)).spare >= FREE * other.gpu.memory:
            assert step_time(other).total >= best.time.total * 0.999


@pytest.mark.parametrize("name", NAMES)
def test_a_proposals_overrides_make_the_plan_that_it_promises(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    proposal = found(name)[0][0]
    command = ["plan", f"tests/planning_configs/{name}.yaml", f"--nodes={proposal.trainer_nodes}", "--json"]
    done = CliRunner().invoke(app, [*command, *overrides(proposal)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"]["total_s"] == pytest.approx(proposal.time.total)


def test_the_reason_is_one_line_that_compares_with_neighbours(monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["plan", "tests/planning_configs/llama3_70b.yaml", "--search"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("SEARCH over 12 nodes × 8 h100-80gb")
    reasons = [line for line in done.stdout.splitlines() if line.startswith("   why: ")]
    assert len(reasons) == 3
    assert "does not fit" in reasons[0]
    assert "recompute" in reasons[0]
    assert "servers of" in reasons[0]


def test_json_has_the_proposals(monkeypatch):
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(
        app, ["plan", "tests/planning_configs/llama3_70b.yaml", "--search", "--nodes=8", "--json", "--model=qwen3-32b"]
    )
    (first, *_) = json.loads(done.stdout)["proposals"]
    assert first["trainer_nodes"] + first["server_nodes"] == 8
    assert first["total_s"] > first["rollout_s"] > 0


@pytest.mark.parametrize(
    ("nodes", "given", "message"),
    [
        (1, (), "nodes=1: a search needs at least 2: some train, others serve"),
        (2, (), "nodes=2: no layout leaves 10% of the memory of a h100-80gb free"),
        (
            12,
            (
                "refit.offload_servers=true",
                "rollout.servers.nodes=1",
                "rollout.servers.extra_args=[--enable-memory-saver]",
            ),
            "refit.offload_servers=true: a search divides nodes",
        ),
    ],
    ids=["one node", "too few", "colocated"],
)
def test_what_cannot_be_searched_is_refused_in_a_line(nodes, given, message):
    with pytest.raises(ValueError, match=message):
        search(from_file("llama3_70b", *given), nodes)


def test_stages_at_the_ends_have_fewer_layers_where_they_must():
    assert [end_stages(94, pipeline) for pipeline in (1, 2, 4, 8, 16)] == [0, 0, 23, 11, 5]
    assert end_stages(80, 8) == 0
    assert end_stages(7, 2) is None
