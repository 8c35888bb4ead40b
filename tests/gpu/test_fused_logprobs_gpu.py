"""Fused log-probs on a GPU, where bf16 weights are multiplied as they are, against float64 on the CPU."""

import pytest
import torch

from megatron_dypo.objective import exponentials_triton
from megatron_dypo.objective.fused_logprobs import fused_logprobs
from megatron_dypo.parallel.device import device, on_gpu
from tests.support.present import present

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not on_gpu(), reason="needs a GPU")]

NUM_ROWS, VOCAB, PADDED, HIDDEN = 37, 9000, 9024, 64
"""A vocabulary of three blocks of the kernels."""


def test_triton_works_here():
    assert exponentials_triton.works_on(device())


@pytest.mark.parametrize("in_kernels", [True, False])
@pytest.mark.parametrize("with_bonus", [True, False])
@pytest.mark.parametrize("budget", [1, 2**16, 2**28])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
def test_values_and_gradients_equal_float64(dtype, bar, budget, with_bonus, in_kernels, monkeypatch):
    if not in_kernels:
        monkeypatch.setattr(exponentials_triton, "works_on", lambda device: False)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=g).to(dtype)
    weight = (torch.randn(PADDED, HIDDEN, generator=g) / 4).to(dtype)
    targets, coef = torch.randint(0, VOCAB, (NUM_ROWS,), generator=g), torch.randn(2, NUM_ROWS, generator=g)
    if not with_bonus:
        coef[1] = 0.0

    exact = [t.double().requires_grad_() for t in (hidden, weight)]
    logp_NV = (exact[0] @ exact[1][:VOCAB].t()).log_softmax(dim=-1)
    expected = logp_NV.gather(1, targets[:, None])[:, 0]
    expected_entropy = -(logp_NV.exp() * logp_NV).sum(-1)
    (expected * coef[0].double() + expected_entropy * coef[1].double()).sum().backward()

    ours = [t.to(device()).requires_grad_() for t in (hidden, weight)]
    logp, entropy = fused_logprobs(ours[0], ours[1], targets.to(device()), vocab_size=VOCAB, memory_budget=budget)
    bonus = present(entropy) * coef[1].to(device()) if with_bonus else 0.0
    (logp * coef[0].to(device()) + bonus).sum().backward()

    # Products of bf16 numbers are exact in fp32, so values are as good as those of fp32 inputs.
    assert torch.allclose(logp.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(present(entropy).cpu().double(), expected_entropy, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, exact, strict=True):
        grad, exact_grad = present(mine.grad), present(theirs.grad)
        assert grad.dtype == dtype
        assert (grad.cpu().double() - exact_grad).abs().max() <= bar * exact_grad.abs().max()
