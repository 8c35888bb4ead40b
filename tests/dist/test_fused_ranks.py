"""Fused log-probs over two tensor-parallel ranks, alone and after Megatron's models, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.support.dist.spawn import join_world, run_ranks
from tests.support.hf_models import make_hf_model
from tests.support.present import present

NUM_ROWS, HIDDEN, VOCAB = 9, 16, 21
BUDGETS = (1, 4 * 11 * 4, 2**20)
"""Memory budgets for chunks of one row, of a few rows, of all rows."""


def inputs(name: str) -> tuple[torch.Tensor, ...]:
    """Return hidden states, the whole padded weight, targets, and coefficients of log-probs and of entropies."""
    g = torch.Generator().manual_seed(0)
    targets, coef = torch.randint(0, VOCAB, (NUM_ROWS,), generator=g), torch.randn(2, NUM_ROWS, generator=g)
    if name == "huge":
        return (torch.rand(NUM_ROWS, 22, generator=g) - 0.5) * 2e4, torch.eye(22), targets, coef
    if name == "one rank has all the probability":
        return torch.eye(22)[:NUM_ROWS] * 1e4, torch.eye(22), targets, coef
    weight = torch.randn(22, HIDDEN, generator=g)
    if name == "bf16 weight":
        weight = weight.bfloat16()
    num_rows = 0 if name == "no rows" else NUM_ROWS
    return torch.randn(num_rows, HIDDEN, generator=g), weight, targets[:num_rows], coef[:, :num_rows]


CASES = ("random", "huge", "one rank has all the probability", "bf16 weight", "no rows")


def rank_results(cases: tuple[str, ...]) -> dict:
    """Return (case, budget) → log-probs, entropy, the hidden states' gradient, this rank's gradient of the weight."""
    import torch.distributed as dist

    from megatron_dypo.objective.fused_logprobs import fused_logprobs

    join_world()
    group, rank = dist.group.WORLD, dist.get_rank()
    results = {}
    for name in cases:
        for budget in BUDGETS:
            hidden, weight, targets, coef = inputs(name)
            weight = weight.chunk(2)[rank].clone().requires_grad_()
            hidden.requires_grad_()
            logp, entropy = fused_logprobs(
                hidden, weight, targets, vocab_size=VOCAB, group=group, temperature=0.8, memory_budget=budget
            )
            (logp * coef[0] + present(entropy) * coef[1]).sum().backward()
            dist.all_reduce(hidden.grad)
            tensors = (logp, entropy, hidden.grad, weight.grad)
            results[name, budget] = [present(t).detach().float().numpy() for t in tensors]
    dist.destroy_process_group()
    return results


def reference(name: str) -> list[np.ndarray]:
    hidden, weight, targets, coef = inputs(name)
    hidden, weight = (t.double().requires_grad_() for t in (hidden, weight))
    logp_NV = (hidden @ weight[:VOCAB].t() / 0.8).log_softmax(dim=-1)
    logp = logp_NV.gather(1, targets[:, None])[:, 0]
    entropy = -(logp_NV.exp() * logp_NV).sum(-1)
    (logp * coef[0].double() + entropy * coef[1].double()).sum().backward()
    return [present(t).detach().numpy() for t in (logp, entropy, hidden.grad, weight.grad)]


def test_two_ranks_give_the_log_probs_entropy_and_gradients_of_one() -> None:
    per_rank = run_ranks(2, rank_results, CASES)
    for name in CASES:
        expected = reference(name)
        for budget in BUDGETS:
            ranks = [results[name, budget] for results in per_rank]
            halves = np.concatenate([rank[3] for rank in ranks])
            for rank in ranks:
                for ours, theirs in zip(rank[:2], expected[:2], strict=True):
                    scale = max(1.0, np.abs(theirs).max(initial=0.0))
                    assert np.abs(ours - theirs).max(initial=0.0) <= 1e-6 * scale, (name, budget)
            for ours, theirs, of_weight in ((ranks[0][2], expected[2], False), (halves, expected[3], True)):
                bar = 2**-8 if of_weight and name == "bf16 weight" else 1e-5
                assert np.abs(ours - theirs).max(initial=0.0) <= bar * np.abs(theirs).max(initial=0.0), (name, budget)


def rank_refusal() -> str:
    import torch.distributed as dist

    from megatron_dypo.objective.fused_logprobs import fused_logprobs

    join_world()
    with pytest.raises(ValueError, match="vocab_size=2") as error:
        fused_logprobs(torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([0]), vocab_size=2, group=dist.group.WORLD)
    dist.destroy_process_group()
    return str(error.value)


def test_a_rank_of_padding_only_is_refused_on_all_ranks() -> None:
    assert len(set(run_ranks(2, rank_refusal))) == 1


ONE_TOKEN = 1e-6
"""MiB that not even one token's logits fit into: tokens are then processed one by one."""
LENGTHS = (5, 14, 3)
RESPONSE = (2, 3, 8, 9, 10, 18, 20)


