"""The tensors that FP8 training holds in FP8, and the layers and FLOPs that are in FP8. Pure arithmetic, not yet
compared with a GPU's counters.

Source: Transformer Engine (2.20 in development), as used by Megatron-Core 0.16.1:

- Each quantised tensor has a rowwise and a columnwise usage ("Performance considerations" of its documentation). With
  one scale for each tensor, GPUs whose GEMMs accept FP8 operands in any layout read both from one copy; Ada and Hopper
  need a transposed second copy (``csrc/quantizer.cpp``, ``nvte_is_non_tn_fp8_gemm_supported``). With block scales
  (``blockwise``, ``mxfp8``) the two always differ, since their blocks differ.
- One copy of a linear layer's input is saved: the columnwise one (``module/linear.py``, ``module/layernorm_linear.py``,
  ``module/grouped_linear.py``: ``update_usage``), or the rowwise one if tensor-parallel ranks gather it again. Inputs
  that other operations keep in bf16 stay in bf16: those of the norm, the activation function and the router. Attention
  keeps its output. In Megatron the projection saves that same tensor (``set_save_original_input``, Transformer Engine
  2.6); ``delayed`` does not support this, so there is an FP8 copy too.
- Both usages of weights are cached from the first microbatch on (``_fp8_workspaces``), beside bf16 parameters. With
  ``param_gather`` the parameters are these copies, and nothing is in bf16: the rowwise copy is in DDP's buffer, whose
  gathering moves 1 byte, and ``post_all_gather_processing`` makes the other one. With ``mxfp8`` one copy is not enough:
  bf16 values are gathered through the memory of the gradients (``distributed/param_and_grad_buffer.py``), and the other
  parameters then have an additional buffer.

Histories of largest values (``delayed``) take kilobytes for each layer and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.config.fp8 import Fp8Config, Recipe
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.flops import sequence_cost
from megatron_dypo.parallel.mesh import Mesh

_ONE_LAYOUT = ((10, 0), (12, 0))
"""Range of compute capabilities (without the upper one) whose GEMMs accept FP8 operands in any layout."""
_BF16 = 2

_INPUT_SCALE: dict[Recipe, float] = {"blockwise": 4 / 128, "mxfp8": 1 / 32}
"""Bytes of scales for an element of an input or gradient: fp32 for 1×128, a byte for 32."""
_WEIGHT_SCALE: dict[Recipe, float] = {"blockwise": 4 / 128**2, "mxfp8": 1 / 32}
"""Bytes of scales for an element of a weight: fp32 for 128×128, a byte for 32."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Bytes for each element of the tensors that an FP8 layer quantises, scales included."""

    weight: float
    """All copies of a weight."""
    saved_input: float
    """The copy of a linear layer's input that is kept until the backward pass."""
    gradient: float
    """All copies of the gradient of a linear layer's output."""
    gathered: float
    """The part of a weight that data-parallel ranks gather under ``param_gather``."""
    attention_output: float
    """The copy that the projection after attention keeps, in addition to attention's own."""
    is_buffered: bool
    """Whether, with ``param_gather``, the bf16 parameters have an additional buffer of their size for gathering."""


def quantized(fp8: Fp8Config, capability: tuple[int, int]) -> Quantized | None:
    """Return the bytes that the recipe costs on a GPU of this compute capability; None: no FP8."""
    if not fp8.is_on:
        return None
    in_blocks = fp8.recipe in ("blockwise", "mxfp8")
    copies = 2 if in_blocks or not _ONE_LAYOUT[0] <= capability < _ONE_LAYOUT[1] else 1
    value = 1 + _INPUT_SCALE.get(fp8.recipe, 0.0)
    return Quantized(
        weight=copies * (1 + _WEIGHT_SCALE.get(fp8.recipe, 0.0)),
        saved_input=value,
        gradient=copies * value,
        gathered=_BF16 if fp8.recipe == "mxfp8" else 1,
        attention_output=value if fp8.recipe == "delayed" else 0.0,
        is_buffered=fp8.recipe == "mxfp8",
    )


def fp8_layers(fp8: Fp8Config, mesh: Mesh, num_layers: int, stage: int) -> int:
    """Return how many layers of a pipeline stage are in FP8, over all its chunks."""
    if not fp8.is_on:
        return 0
    inside = range(fp8.first_layers_bf16, num_layers - fp8.last_layers_bf16)
    return sum(layer in inside for layer in mesh.layers_of(stage, num_layers))


def expert_share(arch: Architecture) -> float:
    """Return the share of a token's linear FLOPs that are its experts'."""
    if arch.experts is None:
        return 0.0
    chosen = 3 * arch.hidden_size * arch.experts.ffn_hidden_size * arch.experts.per_token
    return chosen / (sequence_cost(arch).linear / 6 / arch.num_layers)


def fp8_flops(arch: Architecture, fp8: Fp8Config) -> float:
    """Return the share of a token's linear FLOPs (``SequenceCost.linear``) that are in FP8: all layers except those in
    bf16, without the router.

    Attention scores and the output projection, which ``SequenceCost`` counts separately, are in bf16.
    """
    if not fp8.is_on:
        return 0.0
    layers = max(0, arch.num_layers - fp8.first_layers_bf16 - fp8.last_layers_bf16)
    per_layer = sequence_cost(arch).linear / 6 / arch.num_layers
    router = arch.hidden_size * arch.experts.num_experts if arch.experts else 0
    return layers / arch.num_layers * (1 - router / per_layer)
