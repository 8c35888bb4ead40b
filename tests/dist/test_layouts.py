"""The matrix over layouts: the gradient of the whole objective against a literal float64 gradient in one process.

A row is a line of ``ROWS``. Rows of the same world size share one start of processes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_dypo.config.objective import ImportanceConfig, ObjectiveConfig
from megatron_dypo.types import Treatment
from tests.support.dist.layout_gradients import Row, rank_rows
from tests.support.dist.literal_objective import is_trusted, literal_gradients, literal_logprobs
from tests.support.dist.literal_routes import random_routes
from tests.support.dist.spawn import RankError, run_ranks
from tests.support.hf_models import make_hf_model
from tests.support.objective_cases import random_groups
from tests.support.slow import slow_unless

MODES: list[tuple[Any, float]] = [("sequence_mean", 1.0), ("sum", 0.3), ("token_mean", 2.0), ("constant", 1.0)]
OBJECTIVES = [
    ObjectiveConfig(length_normalization=mode, constant_length=7, kl_coef=0.1, clip_high=0.28, beta_gal=beta)
    for mode, beta in MODES
]
MEAN, SUM, TOKEN, CONSTANT = range(4)
BY_SEQUENCE: dict[str, dict[str, Any]] = {
    "gspo": {"ratio": "sequence"},
    "gal clipped": {"gal_clip": "sequence"},
    "geometric mean": {"importance": ImportanceConfig(sequence_bounds=(0.8, 1.2))},
    "gap": {"importance": ImportanceConfig(sequence_max_gap=0.35)},
    "all": {
        "ratio": "sequence",
        "gal_clip": "sequence",
        "importance": ImportanceConfig(
            cap=1.3, token_bounds=(0.5, 2.0), sequence_bounds=(0.7, 1.4), sequence_max_gap=0.5
        ),
    },
}
"""Options that depend on whole sequences, which context parallelism cuts."""
OBJECTIVES += [dataclasses.replace(OBJECTIVES[MEAN], **options) for options in BY_SEQUENCE.values()]

TP, PP, VPP, CP = {"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"context": 2}
SP = {"tensor": 2, "sequence": True}
EP, ETP = {"expert": 2}, {"expert_tensor": 2}
EVERY = tuple((objective, count) for objective in range(4) for count in (1, 2, 4))
PADDED = ((SUM, None),)
WHOLE = tuple((objective, 2) for objective in range(CONSTANT + 1, len(OBJECTIVES)))
SHARDED: dict[str, Any] = {"distributed": True}
REPLAY: dict[str, Any] = {"kind": "qwen3_moe", "replay": True}

OTHER_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3, 6 layers": ("qwen3", {"num_hidden_layers": 6}),
    "glm, 4 experts": ("glm4_moe", {"n_routed_experts": 4, "num_experts_per_tok": 2}),
}
"""Kinds of models for rows that need more than four layers, or the experts of the samples' routes."""

