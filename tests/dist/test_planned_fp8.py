"""Refits in FP8: the tensors that arrive at a server of a quantised model equal the quantised export bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dypo.models.families.table import LAYER
from megatron_dypo.models.quantized.blocks import quantize
from megatron_dypo.models.quantized.names import BLOCK, Quantization, is_quantized, scale_name
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.plan.refit_plan import make_plan
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from megatron_dypo.refit.plan.server_tensors import served_tensors
from megatron_dypo.refit.slices import matrix, rectangle
from megatron_dypo.refit.transports.messages import as_bytes
from tests.support.architectures import make_arch
from tests.support.dist.planned_ranks import Refit, rank_refit
from tests.support.dist.spawn import run_ranks
from tests.support.refit_standins import Shapes, hf_tensors, standin_server

ARCH = make_arch(
    "qwen3",
    num_layers=2,
    hidden_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    ffn_hidden_size=512,
    vocab_size=131,
)
AXES = Mesh(tensor=2)
SERVER = ServerMesh(tensor=2)


def shapes_of(server_rank: int, quantization: Quantization) -> Shapes:
    """Return the parameters of a server's rank for the quantised model."""
    shapes: Shapes = {}
    for name, shape in make_plan(ARCH, AXES, [SERVER], quantization=quantization).served_shapes(0, server_rank).items():
        is_value = name.endswith("_proj.weight")
        shapes[name] = (tuple(shape), torch.float8_e4m3fn if is_value else torch.float32)
    return shapes


def expected_of(server_rank: int, quantization: Quantization) -> dict[str, bytes]:
    """Return whole HF tensors, quantised offline and then cut."""
    shapes = shapes_of(server_rank, quantization)
    params = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    model = hf_tensors(ARCH, seed=2)
    for tensor in served_tensors(ARCH, SERVER, server_rank):
        for layer in map(str, range(ARCH.num_layers) if LAYER in tensor.name else [0]):
            name = tensor.name.replace(LAYER, layer)
            for part in tensor.rectangles:
                hf_name = part.hf_name.replace(LAYER, layer)
                source = (part.hf_row, part.hf_col, part.rows, part.cols)
                place = (part.row, part.col, part.rows, part.cols)
                if not is_quantized(hf_name):
                    rectangle(params[name], *place).copy_(rectangle(model[hf_name], *source))
                    continue
                values, scales = quantize(model[hf_name], quantization)
                rectangle(params[name], *place).copy_(rectangle(values, *source))
                scale = params[scale_name(name, quantization)]
                grid = (BLOCK, BLOCK) if quantization == "fp8_block" else (1, values.shape[1])
                _blocks(scale, place, grid).copy_(_blocks(scales, source, grid))
    return {name: bytes(as_bytes(param).numpy()) for name, param in params.items()}


def _blocks(scales: Tensor, place: tuple[int, int, int, int], block: tuple[int, int]) -> Tensor:
    row, col, rows, cols = place
    down, across = block
    return matrix(scales)[row // down : -(-(row + rows) // down), col // across : -(-(col + cols) // across)]


@pytest.mark.parametrize("kind", ["p2p", "local"])
@pytest.mark.parametrize("quantization", ["fp8_block", "fp8_channel"])
def test_a_quantised_refit_equals_the_offline_conversion(quantization, kind):
    with standin_server(ARCH, SERVER, [shapes_of(rank, quantization) for rank in range(2)]) as server:
        refit = Refit(arch=ARCH, axes=AXES, urls=(server.url,), kind=kind, quantize=quantization)
        outcomes = run_ranks(2, rank_refit, refit)
        assert [outcome["error"] for of_rank in outcomes for outcome in of_rank] == [""] * 4
        for rank in range(2):
            held, expected = server.params(rank), expected_of(rank, quantization)
            assert [name for name in expected if held[name] != expected[name]] == []


def test_a_server_of_the_plain_model_is_refused():
    shapes = [shapes_of(rank, "none") for rank in range(2)]
    plain: list[Shapes] = [{name: (shape, torch.float32) for name, (shape, _) in one.items()} for one in shapes]
    with standin_server(ARCH, SERVER, plain) as server:
        refit = Refit(arch=ARCH, axes=AXES, urls=(server.url,), kind="p2p", quantize="fp8_block", seeds=(1,))
        ((outcome,), _) = run_ranks(2, rank_refit, refit)
        assert all(set(held) == {0x55} for rank in range(2) for held in server.params(rank).values())
    assert "gate_up_proj.weight_scale_inv is not among its parameters" in outcome["error"]
