"""FP8 with block scales, against a loop over blocks and a table of all e4m3 numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.models.quantized.blocks import block_amax, quantize, quantize_slice, scales_of, touched_blocks
from megatron_dypo.models.quantized.names import (
    Quantization,
    block_shape,
    is_quantized,
    is_scale,
    scale_name,
    scale_shape,
    weight_name,
)
from tests.support.hf_models import import_transformers

SHAPES = [(128, 128), (256, 384), (1, 1), (5, 300), (129, 127), (200, 64), (131, 257)]
KINDS: list[Quantization] = ["fp8_block", "fp8_channel"]
DTYPES = [torch.bfloat16, torch.float32]

E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1]
)
"""The finite numbers of e4m3 from zero upwards. A number's index is its bit pattern."""


def random_weight(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Draw a weight with rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 2, shape[0])[torch.randperm(shape[0], generator=generator)]
    return (torch.randn(shape, generator=generator) * sizes[:, None]).to(dtype)


def naive(weight: torch.Tensor, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Compute bit patterns and scales, one block after the other, by looking numbers up in the table."""
    values = weight.float().numpy()
    rows, cols = (128, 128) if kind == "fp8_block" else (1, values.shape[1])
    bits = np.zeros(values.shape, dtype=np.uint8)
    scales = np.zeros((-(-values.shape[0] // rows), -(-values.shape[1] // cols)), dtype=np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = np.s_[i * rows : (i + 1) * rows, j * cols : (j + 1) * cols]
            amax = np.maximum(np.abs(values[where]).max(), np.float32(1e-4))
            scales[i, j] = amax / np.float32(448)
            bits[where] = nearest_e4m3(values[where] * (np.float32(1) / amax * np.float32(448)))
    return bits, scales


def nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """Return the bit patterns of the nearest numbers, for ties the even one."""
    magnitude = np.abs(values).astype(np.float64)
    above = np.minimum(np.searchsorted(E4M3, magnitude), len(E4M3) - 1)
    below = np.maximum(above - 1, 0)
    up, down = np.abs(E4M3[above] - magnitude), np.abs(magnitude - E4M3[below])
    index = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (index | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_that_of_a_loop_over_blocks(shape, dtype, kind):
    weight = random_weight(shape, dtype)
    quantized, scales = quantize(weight, kind)
    bits, expected = naive(weight, kind)
    assert (quantized.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert tuple(scales.shape) == scale_shape(kind, shape)
    np.testing.assert_array_equal(quantized.view(torch.uint8).numpy(), bits)
    np.testing.assert_array_equal(scales.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_that_of_sglangs_copy_of_deepgemm(shape, dtype):
    import_transformers()
    oracle = pytest.importorskip("sglang.benchmark.deepseek_utils").per_block_cast_to_fp8
    weight = random_weight(shape, dtype)
    for ours, theirs in zip(quantize(weight, "fp8_block"), oracle(weight), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_number_is_kept_to_half_a_step_of_e4m3(shape, kind):
    weight = random_weight(shape)
    quantized, scales = quantize(weight, kind)
    rows, cols = block_shape(kind, shape)
    spread = scales.double().repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(cols, 1)[:, : shape[1]]
    # Half of the last of three bits, or half of the smallest number 2⁻⁹; and two roundings of fp32 before that.
    bound = torch.maximum(weight.double().abs() * 2.0**-4, spread * 2.0**-10) * (1 + 1e-5)
    assert ((quantized.double() * spread - weight.double()).abs() <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_nothing_becomes_nan(kind):
    quantized, scales = quantize(torch.zeros(130, 200), kind)
    assert not quantized.float().any()
    assert torch.equal(scales, torch.full_like(scales, 1e-4) / 448)
    extremes = torch.tensor([[3.0e38, -3.0e38, 1e-45, 0.0]])
    quantized, scales = quantize(extremes, kind)
    assert quantized.float().tolist() == [[448.0, -448.0, 0.0, 0.0]]
    assert scales.isfinite().all()


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[int]:
    return [0, *sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))), size]


@st.composite
def cut_weights(draw: st.DrawFn) -> tuple[torch.Tensor, list[int], list[int], str]:
    shape = (draw(st.integers(2, 300)), draw(st.integers(2, 300)))
    weight = random_weight(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    return weight, draw(cuts(shape[0])), draw(cuts(shape[1])), draw(st.sampled_from(KINDS))


@given(cut_weights())
@settings(max_examples=150, deadline=None)
def test_slices_are_those_of_the_whole_wherever_it_is_cut(case):
    weight, row_cuts, col_cuts, kind = case
    block = block_shape(kind, tuple(weight.shape))
    parts = [
        (row, col, weight[row:row_end, col:col_end])
        for row, row_end in itertools.pairwise(row_cuts)
        for col, col_end in itertools.pairwise(col_cuts)
    ]
    amax = torch.zeros(scale_shape(kind, tuple(weight.shape)))
    for row, col, part in parts:
        where = touched_blocks(row, col, tuple(part.shape), block)
        amax[where] = torch.maximum(amax[where], block_amax(part, row, col, block))
    quantized, scales = quantize(weight, kind)
    assert torch.equal(scales_of(amax), scales)
    for row, col, part in parts:
        ours = quantize_slice(part, row, col, amax, block)
        whole = quantized[row : row + part.shape[0], col : col + part.shape[1]]
        assert ours.is_contiguous()
        assert torch.equal(ours.view(torch.uint8), whole.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.11.self_attn.o_proj.weight", True),
        ("model.layers.0.mlp.gate_proj.weight", True),
        ("model.layers.0.mlp.experts.7.down_proj.weight", True),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.self_attn.q_norm.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_linear_weights_of_the_layers_are_quantised_and_nothing_else(name, expected):
    assert is_quantized(name) is expected


def test_scales_are_named_as_sglang_reads_them():
    name = "model.layers.0.mlp.up_proj.weight"
    assert scale_name(name, "fp8_block") == "model.layers.0.mlp.up_proj.weight_scale_inv"
    assert scale_name(name, "fp8_channel") == "model.layers.0.mlp.up_proj.weight_scale"
    for kind in KINDS:
        assert is_scale(scale_name(name, kind))
        assert weight_name(scale_name(name, kind)) == name
    assert not is_scale(name)