ROWS = {
    "one process": Row(ranks=1, passes=EVERY),
    "one process, by sequence": Row(ranks=1, passes=WHOLE),
    "one process, padded": Row(ranks=1, passes=PADDED),
    "one process, selective": Row(ranks=1, recompute="selective", kind="qwen2"),
    "one process, full, tied": Row(ranks=1, recompute="full", kind="llama_tied", passes=((TOKEN, 3),)),
    "tp2": Row(ranks=2, axes=TP, passes=((CONSTANT, 2),)),
    "tp2 sp": Row(ranks=2, axes=SP, passes=((MEAN, 1), (TOKEN, 4))),
    "tp2 sp, full": Row(ranks=2, axes=SP, recompute="full", kind="qwen2"),
    "tp2 sp, padded, tied": Row(ranks=2, axes=SP, kind="llama_tied", passes=PADDED),
    "pp2": Row(ranks=2, axes=PP, passes=((MEAN, 1), (SUM, 4))),
    "pp2, padded": Row(ranks=2, axes=PP, passes=PADDED),
    "pp2 vpp2": Row(ranks=2, axes=VPP, passes=((TOKEN, 2), (CONSTANT, 4))),
    "pp2 vpp2, full, tied": Row(ranks=2, axes=VPP, recompute="full", kind="llama_tied", passes=((MEAN, 6),)),
    "pp2, 1 + 3 layers, tied": Row(ranks=2, axes=PP | {"first_stage_layers": 1}, kind="llama_tied"),
    "pp2 vpp2, 2 + 4 layers": Row(
        ranks=2,
        axes=VPP | {"first_stage_layers": 2, "last_stage_layers": 4},
        kind="qwen3, 6 layers",
        passes=((TOKEN, 2),),
    ),
    "dp2": Row(ranks=2, passes=EVERY),
    "dp2, sharded": Row(ranks=2, **SHARDED, passes=((CONSTANT, 2),)),
    "dp2, sharded, overlap, tied": Row(ranks=2, **SHARDED, overlap=True, kind="llama_tied", passes=((TOKEN, 3),)),
    "dp2, overlap, selective": Row(ranks=2, overlap=True, recompute="selective"),
    "cp2": Row(ranks=2, axes=CP, passes=EVERY),
    "cp2, by sequence": Row(ranks=2, axes=CP, passes=WHOLE),
    "cp2, padded": Row(ranks=2, axes=CP, passes=PADDED),
    "cp2, selective, qwen2": Row(ranks=2, axes=CP, recompute="selective", kind="qwen2"),
    "cp2, full, sharded, tied": Row(ranks=2, axes=CP, recompute="full", **SHARDED, kind="llama_tied"),
    "tp2 pp2": Row(ranks=4, axes=TP | PP, passes=((MEAN, 4), (TOKEN, 1))),
    "tp2 pp2, tied": Row(ranks=4, axes=TP | PP, kind="llama_tied", passes=((SUM, 2),)),
    "tp2 sp pp2 vpp2": Row(ranks=4, axes=SP | VPP, passes=((MEAN, 2), (TOKEN, 4))),
    "tp2 sp pp2 vpp2, padded, tied": Row(ranks=4, axes=SP | VPP, kind="llama_tied", passes=PADDED),
    "tp2 sp pp2 vpp2, selective, qwen2": Row(ranks=4, axes=SP | VPP, recompute="selective", kind="qwen2"),
    "tp2 dp2": Row(ranks=4, axes=TP, passes=((CONSTANT, 2),)),
    "tp2 sp dp2, sharded, overlap": Row(ranks=4, axes=SP, **SHARDED, overlap=True, passes=((SUM, 3),)),
    "tp4 sp": Row(ranks=4, axes={"tensor": 4, "sequence": True}, passes=((TOKEN, 2),)),
    "pp4": Row(ranks=4, axes={"pipeline": 4}, passes=((MEAN, 3),)),
    "pp4, 2 + 1 + 1 + 2 layers": Row(
        ranks=4, axes={"pipeline": 4, "first_stage_layers": 2, "last_stage_layers": 2}, kind="qwen3, 6 layers"
    ),
    "pp2 dp2, full, sharded, tied": Row(ranks=4, axes=PP, recompute="full", **SHARDED, kind="llama_tied"),
    "pp2 vpp2 dp2, sharded, overlap, tied": Row(
        ranks=4, axes=VPP, **SHARDED, overlap=True, kind="llama_tied", passes=((CONSTANT, 4),)
    ),
    "pp2 vpp2 dp2, padded": Row(ranks=4, axes=VPP, passes=PADDED),
    "dp4, sharded": Row(ranks=4, **SHARDED, passes=((MEAN, 1),)),
    "cp4": Row(ranks=4, axes={"context": 4}, passes=((SUM, 2), (MEAN, 1))),
    "tp2 cp2": Row(ranks=4, axes=TP | CP, passes=((TOKEN, 2),)),
    "tp2 sp cp2, by sequence": Row(ranks=4, axes=SP | CP, passes=WHOLE),
    "pp2 cp2, by sequence": Row(ranks=4, axes=PP | CP, passes=WHOLE),
    "cp4, by sequence": Row(ranks=4, axes={"context": 4}, passes=WHOLE),
    "tp2 sp cp2, selective": Row(ranks=4, axes=SP | CP, recompute="selective", passes=((CONSTANT, 3),)),
    "tp2 sp cp2, padded, tied": Row(ranks=4, axes=SP | CP, kind="llama_tied", passes=PADDED),
    "pp2 cp2": Row(ranks=4, axes=PP | CP, passes=((MEAN, 4),)),
    "pp2 vpp2 cp2, full, tied": Row(ranks=4, axes=VPP | CP, recompute="full", kind="llama_tied", passes=((SUM, 2),)),
    "cp2 dp2": Row(ranks=4, axes=CP, passes=((MEAN, 1), (CONSTANT, 2))),
    "cp2 dp2, sharded, overlap, qwen2": Row(
        ranks=4, axes=CP, **SHARDED, overlap=True, kind="qwen2", passes=((TOKEN, 2),)
    ),
    "experts, one process": Row(ranks=1, kind="qwen3_moe", passes=EVERY),
    "experts, ep2": Row(ranks=2, axes=EP, kind="qwen3_moe", passes=EVERY),
    "experts, ep2, padded": Row(ranks=2, axes=EP, kind="qwen3_moe", passes=PADDED),
    "experts, tp2 sp ep2, selective": Row(ranks=2, axes=SP | EP, recompute="selective", kind="qwen3_moe"),
    "experts, dp2": Row(ranks=2, kind="qwen3_moe"),
    "experts, tp2 sp": Row(ranks=2, axes=SP, kind="qwen3_moe"),
    "experts, tp2 sp ep2": Row(ranks=2, axes=SP | EP, kind="qwen3_moe", passes=((SUM, 1), (TOKEN, 2))),
    "experts, tp2 sp ep2, raw weights": Row(ranks=2, axes=SP | EP, kind="qwen3_moe_raw_weights"),
    "experts, pp2": Row(ranks=2, axes=PP, kind="qwen3_moe"),
    "experts, pp2, 3 + 1 layers": Row(ranks=2, axes=PP | {"last_stage_layers": 1}, kind="qwen3_moe"),
    "experts, cp2": Row(ranks=2, axes=CP, kind="qwen3_moe"),
    "experts, cp2 ep2": Row(ranks=2, axes=CP | EP, kind="qwen3_moe", passes=((TOKEN, 2),)),
    "experts, tp2 sp cp2 ep4": Row(ranks=4, axes=SP | CP | {"expert": 4}, kind="qwen3_moe"),
    "experts, ep2 pp2": Row(ranks=4, axes=EP | PP, kind="qwen3_moe"),
    "experts, ep2 pp2 vpp2, full": Row(ranks=4, axes=EP | VPP, recompute="full", kind="qwen3_moe"),
    "experts, ep2 dp4": Row(ranks=4, axes=EP, kind="qwen3_moe", passes=((CONSTANT, 2),)),
    "experts, ep2 dp4, sharded, overlap": Row(ranks=4, axes=EP, **SHARDED, overlap=True, kind="qwen3_moe"),
    "experts, tp2 sp etp2": Row(ranks=2, axes=SP | ETP, kind="qwen3_moe", passes=EVERY),
    "experts, etp2 dp2, sharded": Row(ranks=2, axes=ETP, **SHARDED, kind="qwen3_moe", passes=((TOKEN, 3), (MEAN, 1))),
    "experts, tp2 sp ep2 etp2": Row(ranks=4, axes=SP | EP | ETP, kind="qwen3_moe", passes=((SUM, 1), (TOKEN, 2))),
    "experts, etp2 pp2 vpp2, full": Row(ranks=4, axes=ETP | VPP, recompute="full", kind="qwen3_moe"),
    "experts, tp2 sp cp2 etp4": Row(ranks=4, axes=SP | CP | {"expert_tensor": 4}, kind="qwen3_moe"),
    "experts, etp2 dp4, overlap": Row(ranks=4, axes=ETP, overlap=True, kind="qwen3_moe", passes=((CONSTANT, 2),)),
    "deepseek, one process": Row(ranks=1, kind="deepseek_v3", passes=((MEAN, 1),)),
    "deepseek, tp2 sp": Row(ranks=2, axes=SP, kind="deepseek_v3", passes=((MEAN, 1), (TOKEN, 2))),
    "deepseek, tp2 sp ep2, full": Row(ranks=2, axes=SP | EP, recompute="full", kind="deepseek_v3"),
    "deepseek, tp2 sp etp2, selective": Row(ranks=2, axes=SP | ETP, recompute="selective", kind="moonlight"),
    "deepseek, pp2": Row(ranks=2, axes=PP, kind="deepseek_v3"),
    "deepseek, ep2": Row(ranks=2, axes=EP, kind="moonlight"),
    "deepseek, cp2": Row(ranks=2, axes=CP, kind="deepseek_v3", passes=((SUM, 2),)),
    "deepseek, dp2, sharded, overlap": Row(ranks=2, **SHARDED, overlap=True, kind="moonlight"),
    "deepseek, ep2 pp2 vpp2": Row(ranks=4, axes=EP | VPP, kind="moonlight"),
    "glm, one process": Row(ranks=1, kind="glm4_moe", passes=((MEAN, 1), (SUM, None))),
    "glm, tp2 sp": Row(ranks=2, axes=SP, kind="glm4_moe", passes=((MEAN, 1), (TOKEN, 2))),
    "glm, tp2 sp ep2, full": Row(ranks=2, axes=SP | EP, recompute="full", kind="glm4_moe"),
    "glm, tp2 sp etp2, selective": Row(ranks=2, axes=SP | ETP, recompute="selective", kind="glm4_moe_yarn"),
    "glm, pp2": Row(ranks=2, axes=PP, kind="glm4_moe"),
    "glm, ep2": Row(ranks=2, axes=EP, kind="glm4_air"),
    "glm, cp2": Row(ranks=2, axes=CP, kind="glm4_moe_yarn", passes=((SUM, 2),)),
    "glm, dp2, sharded, overlap": Row(ranks=2, **SHARDED, overlap=True, kind="glm4_air"),
    "glm, ep2 pp2 vpp2": Row(ranks=4, axes=EP | VPP, kind="glm4_moe"),
    "gpt-oss, one process": Row(ranks=1, kind="gpt_oss", passes=((MEAN, 1), (TOKEN, 3), (SUM, None))),
    "gpt-oss, one process, selective": Row(ranks=1, recompute="selective", kind="gpt_oss"),
    "gpt-oss, tp2 sp": Row(ranks=2, axes=SP, kind="gpt_oss", passes=((MEAN, 1), (TOKEN, 2))),
    "gpt-oss, tp2 sp ep2, full": Row(ranks=2, axes=SP | EP, recompute="full", kind="gpt_oss"),
    "gpt-oss, pp2": Row(ranks=2, axes=PP, kind="gpt_oss"),
    "gpt-oss, pp2, 3 + 1 layers": Row(ranks=2, axes=PP | {"last_stage_layers": 1}, kind="gpt_oss"),
    "gpt-oss, ep2, padded": Row(ranks=2, axes=EP, kind="gpt_oss", passes=PADDED),
    "gpt-oss, cp2": Row(ranks=2, axes=CP, kind="gpt_oss", passes=((SUM, 2), (MEAN, 1))),
    "gpt-oss, cp2, padded": Row(ranks=2, axes=CP, kind="gpt_oss", passes=PADDED),
    "gpt-oss, dp2, sharded, overlap": Row(ranks=2, **SHARDED, overlap=True, kind="gpt_oss"),
    "gpt-oss, ep2 pp2 vpp2": Row(ranks=4, axes=EP | VPP, kind="gpt_oss"),
    "gpt-oss, tp2 sp cp2 ep4": Row(ranks=4, axes=SP | CP | {"expert": 4}, kind="gpt_oss"),
    "experts, tp2 sp ep4": Row(ranks=4, axes=SP | {"expert": 4}, kind="qwen3_moe"),
    "replay, one process": Row(ranks=1, **REPLAY, passes=((SUM, 1), (TOKEN, 4))),
    "replay, one process, full, raw weights": Row(ranks=1, kind="qwen3_moe_raw_weights", replay=True, recompute="full"),
    "replay, gpt-oss, tp2 sp ep2": Row(ranks=2, axes=SP | EP, kind="gpt_oss", replay=True),
    "replay, dp2": Row(ranks=2, **REPLAY, passes=((MEAN, 2), (SUM, None))),
    "replay, ep2, padded": Row(ranks=2, axes=EP, **REPLAY, passes=PADDED),
    "replay, tp2 sp ep2, selective": Row(ranks=2, axes=SP | EP, **REPLAY, recompute="selective"),
    "replay, tp2 sp etp2": Row(ranks=2, axes=SP | ETP, **REPLAY),
    "replay, pp2, 3 + 1 layers": Row(ranks=2, axes=PP | {"last_stage_layers": 1}, **REPLAY, passes=((MEAN, 4),)),
    "replay, pp2 vpp2, full": Row(ranks=2, axes=VPP, **REPLAY, recompute="full", passes=((TOKEN, 4),)),
    "replay, cp2": Row(ranks=2, axes=CP, **REPLAY, passes=((CONSTANT, 3),)),
    "replay, cp2 ep2, full": Row(ranks=2, axes=CP | EP, **REPLAY, recompute="full"),
    "replay, tp2 sp cp2 ep4": Row(ranks=4, axes=SP | CP | {"expert": 4}, **REPLAY),
    "replay, ep2 pp2 vpp2, full": Row(ranks=4, axes=EP | VPP, **REPLAY, recompute="full", passes=((SUM, 4),)),
    "replay, glm, tp2 sp ep2, full": Row(ranks=2, axes=SP | EP, kind="glm, 4 experts", replay=True, recompute="full"),
    "replay, glm, pp2 vpp2": Row(ranks=2, axes=VPP, kind="glm, 4 experts", replay=True, passes=((TOKEN, 4),)),
    "replay, tp2 sp pp2 etp2, full": Row(ranks=4, axes=SP | PP | ETP, **REPLAY, recompute="full", passes=((SUM, 3),)),
}  # fmt: skip

