"""Families whose weights cannot be quantised here. No torch."""

from __future__ import annotations

from megatron_dypo.checks import require
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.quantized.names import Quantization


def require_quantizable(arch: Architecture, quantization: Quantization) -> None:
    """Refuse FP8 weights of multi-head latent attention, of experts that an HF folder stacks, and of an MLP that every
    token passes beside its experts.

    SGLang 0.5.23 quantises ``kv_b_proj`` once more when it derives its own tensors from it, in another way on each kind
    of GPU (``models/deepseek_common/deepseek_weight_loader.py``, ``post_load_weights``). The last was not checked.

    Raises:
        ValueError: names the format and the family.
    """
    require(
        arch.latent is None or quantization == "none",
        f"quantize={quantization}",
        f"must be none for a {arch.family} model: SGLang quantises parts of multi-head latent attention again, each "
        "kind of GPU in its own way",
    )
    require(
        arch.experts is None or not arch.experts.is_stacked or quantization == "none",
        f"quantize={quantization}",
        f"must be none for a {arch.family} model: its folders have one tensor for all experts, for which there is no "
        "format in FP8 here",
    )
    require(
        not (arch.experts and arch.experts.shared_width) or quantization == "none",
        f"quantize={quantization}",
        f"must be none for a {arch.family} model: FP8 was not checked with shared experts",
    )
