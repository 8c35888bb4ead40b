"""Fused log-probs in Triton's kernels, which Triton's interpreter runs here, against float64 and against torch."""

from __future__ import annotations

import logging

import pytest
import torch

from megatron_dypo.objective import fused_logprobs as fused
from megatron_dypo.objective.exponentials import RowGradients, RowSums, TorchExponentials
from megatron_dypo.objective.fused_logprobs import fused_logprobs
from megatron_dypo.objective.projection import Projection
from tests.support.fused_cases import (
    CASES,
    EVERYTHING,
    ONE_ROW,
    gradient_error,
    over_ranks,
    projected,
    reference,
    relative_error,
    weighted_sum,
)
from tests.support.interpreted_kernels import interpreted, use_kernels
from tests.support.present import present

pytest.importorskip("triton", reason="triton is not installed here")

THREE_ROWS = 3 * 16 * 4
"""A memory budget for three rows of logits, whose gradients overwrite them."""


@pytest.mark.parametrize("budget", [ONE_ROW, THREE_ROWS, EVERYTHING])
@pytest.mark.parametrize("vocab_size", [16, 13])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_bonus", [False, True])
def test_values_and_gradients_equal_float64(with_bonus, name, vocab_size, budget, monkeypatch):
    launches, g = use_kernels(monkeypatch), torch.Generator().manual_seed(0)
    hidden, weight = CASES[name](g)
    targets = torch.randint(0, vocab_size, (len(hidden),), generator=g)
    coef = torch.randn(len(hidden), generator=g)
    bonus = torch.randn(len(hidden), generator=g) if with_bonus else None
    expected = reference(hidden, weight, targets, coef, vocab_size, 0.5, bonus)
    hidden.requires_grad_(), weight.requires_grad_()
    logp, entropy = fused_logprobs(
        hidden, weight, targets, vocab_size=vocab_size, temperature=0.5, memory_budget=budget
    )
    weighted_sum(logp, coef, entropy, bonus).backward()
    chunks = {ONE_ROW: len(hidden), THREE_ROWS: -(-len(hidden) // 3), EVERYTHING: 1}[budget]
    assert launches == ["sums"] * chunks + ["gradients"] * chunks
    assert relative_error(logp.detach(), expected[0]) <= 1e-6
    assert relative_error(present(entropy).detach(), expected[1]) <= 1e-6
    for ours, exact in ((hidden.grad, expected[2]), (weight.grad, expected[3])):
        # A saturated softmax has no gradient of its entropy; the float64 reference has rounding errors there.
        largest = max(float(exact.abs().max()), 1e-6)
        assert float((present(ours).double() - exact).abs().max()) <= 1e-5 * largest
    assert (present(weight.grad)[vocab_size:] == 0).all()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_sum_below_the_top_of_all(size, monkeypatch):
    use_kernels(monkeypatch)
    g = torch.Generator().manual_seed(0)
    hidden, weight = projected(g, size=20.0)
    targets = torch.randint(0, 14, (len(hidden),), generator=g)
    coef, bonus = torch.randn(2, len(hidden), generator=g)
    expected = reference(hidden, weight, targets, coef, 14, entropy_coef_N=bonus)

    def work(rank, group):
        own_hidden, part = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
        logp, entropy = fused_logprobs(own_hidden, part, targets, vocab_size=14, group=group, memory_budget=THREE_ROWS)
        weighted_sum(logp, coef, entropy, bonus).backward()
        return logp.detach(), present(entropy).detach(), own_hidden.grad, part.grad

    ranks = over_ranks(size, work)
    assert relative_error(ranks[0][0], expected[0]) <= 1e-6
    assert relative_error(ranks[0][1], expected[1]) <= 1e-6
    assert gradient_error(sum(hidden_grad for *_, hidden_grad, _ in ranks), expected[2]) <= 1e-5
    assert gradient_error(torch.cat([weight_grad for *_, weight_grad in ranks]), expected[3]) <= 1e-5


def chunk_of(num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(num_rows, width, generator=g) * 4, torch.randint(width, (num_rows,), generator=g)


def sums_of(num_rows: int, *, weighted: bool = True) -> RowSums:
    top, chosen, total, products = torch.full((4, num_rows), float("nan"))
    return RowSums(top_R=top, chosen_R=chosen, sum_R=total, weighted_R=products if weighted else None)


def gradients_of(num_rows: int, column: torch.Tensor, top: torch.Tensor, *, entropy: bool) -> RowGradients:
    onehot, logp_grad, entropy_grad, mean = torch.randn(4, num_rows, generator=torch.Generator().manual_seed(2))
    return RowGradients(
        column_R=column,
        top_R=top,
        lift_R=None,
        onehot_R=onehot,
        logp_grad_R=logp_grad,
        entropy_grad_R=entropy_grad if entropy else None,
        mean_R=mean if entropy else None,
    )


@pytest.mark.parametrize("width", [5, 32, 100])
def test_sums_over_several_blocks_are_those_of_torch(width, monkeypatch):
    kernels = interpreted()
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 32)
    logits, column = chunk_of(6, width)
    logits[2] += torch.arange(width) * 3  # its top moves up with each block
    logits[3] -= torch.arange(width) * 3
    ours, expected = sums_of(6), sums_of(6)
    kernels.TritonExponentials(torch.float32).sums(logits, column, ours)
    TorchExponentials(torch.float32, 2**20).sums(logits.clone(), column, expected)
    assert torch.equal(ours.top_R, expected.top_R)
    assert torch.equal(ours.chosen_R, expected.chosen_R)
    torch.testing.assert_close(ours.sum_R, expected.sum_R, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.weighted_R, expected.weighted_R, rtol=1e-5, atol=1e-6)


def test_unwanted_sums_are_not_written():
    logits, column = chunk_of(3, 8)
    ours = sums_of(3, weighted=False)
    interpreted().TritonExponentials(torch.float32).sums(logits, column, ours)
    torch.testing.assert_close(ours.sum_R, (logits - logits.amax(1, keepdim=True)).exp().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_over_several_blocks_are_those_of_torch_in_the_type_of_the_matmuls(entropy, operand, monkeypatch):
    kernels = interpreted()
    monkeypatch.setattr(kernels, "_LARGEST_BLOCK", 32)
    logits, column = chunk_of(6, 100)
    terms = gradients_of(6, column, logits.amax(1), entropy=entropy)
    expected = TorchExponentials(torch.float32, 2**20).gradients(logits.clone(), terms, has_sums=False)
    triton = kernels.TritonExponentials(operand)
    ours = triton.gradients(logits, terms, has_sums=True)
    assert ours.dtype == operand
    assert (ours.data_ptr() == logits.data_ptr()) is (operand == torch.float32)
    bar = 2**-7 if operand == torch.bfloat16 else 1e-5  # the interpreter cuts digits off, where a GPU rounds
    torch.testing.assert_close(ours.float(), expected, rtol=bar, atol=1e-6)
    fewer = triton.gradients(chunk_of(6, 100)[0][:4], terms.of(slice(4)), has_sums=False)
    assert fewer.shape == (4, 100)
    assert fewer.untyped_storage().data_ptr() == ours.untyped_storage().data_ptr() or operand == torch.float32


def test_a_gradient_that_is_one_repeated_number_is_read_as_such():
    logits, column = chunk_of(6, 8)
    terms = gradients_of(6, column, logits.amax(1), entropy=True)
    same = torch.ones(1).expand(6)
    repeated = RowGradients(**{**vars(terms), "logp_grad_R": same, "entropy_grad_R": 2 * same[:1].expand(6)})
    ones = RowGradients(**{**vars(terms), "logp_grad_R": torch.ones(6), "entropy_grad_R": torch.full((6,), 2.0)})
    triton = interpreted().TritonExponentials(torch.float32)
    first, second = (triton.gradients(logits.clone(), each, has_sums=False) for each in (repeated, ones))
    assert torch.equal(first, second)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_is_seen_in_the_sums(bad):
    logits, column = chunk_of(2, 8)
    logits[1, 3] = bad
    ours = sums_of(2)
    interpreted().TritonExponentials(torch.float32).sums(logits, column, ours)
    assert ours.sum_R[0].isfinite()
    assert ours.sum_R[1].isnan()


def test_a_logit_of_minus_infinity_has_no_probability_and_no_gradient():
    logits, column = chunk_of(1, 8)
    logits[0, 3] = -float("inf")
    column[:] = 1
    ours, triton = sums_of(1), interpreted().TritonExponentials(torch.float32)
    triton.sums(logits, column, ours)
    rest = torch.cat((logits[:, :3], logits[:, 4:]), 1) - ours.top_R[:, None]
    torch.testing.assert_close(ours.weighted_R, (rest * rest.exp()).sum(1), rtol=1e-5, atol=0)
    assert triton.gradients(logits, gradients_of(1, column, ours.top_R, entropy=True), has_sums=True)[0, 3] == 0


@pytest.mark.parametrize(("operand", "bytes_of_a_logit"), [(torch.float32, 4), (torch.bfloat16, 6)])
def test_the_budget_holds_a_chunk_and_its_gradients(operand, bytes_of_a_logit):
    assert interpreted().TritonExponentials(operand).num_logits(1200) == 1200 // bytes_of_a_logit


def signature(kernel, **constants):
    """Return the types of a kernel's arguments, as they are in a run in bf16."""
    integers, pointers = {"row_stride": "i32", "gradient_stride": "i32"}, {"column": "*i64", "gradients": "*bf16"}
    return {
        name: "constexpr" if name in constants else integers.get(name) or pointers.get(name, "*fp32")
        for name in kernel.arg_names
    }


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("flag", [True, False])
def test_the_kernels_compile_for_gpus_of_each_generation(flag, capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_dypo.objective import exponentials_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, option in ((kernels._sums_of_rows, "IS_WEIGHTED"), (kernels._gradients_of_rows, "HAS_ENTROPY")):
        constants = {"WIDTH": 151_936, "BLOCK": kernels._LARGEST_BLOCK, option: flag}
        source = ASTSource(fn=kernel, signature=signature(kernel, **constants), constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert compiled.asm["cubin"]


def chosen(dtype: torch.dtype, device: str) -> str:
    call = fused._Call(
        first=0,
        width=8,
        group=None,
        scale=1.0,
        dtype=dtype,
        with_entropy=True,
        memory_budget=2**20,
        sink=None,
        needs_backward=False,
    )
    return type(call.exponentials(Projection(torch.zeros(8, 4), dtype, 1), torch.device(device))).__name__


def test_kernels_are_used_for_fp32_on_a_gpu_where_triton_works(monkeypatch):
    import megatron_dypo.objective.exponentials_triton as kernels

    monkeypatch.setattr(kernels, "works_on", lambda device: True)
    assert chosen(torch.float32, "cuda") == "TritonExponentials"
    assert chosen(torch.float64, "cuda") == "TorchExponentials"
    assert chosen(torch.float32, "cpu") == "TorchExponentials"
    monkeypatch.setattr(kernels, "works_on", lambda device: False)
    assert chosen(torch.float32, "cuda") == "TorchExponentials"


def test_a_machine_where_triton_cannot_compile_is_told_why(monkeypatch, caplog):
    kernels = interpreted()
    kernels.works_on.cache_clear()
    assert kernels.works_on(torch.device("cpu"))

    def fail(*args, **options):
        raise RuntimeError("at 2:12:\ndef kernel(\n    logits: Any,\n            ^\nNameError('no such name')")

    monkeypatch.setattr(kernels.TritonExponentials, "sums", fail)
    kernels.works_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.works_on(torch.device("cpu"))
    kernels.works_on.cache_clear()
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "log-probs are computed by torch, in more time: Triton cannot run here: Runtime"
    )
    assert record.getMessage().endswith("NameError('no such name')")
    assert "\n" not in record.getMessage()


def test_kernels_that_compute_something_else_are_not_used(monkeypatch, caplog):
    kernels = interpreted()
    monkeypatch.setattr(kernels.TritonExponentials, "sums", lambda self, logits, column, out: out.sum_R.fill_(2.0))
    kernels.works_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not kernels.works_on(torch.device("cpu"))
    kernels.works_on.cache_clear()
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["exp(0) is 2.0 in its kernel"]