IN_EVERY_RUN = {
    "one process", "one process, by sequence", "one process, padded", "one process, full, tied",
    "tp2", "tp2 sp", "tp2 sp, padded, tied",
    "pp2, padded", "pp2 vpp2", "pp2 vpp2, 2 + 4 layers", "pp2, 1 + 3 layers, tied",
    "dp2", "dp2, sharded, overlap, tied", "cp2, by sequence", "cp2, padded", "cp2, selective, qwen2",
    "tp2 sp pp2 vpp2", "tp2 sp dp2, sharded, overlap", "pp2 dp2, full, sharded, tied", "pp2 vpp2 cp2, full, tied",
    "tp2 sp cp2, by sequence", "cp2 dp2, sharded, overlap, qwen2",
    "experts, one process", "experts, ep2, padded", "experts, tp2 sp ep2", "experts, tp2 sp ep2, raw weights",
    "experts, pp2, 3 + 1 layers", "experts, cp2 ep2", "experts, ep2 pp2 vpp2, full",
    "experts, ep2 dp4, sharded, overlap", "experts, tp2 sp ep2 etp2", "experts, etp2 pp2 vpp2, full",
    "deepseek, one process", "deepseek, tp2 sp ep2, full", "deepseek, cp2", "deepseek, ep2 pp2 vpp2",
    "glm, one process", "glm, tp2 sp etp2, selective", "glm, cp2", "glm, ep2", "glm, ep2 pp2 vpp2",
    "gpt-oss, one process", "gpt-oss, tp2 sp ep2, full", "gpt-oss, cp2", "gpt-oss, ep2 pp2 vpp2",
    "replay, one process", "replay, gpt-oss, tp2 sp ep2", "replay, dp2", "replay, pp2, 3 + 1 layers", "replay, cp2",
    "replay, tp2 sp etp2", "replay, ep2 pp2 vpp2, full", "replay, glm, tp2 sp ep2, full",
}  # fmt: skip
"""Rows that are not left to the slow tests: every axis, kind of model and option, alone and beside others."""
NAMES = slow_unless(IN_EVERY_RUN.__contains__, ROWS)


