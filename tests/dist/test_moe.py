"""A mixture of experts in every layout: logits, scores, and the load-balancing loss.

The gradient of the whole objective is checked by the rows of ``test_layouts.py`` that are named after experts.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.batching.pack import alignment, microbatch_length, pack, padded_lengths, sequence_alignment
from megatron_dypo.batching.zigzag import shard
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.objective.recipes.registry import build_objective
from tests.support.dist.literal_objective import float64_model, hf_gradients, response_logp
from tests.support.dist.logits import rank_logits, rows
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import MOE_KINDS, import_transformers, make_hf_model
from tests.support.objective_cases import random_groups
from tests.support.slow import slow_unless

SP = {"tensor": 2, "sequence": True}
LAYOUTS = {
    "one process": (1, {}),
    "ep2": (2, {"expert": 2}),
    "dp2": (2, {}),
    "tp2 sp": (2, SP),
    "tp2 sp ep2": (2, {**SP, "expert": 2}),
    "tp2 sp etp2": (2, {**SP, "expert_tensor": 2}),
    "ep2 etp2 dp4": (4, {"expert": 2, "expert_tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "ep2 pp2": (4, {"expert": 2, "pipeline": 2}),
    "ep2 pp2 vpp2": (4, {"expert": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "ep2 dp4": (4, {"expert": 2}),
    "tp2 sp ep4": (4, {**SP, "expert": 4}),
    "cp2 ep2": (2, {"context": 2, "expert": 2}),
    "tp2 sp cp2": (4, {**SP, "context": 2}),
}
IN_EVERY_RUN = {"one process", "tp2 sp ep2", "tp2 sp etp2", "ep2 pp2", "ep2 pp2 vpp2", "cp2 ep2"}
"""Layouts that are not left to the slow tests."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("moe")


@pytest.mark.parametrize(
    "layout",
    slow_unless(IN_EVERY_RUN.__contains__, ["one process", "ep2", "tp2 sp ep2", "tp2 sp etp2", "pp2", "ep2 pp2 vpp2"]),
)
def test_logits_equal_transformers(layout, root):
    world_size, axes = LAYOUTS[layout]
    kinds = [kind for kind in MOE_KINDS if kind != "gpt_oss" or "expert_tensor" not in axes]  # it refuses split experts
    paths, expected = zip(*(_model_and_logits(kind, root) for kind in kinds), strict=True)
    for result in filter(None, run_ranks(world_size, rank_logits, list(paths), axes)):
        for kind, ours, theirs in zip(kinds, result, expected, strict=True):
            for row, expected_row in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(row, expected_row, atol=1e-4, rtol=0, err_msg=kind)


@functools.cache
def _model_and_logits(kind, root):
    path = make_hf_model(kind, root / "logits" / kind)
    oracle = import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return str(path), [
            np.concatenate([oracle(torch.tensor(s)[None]).logits[0].numpy() for s in row]) for row in rows()
        ]


@functools.cache
def _path(root):
    return str(make_hf_model("qwen3_moe", root / "experts"))


