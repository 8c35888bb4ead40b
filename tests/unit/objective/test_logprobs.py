import pytest
import torch

from megatron_dypo.objective.logprobs import vocab_parallel_logprobs


def reference(logits_NV, target_N, vocab_size):
    """float64 log_softmax over the real vocabulary."""
    logp_NV = torch.log_softmax(logits_NV[:, :vocab_size].double(), dim=-1)
    entropy_N = -(logp_NV.exp() * torch.nan_to_num(logp_NV, neginf=0.0)).sum(-1)
    return logp_NV.gather(1, target_N[:, None])[:, 0], entropy_N


CASES = {
    "random": lambda g: torch.randn(6, 16, generator=g) * 3,
    "huge": lambda g: (torch.rand(6, 16, generator=g) - 0.5) * 2e4,
    "one_hot": lambda g: torch.eye(6, 16) * 1e4,
    "ties": lambda g: torch.zeros(6, 16),
    "one_row": lambda g: torch.randn(1, 16, generator=g),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("vocab_size", [16, 13])
def test_values_and_gradients_match_float64_log_softmax(name, vocab_size):
    g = torch.Generator().manual_seed(0)
    logits = CASES[name](g).requires_grad_()
    target = torch.randint(0, vocab_size, (len(logits),), generator=g)
    weight = torch.randn(len(logits), generator=g)
    logp, entropy = vocab_parallel_logprobs(logits, target, vocab_size=vocab_size)
    expected_logits = logits.detach().double().requires_grad_()
    expected, expected_entropy = reference(expected_logits, target, vocab_size)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    (logp * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    torch.testing.assert_close(logits.grad.double(), expected_logits.grad, rtol=1e-5, atol=1e-6)


def test_padding_vocabulary_has_no_probability_and_no_gradient():
    logits = torch.randn(4, 12).requires_grad_()
    logp, _ = vocab_parallel_logprobs(logits, torch.tensor([0, 1, 2, 3]), vocab_size=10)
    logp.sum().backward()
    assert (logits.grad[:, 10:] == 0).all()
    assert (logits.grad[:, :10] != 0).all()


def test_no_rows_still_reach_the_graph():
    logits = torch.randn(0, 12).requires_grad_()
    logp, entropy = vocab_parallel_logprobs(logits, torch.zeros(0, dtype=torch.long), vocab_size=12)
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,)
    assert logits.grad.shape == (0, 12)


def test_bf16_logits_get_bf16_gradients_and_fp32_log_probs():
    logits = torch.randn(3, 8, dtype=torch.bfloat16).requires_grad_()
    logp, _ = vocab_parallel_logprobs(logits, torch.tensor([1, 2, 3]), vocab_size=8)
    logp.sum().backward()
    assert logp.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
