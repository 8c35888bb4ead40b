"""The plan against steps and updates that others published: ``benchmarks/published_steps.yaml``."""

import dataclasses
import math
from statistics import median

import pytest

from megatron_dypo.planning.memory import RESERVED, trainer_footprints
from megatron_dypo.planning.serving import make_server
from megatron_dypo.planning.step import step_time
from tests.support.planning_cases import ROOT

BARS = {"step": 0.25, "update": 0.15}
MEDIAN = 0.12


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def runs(benchmarks):
    from published_runs import published_runs

    return published_runs()


def errors(runs, **chosen):
    return {
        run.name: math.exp(run.error()) - 1
        for run in runs
        if all(getattr(run, name) == value for name, value in chosen.items())
    }


@pytest.mark.parametrize("kind", BARS)
def test_runs_that_fitted_nothing_are_planned_within_the_bars(runs, kind):
    found = errors(runs, kind=kind, half="test")
    assert len(found) >= 9
    assert max(map(abs, found.values())) <= BARS[kind], found
    assert median(map(abs, found.values())) <= MEDIAN, found


def test_the_plan_is_not_always_too_fast(runs):
    signs = [error > 0 for error in errors(runs, kind="step").values()]
    assert 0.25 < sum(signs) / len(signs) < 0.75


def test_the_halves_are_dealt_and_share_no_setting(runs):
    for kind in BARS:
        mine = [run for run in runs if run.kind == kind]
        assert [run.half for run in mine] == [("fit", "test", "test", "fit")[i % 4] for i in range(len(mine))]
        settings = [dataclasses.replace(run.setting, constants=None) for run in mine]
        assert len({repr(setting) for setting in settings}) == len(settings)


def test_the_stated_constants_are_those_of_the_fit(runs):
    from plan_fit import SPREAD, fit

    from megatron_dypo.planning.constants import FITTED

    fitted = fit(run for run in runs if run.half == "fit")
    for name in SPREAD:
        assert getattr(fitted, name) == pytest.approx(getattr(FITTED, name), rel=0.02), name


def test_the_stated_intervals_are_those_of_the_runs(runs):
    from plan_fit import spreads

    from megatron_dypo.planning.intervals import SPREADS

    assert spreads(runs) == pytest.approx(SPREADS, rel=0.02)


def test_servers_on_the_trainers_gpus_switch_and_leave_room_for_its_state(runs):
    (setting,) = (run.setting for run in runs if run.name == "8B 16 H100 colocated")
    cfg = setting.config
    servers = dataclasses.replace(cfg.rollout.servers, mem_fraction=0.9)
    freed = dataclasses.replace(
        setting, config=dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, servers=servers))
    )
    kept = dataclasses.replace(freed, frees_trainer=False)
    state = sum(trainer_footprints(freed)[1][name] for name in ("parameters", "gradients", "optimizer"))
    room = setting.gpu.memory - state - RESERVED - cfg.refit.bucket_mib * 2**20 - make_server(kept).weights_per_gpu
    assert make_server(kept).kv_tokens == pytest.approx(room / make_server(kept).kv_bytes_per_token)
    assert make_server(kept).kv_tokens < make_server(freed).kv_tokens
    apart = dataclasses.replace(
        setting, config=dataclasses.replace(cfg, refit=dataclasses.replace(cfg.refit, offload_servers=False))
    )
    assert step_time(apart).switch == 0 < step_time(setting).switch
    assert (setting.gpus, apart.gpus) == (16, 32)
