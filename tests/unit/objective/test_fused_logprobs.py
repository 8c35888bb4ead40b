"""Fused log-probs against float64 ``log_softmax`` of whole logits, in one process."""

import numpy as np
import pytest
import torch

from megatron_dypo.objective import fused_logprobs as fused
from megatron_dypo.objective.exponentials import TorchExponentials
from megatron_dypo.objective.fused_logprobs import GradientSink, automatic_budget, fused_logprobs
from tests.support.fused_cases import (
    CASES,
    EVERYTHING,
    HIDDEN,
    ONE_ROW,
    THREE_ROWS,
    gradient_error,
    logits_as_hidden,
    projected,
    reference,
    relative_error,
    weighted_sum,
)


class AllForLogits(TorchExponentials):
    def num_logits(self, memory_budget):
        return memory_budget // 4


def run(hidden_NH, weight_VH, targets_N, coef_N, entropy_coef_N=None, **options):
    hidden, weight = hidden_NH.detach().requires_grad_(), weight_VH.detach().requires_grad_()
    logp_N, entropy_N = fused_logprobs(hidden, weight, targets_N, **options)
    weighted_sum(logp_N, coef_N, entropy_N, entropy_coef_N).backward()
    return logp_N.detach(), entropy_N.detach() if entropy_N is not None else None, hidden.grad, weight.grad


@pytest.mark.parametrize("name", CASES)
def test_the_logits_of_every_case_are_exact_in_fp32(name):
    """Then the bounds below are about the code's own sums: logarithm, exponentials and the entropy's two sums."""
    hidden, weight = CASES[name](torch.Generator().manual_seed(0))
    logits = hidden.double() @ weight.double().t()
    for order in (torch.arange(weight.shape[1]), torch.arange(weight.shape[1]).flip(0)):
        assert torch.equal((hidden[:, order] @ weight[:, order].t()).double(), logits)


@pytest.mark.parametrize("budget", [ONE_ROW, THREE_ROWS, EVERYTHING])
@pytest.mark.parametrize("vocab_size", [16, 13])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_float64_log_softmax(name, vocab_size, budget):
    g = torch.Generator().manual_seed(0)
    hidden, weight = CASES[name](g)
    targets = torch.randint(0, vocab_size, (len(hidden),), generator=g)
    coef = torch.randn(len(hidden), generator=g)
    expected = reference(hidden, weight, targets, coef, vocab_size)
    logp, entropy, hidden_grad, weight_grad = run(
        hidden, weight, targets, coef, vocab_size=vocab_size, memory_budget=budget
    )
    assert logp.dtype == entropy.dtype == torch.float32
    assert relative_error(logp, expected[0]) <= 1e-6
    assert relative_error(entropy, expected[1]) <= 1e-6
    assert gradient_error(hidden_grad, expected[2]) <= 1e-5
    assert gradient_error(weight_grad, expected[3]) <= 1e-5
    assert (weight_grad[vocab_size:] == 0).all()


@pytest.mark.parametrize("budget", [ONE_ROW, THREE_ROWS, EVERYTHING])
@pytest.mark.parametrize("vocab_size", [16, 13])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_logp", [True, False])
def test_gradients_of_an_entropy_bonus_equal_those_of_float64(with_logp, name, vocab_size, budget):
    g = torch.Generator().manual_seed(9)
    hidden, weight = CASES[name](g)
    targets = torch.randint(0, vocab_size, (len(hidden),), generator=g)
    coef, bonus = torch.randn(2, len(hidden), generator=g)
    if not with_logp:
        coef = torch.zeros(len(hidden))
    expected = reference(hidden, weight, targets, coef, vocab_size, 0.5, bonus)
    _, _, hidden_grad, weight_grad = run(
        hidden, weight, targets, coef, bonus, vocab_size=vocab_size, memory_budget=budget, temperature=0.5
    )
    for ours, exact in ((hidden_grad, expected[2]), (weight_grad, expected[3])):
        # A saturated softmax has no gradient of its entropy; the float64 reference has rounding errors there.
        largest = max(float(exact.abs().max()), 1e-6)
        assert float((ours.double() - exact).abs().max()) <= 1e-5 * largest
    assert (weight_grad[vocab_size:] == 0).all()