def rank_model(path: str, axes: dict[str, Any], dtype: Any, logprob_memory_mib: float | None) -> dict | None:
    """Return this rank's main gradients after two backward passes through log-probs, then through whole logits."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.attention import packed_seq_params
    from megatron_dypo.mcore.chunks import main_grad, named_global_parameters
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    arch, model = load_architecture(path), ModelConfig(hf_path=path, dtype=dtype, logprob_memory_mib=logprob_memory_mib)
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 131, size=sum(LENGTHS)))[None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    boundaries = torch.tensor(np.cumsum([0, *LENGTHS]))
    response = torch.tensor(RESPONSE)
    targets = tokens[0].roll(-1)[response]

    def forward(iterator, chunk, *, fused):
        asked = {"labels": targets, "loss_mask": response} if next(iterator) and fused else {}
        output = chunk(tokens, positions, None, packed_seq_params=packed_seq_params(boundaries), **asked)

        def loss(output):
            logp = output[0] if fused else _naive(output[0].index_select(0, response), targets, arch.vocab_size, layout)
            return -logp.sum(), torch.tensor(1, dtype=torch.int), logp.detach().clone()

        return output, loss

    results = {}
    for fused in (True, False):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        reports = get_forward_backward_func()(
            forward_step_func=lambda *args, fused=fused: forward(*args, fused=fused),
            data_iterator=[iter([True, True]) for _ in chunks],
            model=chunks,
            num_microbatches=2,
            seq_length=sum(LENGTHS),
            micro_batch_size=1,
            forward_only=False,
        )
        grads = {name: main_grad(p).float().numpy().copy() for name, p in named_global_parameters(chunks)}
        results[fused] = grads | {"logp": np.stack([r.numpy() for r in reports])} if reports else grads
    close(layout)
    return results


def _naive(logits_NV, targets_N, vocab_size, layout):
    """Gather all ranks' logits with their gradients, then apply log_softmax."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    whole = gather_from_tensor_model_parallel_region(logits_NV, group=layout.tp_group)[:, :vocab_size]
    return whole.double().log_softmax(dim=-1).gather(1, targets_N[:, None])[:, 0].float()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("hf")
    return {kind: str(make_hf_model(kind, root / kind)) for kind in ("qwen3", "llama_tied")}


@pytest.mark.parametrize(
    ("kind", "world_size", "axes", "dtype", "memory_mb"),
    [
        ("llama_tied", 1, {}, "float32", None),
        ("llama_tied", 1, {}, "float32", ONE_TOKEN),
        ("qwen3", 1, {}, "bfloat16", None),
        ("qwen3", 2, {"tensor": 2}, "float32", None),
        ("qwen3", 2, {"tensor": 2}, "float32", ONE_TOKEN),
        ("llama_tied", 2, {"tensor": 2, "sequence": True}, "float32", None),
        ("llama_tied", 2, {"pipeline": 2}, "float32", None),
    ],
)
def test_models_get_the_gradients_of_their_whole_logits(kind, world_size, axes, dtype, memory_mb, paths) -> None:
    for results in run_ranks(world_size, rank_model, paths[kind], axes, dtype, memory_mb):
        ours, expected = results[True], results[False]
        assert ours.keys() == expected.keys()
        bar = 1e-5 if dtype == "float32" else 4e-2  # whole logits are rounded to bf16, those of the fused pass are not
        for name, theirs in expected.items():
            assert np.abs(theirs).max() > 0, name
            assert np.abs(ours[name] - theirs).max() <= bar * np.abs(theirs).max(), name


MANY, WIDE = 512, 32768
LOGITS_MB = MANY * WIDE * 4 / 2**20


def rank_peaks(path: str, budgets_mb: tuple[float, ...]) -> list[float]:
    """Return the peak MiB of a forward and a backward pass under each budget for logits."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.attention import packed_seq_params
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.parallel.groups import close

    layout, arch, peaks = start_megatron(ParallelConfig()), load_architecture(path), []
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, WIDE, size=MANY))[None]
    positions, boundaries = torch.arange(MANY)[None] % 16, torch.arange(0, MANY + 1, 16)
    for budget_mb in budgets_mb:
        model = ModelConfig(hf_path=path, dtype="float32", logprob_memory_mib=budget_mb)
        chunks = build_model(arch, model, ParallelConfig(), layout)
        load_initial_weights(chunks, model, arch, layout)
        asked = {"labels": tokens[0].roll(-1), "loss_mask": torch.arange(MANY)}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            logp_N, _ = chunks[0](tokens, positions, None, packed_seq_params=packed_seq_params(boundaries), **asked)
            logp_N.sum().backward()
        events = profile.profiler.kineto_results.events()
        sizes = np.cumsum([event.nbytes() for event in events if event.name() == "[memory]"])
        peaks.append(float(sizes.max()) / 2**20)
    close(layout)
    return peaks


def test_the_budget_of_the_config_bounds_the_logits_of_a_model(tmp_path) -> None:
    path = str(make_hf_model("qwen3", tmp_path / "wide", vocab_size=WIDE, num_hidden_layers=1))
    small_mb, large_mb = 4, 2 * LOGITS_MB
    ((small, large),) = run_ranks(1, rank_peaks, path, (small_mb, large_mb))
    assert large > LOGITS_MB
    assert large - small >= LOGITS_MB - small_mb