@functools.cache
def groups():
    """Make groups whose old and reference policies differ from the current one, with routes for rows with replay."""
    made = random_groups(5, num_hard=2, num_mid=4, group_size=4, vocab=131)
    rng, rollout_rng = np.random.default_rng(1), np.random.default_rng(2)
    for sample in (s for g in made for s in g if s.old_logp is not None):
        near = np.float32(-4.9) + rng.normal(0, 0.5, sample.num_response_tokens).astype(np.float32)
        sample.old_logp = near
        sample.ref_logp = near + rng.normal(0, 0.3, len(near)).astype(np.float32)
        sample.rollout_logp = near + rollout_rng.normal(0, 0.4, len(near)).astype(np.float32)
        sample.routes = random_routes(
            sample, layers=4, per_token=2, num_experts=4, seed=100 * sample.order + sample.member
        )
    return made


def groups_of(row):
    """Return the groups with the routes that the row's passes read."""
    return [[s if row.replay else dataclasses.replace(s, routes=None) for s in group] for group in groups()]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    made = {kind: OTHER_SIZES.get(kind, (kind, {})) for kind in {row.kind for row in ROWS.values()}}
    return {name: str(make_hf_model(kind, root / name, **sizes)) for name, (kind, sizes) in made.items()}


@pytest.fixture(scope="module")
def seen(paths, request):
    """Return row → its ranks' results; the processes of a world size start once for all its rows."""
    chosen = {
        item.callspec.params["name"] for item in request.session.items if "name" in getattr(item, "fixturenames", ())
    }

    @functools.cache
    def world(ranks):
        rows = {name: row for name, row in ROWS.items() if row.ranks == ranks and name in chosen}
        # A store keeps the addresses of the groups of one row.
        stores = [dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in rows]
        ports = [store.port for store in stores]
        try:
            return run_ranks(ranks, rank_rows, rows, ports, paths, groups(), OBJECTIVES, deadline_s=500)
        except RankError as error:  # kept, so that the other rows do not start the processes again
            return error

    def of_row(name):
        outcome = world(ROWS[name].ranks)
        if isinstance(outcome, RankError):
            raise outcome
        return [by_row[name] for by_row in outcome]

    return of_row