def rank_scores(path, axes, samples):
    """Return the log-probs of the samples, all of which the first replica holds."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.logprobs import sequence_logprobs
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    arch, model = load_architecture(path), ModelConfig(hf_path=path, dtype="float32")
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    mine = samples if layout.dp_rank == 0 else []
    scores = sequence_logprobs(chunks, mine, layout=layout, budget=40)
    close(layout)
    return scores


@pytest.mark.parametrize("axis", ["expert", pytest.param("expert_tensor", marks=pytest.mark.slow)])
def test_a_replica_without_samples_lends_its_experts_to_the_scoring_of_others(axis, root):
    path, samples = _path(root), random_groups(5, vocab=131)[-1]
    model = float64_model(path)
    leader, other_leader, *rest = run_ranks(4, rank_scores, path, {axis: 2, "pipeline": 2}, samples)
    assert (other_leader, rest) == ([], [None, None])
    with torch.no_grad():
        for ours, sample in zip(leader, samples, strict=True):
            np.testing.assert_allclose(ours, response_logp(model, sample), atol=1e-5, rtol=0)


AUX_LOSS_COEF = 0.7
MEMBERS = ((0, 1, 2, 3), (4, 5), (6,), ())
"""Samples of each microbatch. All are padded to the fullest; the last is nothing but padding."""


def balance_samples():
    return [sample for group in random_groups(3, num_hard=7, num_mid=0, vocab=131, max_response=30) for sample in group]


def rank_balance_gradients(path, axes):
    """Return the gradients of the load-balancing loss alone (all token weights are zero), their norm, the metric."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.config.training import OptimizerConfig
    from megatron_dypo.mcore.chunks import main_grad, named_global_parameters
    from megatron_dypo.mcore.forward_step import loss_pass
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.moe_router import balance_metrics
    from megatron_dypo.mcore.optimizer import build_optimizer
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.models.gather import iter_hf_tensors, sent_params
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    arch = load_architecture(path)
    model = ModelConfig(
        hf_path=path, dtype="float32", moe_aux_loss_coef=AUX_LOSS_COEF, recompute=RECOMPUTE[layout.pipeline]
    )
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    optimizer = build_optimizer(chunks, OptimizerConfig(lr=1e-3, eps=1.0), dtype="float32", total_steps=1)
    samples = balance_samples()
    per_sequence = sequence_alignment(layout.context)
    length = microbatch_length(
        padded_lengths(samples, per_sequence), MEMBERS, 2 * alignment(layout.tensor, layout.context)
    )
    mine = [pack(samples, members, length, per_sequence) for members in MEMBERS[layout.dp_rank :: layout.data]]
    optimizer.zero_grad()
    loss_pass(
        chunks,
        [shard(row, layout.cp_rank, layout.context) for row in mine],
        objective=build_objective(ObjectiveConfig()),
    )
    grads = sent_params([(name, main_grad(p)) for name, p in named_global_parameters(chunks)], arch, layout)
    tensors = iter_hf_tensors(grads, arch, layout)
    results = {name: tensor.numpy().copy() for name, tensor in tensors}
    norm = optimizer.step().grad_norm
    balance = balance_metrics(chunks)["train/load_balancing_loss"]
    close(layout)
    return results, norm, balance


RECOMPUTE: dict[int, Any] = {1: "none", 2: "full"}
"""Pipeline size → recomputation, which must not count the loss twice."""


@functools.cache
def _literal_balance_gradients(path):
    """Compute coefficient·Σ_layers Σ_microbatches (n/N)·E Σ_e f_e P_e in float64: gradient, norm, mean over layers."""
    model = float64_model(path)
    samples = balance_samples()
    config, total = model.config, torch.zeros((), dtype=torch.float64)
    num_tokens = sum(len(s.tokens) for s in samples)
    for members in filter(None, MEMBERS):
        by_sample = []
        for index in members:
            tokens = torch.tensor(samples[index].tokens.astype("int64"))[None]
            by_sample.append(model(tokens, output_router_logits=True).router_logits)
        for layer in range(config.num_hidden_layers):
            logits_TE = torch.cat([logits[layer] for logits in by_sample])
            mean_E = torch.softmax(logits_TE, dim=-1).mean(dim=0)
            chosen = logits_TE.topk(config.num_experts_per_tok).indices.flatten()
            share_E = torch.bincount(chosen, minlength=len(mean_E)).double() / len(chosen)
            balance = len(mean_E) * (share_E * mean_E).sum()
            total = total + AUX_LOSS_COEF * len(logits_TE) / num_tokens * balance
    # The last layer's experts, and everything after them, have no gradient.
    (total + 0.0 * sum(p.sum() for p in model.parameters())).backward()
    gradients = hf_gradients(model)
    norm = math.sqrt(sum((grad**2).sum() for grad in gradients.values()))
    return gradients, norm, total.item() / AUX_LOSS_COEF / config.num_hidden_layers


BALANCED = (
    "one process", "dp2", "ep2", "tp2 sp", "tp2 sp ep2", "tp2 sp etp2", "ep2 etp2 dp4", "ep2 pp2", "ep2 dp4", "cp2 ep2",
    "tp2 sp cp2",
)  # fmt: skip


@pytest.mark.parametrize("layout", slow_unless(IN_EVERY_RUN.__contains__, BALANCED))
def test_load_balancing_loss_is_a_mean_over_real_tokens_in_every_layout(layout, root):
    world_size, axes = LAYOUTS[layout]
    path = _path(root)
    expected, expected_norm, expected_balance = _literal_balance_gradients(path)
    results = run_ranks(world_size, rank_balance_gradients, path, axes)
    ours = {name: grad for grads, _, _ in results for name, grad in grads.items()}
    assert ours.keys() == expected.keys()
    assert np.abs(expected["model.layers.3.mlp.gate.weight"]).max() > 1e-4
    for name, reference in expected.items():
        scale = max(np.abs(reference).max(), 1e-6)
        assert np.abs(ours[name] - reference).max() / scale <= 1e-5, name
    for _, norm, balance in results:
        assert norm == pytest.approx(expected_norm, rel=1e-5)
        assert balance == pytest.approx(expected_balance, rel=1e-6)