def test_entropy_alone_has_a_gradient_too_and_a_second_pass_gives_it_again():
    g = torch.Generator().manual_seed(10)
    hidden, weight = projected(g)
    weight.requires_grad_()
    _, entropy = fused_logprobs(hidden, weight, torch.arange(7), vocab_size=16, memory_budget=THREE_ROWS)
    first, second = (torch.autograd.grad(entropy.sum(), weight, retain_graph=True)[0] for _ in range(2))
    expected = reference(hidden, weight, torch.arange(7), torch.zeros(7), 16, entropy_coef_N=torch.ones(7))[3]
    assert gradient_error(first, expected) <= 1e-5
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("hidden_type", [torch.bfloat16, torch.float32])
def test_an_entropy_bonus_on_bf16_weights_is_accumulated_in_fp32(hidden_type):
    g = torch.Generator().manual_seed(11)
    hidden, weight = projected(g)
    hidden, weight = hidden.to(hidden_type), weight.bfloat16()
    coef, bonus = torch.randn(2, 7, generator=g)
    expected = reference(hidden, weight, torch.arange(7), coef, 13, entropy_coef_N=bonus)
    *_, hidden_grad, weight_grad = run(hidden, weight, torch.arange(7), coef, bonus, vocab_size=13)
    assert gradient_error(hidden_grad, expected[2]) <= (2**-8 if hidden_type is torch.bfloat16 else 1e-5)
    assert gradient_error(weight_grad, expected[3]) <= 2**-8


def test_log_prob_of_a_sure_token_keeps_its_digits_beside_large_logits():
    logits = torch.full((1, 16), -1e4)
    logits[0, 3] += 12.0  # exactly representable; log π = −log(1 + 15·e⁻¹²)
    logp, _ = fused_logprobs(*logits_as_hidden(logits), torch.tensor([3]), vocab_size=16)
    assert float(logp[0]) == pytest.approx(-np.log1p(15 * np.exp(-12.0)), rel=1e-2)


@pytest.mark.parametrize("budget", [ONE_ROW, EVERYTHING])
def test_no_response_tokens_still_reach_the_graph(budget):
    hidden, weight = torch.zeros(0, HIDDEN), torch.randn(16, HIDDEN)
    nothing = torch.zeros(0, dtype=torch.long)
    logp, entropy, hidden_grad, weight_grad = run(
        hidden, weight, nothing, torch.zeros(0), vocab_size=16, memory_budget=budget
    )
    assert logp.shape == entropy.shape == (0,)
    assert hidden_grad.shape == (0, HIDDEN)
    assert (weight_grad == 0).all()


def test_temperature_divides_the_logits():
    g = torch.Generator().manual_seed(1)
    hidden, weight = projected(g)
    targets, coef = torch.arange(7), torch.randn(7, generator=g)
    expected = reference(hidden, weight, targets, coef, 16, temperature=0.7)
    results = run(hidden, weight, targets, coef, vocab_size=16, temperature=0.7, memory_budget=THREE_ROWS)
    for ours, theirs in zip(results, expected, strict=True):
        assert gradient_error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("budget", [ONE_ROW, THREE_ROWS, EVERYTHING])
@pytest.mark.parametrize("hidden_type", [torch.bfloat16, torch.float32])
def test_bf16_weights_are_multiplied_and_accumulated_in_fp32(hidden_type, budget):
    g = torch.Generator().manual_seed(2)
    hidden, weight = projected(g)
    hidden, weight = hidden.to(hidden_type), weight.bfloat16()
    targets, coef = torch.arange(7), torch.randn(7, generator=g)
    expected = reference(hidden, weight, targets, coef, 13)
    logp, entropy, hidden_grad, weight_grad = run(hidden, weight, targets, coef, vocab_size=13, memory_budget=budget)
    assert logp.dtype == entropy.dtype == torch.float32
    assert relative_error(logp, expected[0]) <= 1e-6
    assert relative_error(entropy, expected[1]) <= 1e-6
    # The only error is the final rounding of each gradient to its own type.
    assert (hidden_grad.dtype, weight_grad.dtype) == (hidden_type, torch.bfloat16)
    assert gradient_error(hidden_grad, expected[2]) <= (2**-8 if hidden_type is torch.bfloat16 else 1e-5)
    assert gradient_error(weight_grad, expected[3]) <= 2**-8


def test_float64_stays_float64():
    g = torch.Generator().manual_seed(3)
    hidden, weight = (t.double() for t in projected(g))
    targets, coef = torch.arange(7), torch.randn(7, generator=g)
    expected = reference(hidden, weight, targets, coef, 16)
    for ours, theirs in zip(run(hidden, weight, targets, coef, vocab_size=16), expected, strict=True):
        assert ours.dtype == torch.float64
        assert gradient_error(ours, theirs) <= 1e-13