@functools.cache
def _literal(path, objective, replay):
    return literal_gradients(path, groups_of(Row(ranks=1, replay=replay)), OBJECTIVES[objective])[1]


def literal(path, objective, replay=False):
    return _literal(path, objective, replay)


@functools.cache
def literal_logps(path, replay):
    return literal_logprobs(path, groups_of(Row(ranks=1, replay=replay)))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_the_whole_objective_equals_the_literal_one(name, seen, paths):
    row, ranks = ROWS[name], seen(name)
    for index, (objective, _) in enumerate(row.passes):
        expected = literal(paths[row.kind], objective, row.replay)
        ours = {key: grad for rank in ranks for key, grad in rank.gradients[index].items()}
        assert ours.keys() == expected.keys()
        for key, reference in expected.items():
            error = np.abs(ours[key] - reference).max() / np.abs(reference).max()
            assert error <= 1e-5, f"{key}, pass {row.passes[index]}: {error:.1e}"
    norm = np.sqrt(sum((grad**2).sum() for grad in literal(paths[row.kind], row.passes[-1][0], row.replay).values()))
    assert [rank.grad_norm for rank in ranks] == pytest.approx([norm] * row.ranks, rel=1e-5)


@pytest.mark.parametrize("option", range(len(BY_SEQUENCE)))
def test_each_option_that_looks_at_sequences_changes_the_literal_gradient(option, paths):
    """Otherwise the option's rows would test nothing."""
    plain, other = (literal(paths["qwen3"], index) for index in (MEAN, WHOLE[option][0]))
    assert max(np.abs(other[key] - grad).max() / np.abs(grad).max() for key, grad in plain.items()) > 1e-2


