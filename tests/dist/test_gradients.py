"""The gradient of the whole objective under every layout against a literal float64 implementation."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from megatron_dypo.config import ObjectiveConfig
from tests.dist.literal_objective import literal_gradients
from tests.dist.spawn import run_ranks
from tests.hf_models import make_hf_model
from tests.unit.objective_cases import random_groups, totals_of

CASES = [
    ObjectiveConfig(length_normalization=mode, constant_length=7, kl_coef=0.1, clip_high=0.28, beta_gal=beta)
    for mode, beta in (("sequence_mean", 1.0), ("sum", 0.3), ("token_mean", 2.0), ("constant", 1.0))
]
MICROBATCHES = (1, 2, 4)


def rank_gradients(path, axes, groups, cases):
    """Gradients by (case, number of microbatches), under HF names, from the ranks that hold them whole."""
    from megatron_dypo.architecture import load_architecture
    from megatron_dypo.config import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.parallel.layout import close, init_layout

    parallel = ParallelConfig(**axes)
    layout = init_layout(parallel)
    arch, model = load_architecture(path), ModelConfig(hf_path=path, dtype="float32", balance_coef=0.0)
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    samples = _scored(chunks, groups, layout, arch)
    step = layout.pipeline if layout.virtual_pipeline > 1 else 1  # the interleaved schedule's granularity
    counts = [count for count in MICROBATCHES if count % step == 0]
    results = {
        (index, count): _gradients(chunks, samples, cfg, count, layout, arch)
        for (index, cfg), count in itertools.product(enumerate(cases), counts)
    }
    close(layout)
    return results if layout.is_sender else None


def _scored(chunks, groups, layout, arch):
    """This leader's groups, GAL's log-probs taken from our own forward-only pass under the current weights."""
    from megatron_dypo.mcore.score import sequence_logprobs

    mine = [g for g in groups if g[0].order % layout.data == layout.dp_rank]
    flat = [s for g in mine for s in g]
    logps = sequence_logprobs(chunks, flat, layout=layout, budget=48)
    if logps is None:
        return None
    scored = iter(
        [
            dataclasses.replace(s, current_logp_sum=float(lp.sum(dtype="float64")))
            for s, lp in zip(flat, logps, strict=True)
        ]
    )
    return [[next(scored) for _ in g] for g in mine], totals_of(groups)


def _gradients(chunks, scored, cfg, count, layout, arch):
    from megatron_dypo.batching.exchange import balance, broadcast_samples
    from megatron_dypo.batching.pack import pack, plan_microbatches, row_length
    from megatron_dypo.mcore.forward_step import loss_pass
    from megatron_dypo.mcore.model import named_global_parameters
    from megatron_dypo.objective.recipes.registry import build_objective
    from megatron_dypo.weights.gather import iter_hf_tensors, sent_params

    samples = None
    if scored is not None:
        groups, totals = scored
        objective = build_objective(cfg)
        weighed = []
        for group in groups:
            weights = objective.weigh(group, totals, 0).weights
            weighed += [dataclasses.replace(s, weights=w) for s, w in zip(group, weights, strict=True)]
        samples = balance(weighed, layout.leaders_group)
    samples = broadcast_samples(samples, layout.replica_group)
    lengths = [len(s.tokens) for s in samples]
    bins = plan_microbatches(lengths, budget=10_000, count=count)
    rows = [pack(samples, members, row_length(lengths, [members], layout.tensor)) for members in bins]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    loss_pass(chunks, rows, cfg=cfg)
    grads = sent_params([(name, p.main_grad) for name, p in named_global_parameters(chunks)], arch, layout)
    tensors = iter_hf_tensors(grads, arch, layout.tp_rank, layout.tensor, layout.tp_group)
    return {name: tensor.numpy().copy() for name, tensor in tensors}


@functools.cache
def case(kind, root):
    """Model folder, groups whose old and reference policies differ from the current one, expected gradients."""
    path = make_hf_model(kind, root / kind)
    groups = random_groups(5, num_hard=2, num_mid=4, group_size=4, vocab=131)
    rng = np.random.default_rng(1)
    for sample in (s for g in groups for s in g if s.old_logp is not None):
        near = np.float32(-4.9) + rng.normal(0, 0.5, sample.num_response_tokens).astype(np.float32)
        sample.old_logp = near
        sample.ref_logp = near + rng.normal(0, 0.3, len(near)).astype(np.float32)
    return str(path), groups, [literal_gradients(path, groups, cfg)[1] for cfg in CASES]


LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2 sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp2 dp2": (4, {"tensor": 2}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("gradients")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("qwen3", layout) for layout in LAYOUTS),
        ("llama_tied", "pp2 vpp2"),
        ("llama_tied", "tp2 pp2"),
        ("qwen2", "tp2 pp2"),
    ],
)
def test_gradient_of_the_whole_objective_equals_the_literal_one(kind, layout, root):
    path, groups, expected = case(kind, root)
    world_size, axes = LAYOUTS[layout]
    results = [r for r in run_ranks(world_size, rank_gradients, path, axes, groups, CASES) if r is not None]
    check_gradients(results, expected)


def check_gradients(results, expected):
    """Each parameter's gradient came from one rank, and is the expected one."""
    for key in results[0]:
        ours = {name: grad for rank in results for name, grad in rank[key].items()}
        assert len(ours) == sum(len(rank[key]) for rank in results)
        assert ours.keys() == expected[key[0]].keys()
        for name, reference in expected[key[0]].items():
            error = np.abs(ours[name] - reference).max() / np.abs(reference).max()
            assert error <= 1e-5, (
                f"{name}, case {CASES[key[0]].length_normalization}, {key[1]} microbatches: {error:.1e}"
            )
