"""Scores of trajectories in every layout: against float64 gradients of transformers, and against one process.

The estimates of a probe too, from the scores of each layout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.probe.gradients import Setting, make_groups, prompt_gradients
from megatron_dypo.probe.result import analyse
from megatron_dypo.probe.scores import Scores
from megatron_dypo.types import Floats, Sample
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
        "one process": Row(is_probed=True),
        "one process, tied": Row(kind="llama_tied", recompute="full"),
        "experts, one process": Row(kind="qwen3_moe"),
    },
    2: {
        "tp2": Row(axes=TP, is_probed=True),
        "tp2 sp": Row(axes=SP),
        "pp2": Row(axes=PP, is_probed=True),
        "pp2 vpp2, tied": Row(axes=VPP, kind="llama_tied"),
        "dp2": Row(is_probed=True),
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
PROMPTS, REPEATS, MEMBERS, TEACHERS = 5, 2, 3, 2
"""Sizes of a probe."""
TRACES, GROUPS = PROMPTS * TEACHERS, PROMPTS * REPEATS
NOT_MID = {0: False, 3: True, 5: False}
"""Group of the probe → the verdict on all its rollouts, so that the gates of Hard and Mid are not 0 or 1."""


def draw_probe() -> list[Sample]:
    """Return the rollouts of a probe, by prompt and group, and then the traces, by prompt and teacher."""
    drawn = random_groups(11, num_hard=TRACES, num_mid=GROUPS, group_size=MEMBERS)
    groups = drawn[TRACES:]
    for index, verdict in NOT_MID.items():
        groups[index] = [replace(sample, is_correct=verdict, reward=float(verdict)) for sample in groups[index]]
    return [sample for group in [*groups, *drawn[:TRACES]] for sample in group]


PROBED = draw_probe()


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
        ranks = run_ranks(world_size, rank_scores, rows, [store.port for store in stores], paths, SAMPLES, PROBED)
        cache[world_size] = {name: [seen[name] for seen in ranks] for name in rows}
    return cache[world_size]


@functools.cache
def literal_scores(path: str) -> list[tuple[Floats, float]]:
    """Return ∇ Σ log π and Σ log π of each sample, from float64 autograd.

    The gradient has all HF tensors in the order of the family's table.
    """
    model, arch = float64_model(path), load_architecture(path)
    names = list(dict.fromkeys(name for row in family_rows(arch) for name in row.hf))
    scores = []
    for sample in SAMPLES:
        model.zero_grad()
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
        logp_V = model(tokens).logits[0, sample.num_prompt_tokens - 1 : -1].log_softmax(-1)
        logp = logp_V.gather(1, tokens[0, sample.num_prompt_tokens :, None]).sum()
        logp.backward()
        gradients = hf_gradients(model)
        scores.append((np.concatenate([gradients[name].ravel() for name in names]), float(logp.detach())))
    return scores


def merged(ranks: list[Seen], attribute: str) -> list[Any]:
    """Return the scores of all samples, by index; a sample that several leaders scored is equal on all."""
    found: dict[int, Any] = {}
    for rank in ranks:
        for index, score in getattr(rank, attribute).items():
            assert index not in found or np.array_equal(found[index], score)
            found[index] = score
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize(("world_size", "name"), [(size, name) for size, rows in ROWS.items() for name in rows])
def test_scores_are_the_gradients_of_whole_log_probs_in_every_layout(world_size, name, seen_by, paths) -> None:
    kind = ROWS[world_size][name].kind
    ranks = seen_by(world_size)[name]
    found = zip(merged(ranks, "whole"), merged(ranks, "logp"), literal_scores(paths[kind]), strict=True)
    for ours, logp, (theirs, literal) in found:
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), name
        assert logp == pytest.approx(literal, rel=1e-5), name
    one = next(row for row, of in ROWS[1].items() if of.kind == kind)
    alone = merged(seen_by(1)[one], "projected")
    for ours, theirs in zip(merged(ranks, "projected"), alone, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs), name


def probe_scores(
    samples: Sequence[Sample],
    scores: Sequence[Floats],
    ratios: Sequence[float],
    *,
    prompt_N: Any,
    repeat_N: Any,
    teacher_N: Any = -1,
) -> Scores:
    """Return the data of a probe of these trajectories."""
    size = len(samples)
    return Scores(
        score_Nd=np.stack(scores),
        prompt_N=np.asarray(prompt_N, np.int64),
        repeat_N=np.asarray(repeat_N, np.int64),
        teacher_N=np.broadcast_to(np.asarray(teacher_N, np.int64), size),
        is_correct_N=np.array([sample.is_correct for sample in samples]),
        reward_N=np.array([sample.reward for sample in samples]),
        length_N=np.array([sample.num_response_tokens for sample in samples]),
        log_ratio_N={"old": np.zeros(size), "frozen": np.array(ratios)},
        prompt_ids=tuple(map(str, range(int(np.max(prompt_N)) + 1))),
        teachers=tuple(map(str, range(int(np.max(teacher_N)) + 1))),
        step=0,
    )


def estimates_of(ranks: list[Seen]) -> dict[str, list[float]]:
    """Return every estimate of the probe with its interval, by its place in the result."""
    of_trace = np.arange(TRACES)
    scores = probe_scores(
        PROBED,
        merged(ranks, "probed"),
        merged(ranks, "log_ratio"),
        prompt_N=[*np.repeat(np.arange(PROMPTS), REPEATS * MEMBERS), *(of_trace // TEACHERS)],
        repeat_N=[*np.tile(np.repeat(np.arange(REPEATS), MEMBERS), PROMPTS), *np.full(TRACES, -1)],
        teacher_N=[*np.full(GROUPS * MEMBERS, -1), *(of_trace % TEACHERS)],
    )
    return dict(figures(analyse(scores, Setting(group_size=MEMBERS), 0.5)))


def figures(tree: Any, place: str = "") -> Iterator[tuple[str, list[float]]]:
    """Yield each place of a result with its number, or with its value and the ends of its interval; NaN for None."""
    if isinstance(tree, float | int):
        yield place, [tree]
    elif isinstance(tree, Mapping) and tree.keys() == {"value", "low", "high"}:
        yield place, [math.nan if number is None else number for number in tree.values()]
    elif isinstance(tree, Mapping | list):
        for name, part in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from figures(part, f"{place}.{name}")


@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2"])
def test_estimates_and_intervals_in_a_layout_are_those_of_one_process(name, seen_by) -> None:
    alone, ours = estimates_of(seen_by(1)["one process"]), estimates_of(seen_by(2)[name])
    assert ours.keys() == alone.keys()
    assert alone.keys() >= {f".moments.mid.total.{term}" for term in ("grpo", "gal", "covariance")}
    assert alone.keys() >= {".moments.mid.mix.best_alpha", ".margins.frozen.eta", ".gate.mid_gal.relative_error"}
    for place, numbers in alone.items():
        size = max(map(abs, np.nan_to_num(numbers)))
        assert np.allclose(ours[place], numbers, rtol=0, atol=1e-5 * size, equal_nan=True), f"{name}: {place}"
    known = [place for place, numbers in alone.items() if len(numbers) == 3 and not np.isnan(numbers).any()]
    assert len(known) > 100, "of five prompts nearly every estimate has an interval"


@pytest.mark.parametrize("normalization", ["sum", "sequence_mean", "token_mean", "constant"])
def test_the_gradient_of_a_first_update_is_the_sum_of_scores_with_the_probes_weights(normalization, paths) -> None:
    groups = random_groups(7, num_hard=0, num_mid=4)
    cfg = ObjectiveConfig(alpha=0.3, length_normalization=normalization, constant_length=7)
    ((update, scores, ratios),) = run_ranks(1, rank_update, paths["qwen3"], groups, cfg)
    samples = [sample for group in groups for sample in group]
    measured = probe_scores(samples, scores, ratios, prompt_N=np.repeat(np.arange(4), 4), repeat_N=np.zeros(16))
    setting = Setting(group_size=4, length_normalization=normalization, constant_length=7)
    found = prompt_gradients(measured, make_groups(measured, setting))
    mix = sum(0.3 * one.grpo_Rd[0] + 0.7 * one.gal_Rd[0] for one in found) / 4
    assert np.linalg.norm(mix - update) <= 1e-5 * np.linalg.norm(update)