def test_routes_change_the_literal_gradient(paths):
    """Otherwise the rows with replay would test nothing."""
    plain, other = (literal(paths["qwen3_moe"], SUM, replay) for replay in (False, True))
    assert max(np.abs(other[key] - grad).max() / np.abs(grad).max() for key, grad in plain.items()) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_log_probs_and_statistics_count_each_token_once(name, seen, paths):
    row, ranks = ROWS[name], seen(name)
    expected = literal_logps(paths[row.kind], row.replay)
    ours = {key: logp for rank in ranks for key, logp in rank.logprobs.items()}
    assert ours.keys() == expected.keys()
    for key, logp in expected.items():
        np.testing.assert_allclose(ours[key], logp, atol=2e-5, err_msg=str(key))
    traces = [(s.order, s.member) for g in groups() for s in g if s.treatment is Treatment.DISTILL]
    rollouts = [s for g in groups() for s in g if s.treatment is Treatment.REINFORCE]
    sums_of_passes = (
        (index, sums) for rank in ranks for (index, _), sums in zip(row.passes, rank.statistics, strict=True)
    )
    for objective, sums in sums_of_passes:
        bounds = dataclasses.replace(OBJECTIVES[objective].importance, token_bounds=None)
        masked = sum(not any(is_trusted(s, bounds)) for s in rollouts)
        assert sums["rollouts"] == pytest.approx(len(rollouts))
        assert sums["rollouts_masked"] == pytest.approx(masked)
        assert sums["tokens"] == sum(map(len, expected.values()))
        trace_nll = -sum(expected[key].sum() for key in traces)
        assert sums["trace_nll"] == pytest.approx(trace_nll, rel=1e-6)
