"""Experts with biases whose gate and value alternate, as SGLang's class of gpt-oss holds them in bf16. Pure, no torch.

Source, SGLang 0.5.23: ``models/gpt_oss.py`` (``_load_normal_weights``) and ``layers/moe/fused_moe_triton/layer.py``
(``weight_loader_fused``, which takes all experts on every rank). Row 2i of ``w13_weight`` is the gate of channel i, row
2i + 1 its value. Seen as [channels, 2 · hidden], each is a rectangle.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.experts import Experts
from megatron_dypo.models.families.table import LAYER
from megatron_dypo.refit.plan.rectangles import Rectangle
from megatron_dypo.refit.plan.served_tensor import ServedTensor, whole

_MLP = f"model.layers.{LAYER}.mlp."
_EXPERTS = _MLP + "experts."


def stacked_experts(arch: Architecture, experts: Experts, tensor: int, server_rank: int) -> Iterator[ServedTensor]:
    """Yield the router and this rank's stacks of experts."""
    hidden, count = arch.hidden_size, experts.num_experts
    yield whole(f"{_MLP}router.weight", (count, hidden))
    yield whole(f"{_MLP}router.bias", (count,))
    local = experts.ffn_hidden_size // tensor
    start = server_rank * local
    yield _inputs("weight", (count, 2 * local, hidden), local, start, hidden)
    yield _inputs("bias", (count, 2 * local), local, start, 1)
    outputs = [
        _rectangle("w2_weight", expert, "down", "weight", hidden, local, hf_col=start) for expert in range(count)
    ]
    yield ServedTensor(name=f"{_EXPERTS}w2_weight", shape=(count, hidden, local), rectangles=tuple(outputs))
    # The ranks' outputs are summed: those after the first have zeros.
    biases = [
        _rectangle("w2_weight_bias", expert, "down", "bias", hidden, 1) for expert in range(count) if server_rank == 0
    ]
    yield ServedTensor(
        name=f"{_EXPERTS}w2_weight_bias", shape=(count, hidden), rectangles=tuple(biases), matrix_columns=1
    )


def _inputs(kind: str, shape: tuple[int, ...], local: int, start: int, cols: int) -> ServedTensor:
    """Return the stack of gates and values of weights or biases."""
    name = "w13_weight" if kind == "weight" else "w13_weight_bias"
    rectangles = [
        _rectangle(name, expert, projection, kind, local, cols, col=number * cols, hf_row=start)
        for expert in range(shape[0])
        for number, projection in enumerate(("gate", "up"))
    ]
    return ServedTensor(name=_EXPERTS + name, shape=shape, rectangles=tuple(rectangles), matrix_columns=2 * cols)


def _rectangle(
    name: str,
    expert: int,
    projection: str,
    kind: str,
    rows: int,
    cols: int,
    *,
    col: int = 0,
    hf_row: int = 0,
    hf_col: int = 0,
) -> Rectangle:
    return Rectangle(
        name=_EXPERTS + name,
        row=expert * rows,
        col=col,
        hf_name=f"{_EXPERTS}{expert}.{projection}_proj.{kind}",
        hf_row=hf_row,
        hf_col=hf_col,
        rows=rows,
        cols=cols,
    )
