"""Scores of trajectories in every layout: against float64 gradients of transformers, and against one process."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.probe.gradients import Setting, make_groups, prompt_gradients
from megatron_dypo.probe.scores import Scores
from megatron_dypo.types import Floats
from tests.support.dist.literal_objective import float64_model, hf_gradients
from tests.support.dist.score_ranks import Row, Seen, rank_scores, rank_update
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model
from tests.support.objective_cases import random_groups

TP, PP, SP = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "sequence": True}
VPP, EP = PP | {"virtual_pipeline": 2}, {"expert": 2}
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
ROWS: dict[int, dict[str, Row]] = {
    1: {
        "one process": Row(),
        "one process, tied": Row(kind="llama_tied", recompute="full"),
        "experts, one process": Row(kind="qwen3_moe"),
    },
    2: {
        "tp2": Row(axes=TP),
        "tp2 sp": Row(axes=SP),
        "pp2": Row(axes=PP),
        "pp2 vpp2, tied": Row(axes=VPP, kind="llama_tied"),
        "dp2": Row(),
        "dp2, sharded, overlap, tied": Row(kind="llama_tied", options=SHARDED),
        "cp2": Row(axes={"context": 2}),
        "experts, ep2": Row(axes=EP, kind="qwen3_moe"),
        "experts, tp2 sp ep2": Row(axes=SP | EP, kind="qwen3_moe"),
        "experts, tp2 sp": Row(axes=SP, kind="qwen3_moe"),
        "experts, etp2": Row(axes={"expert_tensor": 2}, kind="qwen3_moe"),
        "experts, tp2 sp etp2": Row(axes=SP | {"expert_tensor": 2}, kind="qwen3_moe"),
    },
    4: {
        "tp2 sp pp2 vpp2, tied": Row(axes=SP | VPP, kind="llama_tied"),
        "tp2 dp2": Row(axes=TP),
        "experts, ep2 pp2": Row(axes=EP | PP, kind="qwen3_moe"),
        "experts, tp2 sp ep2 dp2": Row(axes=SP | EP, kind="qwen3_moe"),
        "experts, ep2 dp4": Row(axes=EP, kind="qwen3_moe"),
    },
}
SAMPLES = [sample for group in random_groups(5, num_hard=2, num_mid=1) for sample in group]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    kinds = {row.kind for rows in ROWS.values() for row in rows.values()}
    return {kind: str(make_hf_model(kind, tmp_path_factory.mktemp(kind))) for kind in kinds}


@pytest.fixture(scope="module")
def seen_by(paths: dict[str, str]) -> functools.partial[dict[str, list[Seen]]]:
    return functools.partial(_seen, paths=paths, cache={})


def _seen(world_size: int, paths: dict[str, str], cache: dict[int, dict[str, list[Seen]]]) -> dict[str, list[Seen]]:
    if world_size not in cache:
        rows = ROWS[world_size]
        stores = [dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in rows]
        ranks = run_ranks(world_size, rank_scores, rows, [store.port for store in stores], paths, SAMPLES)
        cache[world_size] = {name: [seen[name] for seen in ranks] for name in rows}
    return cache[world_size]


@functools.cache
def literal_scores(path: str) -> list[Floats]:
    """Return each sample's ∇ Σ log π, all HF tensors in the order of the family's table, from float64 autograd."""
    model, arch = float64_model(path), load_architecture(path)
    names = list(dict.fromkeys(name for row in family_rows(arch) for name in row.hf))
    scores = []
    for sample in SAMPLES:
        model.zero_grad()
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        logp_V = model(tokens).logits[0, sample.num_prompt_tokens - 1 : -1].log_softmax(-1)
        logp_V.gather(1, tokens[0, sample.num_prompt_tokens :, None]).sum().backward()
        gradients = hf_gradients(model)
        scores.append(np.concatenate([gradients[name].ravel() for name in names]))
    return scores


def merged(ranks: list[Seen], attribute: str) -> list[Floats]:
    """Return the scores of all samples, by index; a sample that several leaders scored is equal on all."""
    found: dict[int, Floats] = {}
    for rank in ranks:
        for index, score in getattr(rank, attribute).items():
            assert index not in found or np.array_equal(found[index], score)
            found[index] = score
    return [found[index] for index in range(len(SAMPLES))]


@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size, rows in ROWS.items() for name in rows])
def test_scores_are_the_gradients_of_whole_log_probs_in_every_layout(world_size, name, seen_by, paths) -> None:
    kind = ROWS[world_size][name].kind
    ranks = seen_by(world_size)[name]
    for ours, theirs in zip(merged(ranks, "whole"), literal_scores(paths[kind]), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), name
    one = next(row for row, of in ROWS[1].items() if of.kind == kind)
    alone = merged(seen_by(1)[one], "projected")
    for ours, theirs in zip(merged(ranks, "projected"), alone, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), name


@pytest.mark.parametrize("normalization", ["sum", "sequence_mean", "token_mean", "constant"])
def test_the_gradient_of_a_first_update_is_the_sum_of_scores_with_the_probes_weights(normalization, paths) -> None:
    groups = random_groups(7, num_hard=0, num_mid=4)
    cfg = ObjectiveConfig(alpha=0.3, length_normalization=normalization, constant_length=7)
    ((update, scores, ratios),) = run_ranks(1, rank_update, paths["qwen3"], groups, cfg)
    samples = [sample for group in groups for sample in group]
    measured = Scores(
        score_Nd=np.stack(scores),
        prompt_N=np.repeat(np.arange(4), 4),
        repeat_N=np.zeros(16, np.int64),
        teacher_N=np.full(16, -1),
        is_correct_N=np.array([sample.is_correct for sample in samples]),
        reward_N=np.array([sample.reward for sample in samples]),
        length_N=np.array([sample.num_response_tokens for sample in samples]),
        log_ratio_N={"old": np.zeros(16), "frozen": np.array(ratios)},
        prompt_ids=("a", "b", "c", "d"),
        teachers=(),
        step=0,
    )
    setting = Setting(group_size=4, length_normalization=normalization, constant_length=7)
    found = prompt_gradients(measured, make_groups(measured, setting))
    mix = sum(0.3 * one.grpo_Rd[0] + 0.7 * one.gal_Rd[0] for one in found) / 4
    assert np.linalg.norm(mix - update) <= 1e-5 * np.linalg.norm(update)