@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
def test_a_sink_takes_the_sum_of_all_microbatches_in_fp32(weight_type):
    g = torch.Generator().manual_seed(4)
    hidden, weight = projected(g)
    weight = weight.to(weight_type).requires_grad_()
    targets, coef = torch.arange(7), torch.randn(7, generator=g)
    expected = reference(hidden, weight, targets, coef, 13)[3]
    main_grad, calls = torch.zeros(16, HIDDEN), []
    sink = GradientSink(total_VH=main_grad, done=lambda: calls.append("done"))
    for rows in (slice(0, 4), slice(4, 7)):
        logp, _ = fused_logprobs(
            hidden[rows], weight, targets[rows], vocab_size=13, memory_budget=THREE_ROWS, sink=sink
        )
        (logp * coef[rows]).sum().backward()
    assert weight.grad is None
    assert calls == ["done", "done"]
    assert gradient_error(main_grad, expected) <= 1e-5


def test_frozen_weights_get_no_gradient():
    hidden, weight = projected(torch.Generator().manual_seed(5))
    hidden.requires_grad_()
    fused_logprobs(hidden, weight, torch.arange(7), vocab_size=16)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad.abs().max() > 0


@pytest.mark.parametrize("budget", [ONE_ROW, EVERYTHING])
def test_a_second_backward_pass_gives_the_same_gradient(budget):
    hidden, weight = projected(torch.Generator().manual_seed(6))
    weight.requires_grad_()
    logp, _ = fused_logprobs(hidden, weight, torch.arange(7), vocab_size=16, memory_budget=budget)
    first, second = (torch.autograd.grad(logp.sum(), weight, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-7)


def test_without_entropy_there_is_none_and_the_rest_is_the_same():
    hidden, weight = projected(torch.Generator().manual_seed(7))
    targets, coef = torch.arange(7), torch.ones(7)
    logp, entropy, *grads = run(hidden, weight, targets, coef, vocab_size=16, with_entropy=False)
    expected_logp, _, *expected_grads = run(hidden, weight, targets, coef, vocab_size=16)
    assert entropy is None
    assert torch.equal(logp, expected_logp)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected_grads, strict=True))


def test_a_target_outside_the_real_vocabulary_has_no_probability():
    hidden, weight = projected(torch.Generator().manual_seed(8))
    logp, _ = fused_logprobs(hidden, weight, torch.tensor([0, 12, 13, 15, 16, -1, 1]), vocab_size=13)
    assert torch.isneginf(logp).tolist() == [False, False, True, True, True, True, False]


@pytest.mark.parametrize("with_bonus", [False, True])
def test_logits_of_all_rows_never_exist(with_bonus):
    """Measure the peak of torch's allocations with a budget of an eighth of the logits."""
    num_rows, width = 512, 4096
    hidden, weight = torch.randn(num_rows, 8), torch.randn(width, 8, requires_grad=True)
    targets, budget = torch.arange(num_rows), num_rows * width * 4 // 8
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logp, entropy = fused_logprobs(hidden, weight, targets, vocab_size=width, memory_budget=budget)
        (logp.sum() + entropy.sum() if with_bonus else logp.sum()).backward()
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    small = 3 * width * 8 * 4 + 32 * num_rows * 4
    assert budget // 2 < peak <= budget + small


def test_without_a_budget_scratch_is_the_weight_in_fp32_and_256_mib_at_least():
    def budget(rows, dtype):
        return automatic_budget(torch.empty(rows, 1024, device="meta"), dtype)

    assert budget(2**15, torch.float32) == 256 * 2**20
    assert budget(2**18, torch.float32) == 1024 * 2**20
    assert budget(2**18, torch.float64) == 2048 * 2**20


@pytest.mark.parametrize(
    ("num_rows", "most", "sizes"),
    [
        (7, 3, [1, 3, 3]),
        (7, 100, [7]),
        (0, 3, []),
        (300, 1000, [300]),
        (16384, 2730, [1024] + [2560] * 6),
        (16384, 300, [256] * 64),
        (1000, 600, [488, 512]),
    ],
)
def test_chunks_are_whole_tiles_of_a_matmul_but_for_the_first(num_rows, most, sizes):
    call = fused._Call(
        first=0,
        width=10,
        group=None,
        scale=1.0,
        dtype=torch.float32,
        with_entropy=True,
        memory_budget=most * 10 * 4,
        sink=None,
        needs_backward=False,
    )
    chunks = call.chunks(num_rows, AllForLogits(torch.float32, 1))
    assert [rows.stop - rows.start for rows in chunks] == sizes
    assert [i for rows in chunks for i in range(rows.start, rows.stop)] == list(range(num_rows))
