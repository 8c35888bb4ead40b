"""A factor on the cosines and sines of rotary positions, which Megatron-Core reads from attributes of its config."""

from __future__ import annotations

import math

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dypo.checks import require
from megatron_dypo.mcore.compat.private_name import PrivateName

FACTOR_OF_CONFIG = PrivateName(
    package="megatron-core",
    module="megatron.core.models.common.embeddings.yarn_rotary_pos_embedding",
    name="_yarn_get_concentration_factor_from_config",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/models/common/embeddings/yarn_rotary_pos_embedding.py:274",
    oldest="0.16",
    takes=("config",),
)
"""Computes the factor (0.1 · ``yarn_mscale`` · ln s + 1) / (0.1 · ``yarn_mscale_all_dim`` · ln s + 1), with s =
``yarn_rotary_scaling_factor``. Attention calls it for queries and keys; 1 without these attributes."""


def scale_rotated(config: TransformerConfig, factor: float) -> None:
    """Let every attention of this config multiply the rotated channels of queries and keys by ``factor``.

    Raises:
        ValueError: the config asks for the fused rotation, which ignores the factor.
        RuntimeError: this Megatron-Core computes another factor.
    """
    if factor == 1:
        return
    require(
        not config.apply_rope_fusion,
        "model.megatron.apply_rope_fusion=True",
        f"must be false: the fused rotation ignores the attention factor {factor:g} of the yarn scaling",
    )
    values = {"yarn_rotary_scaling_factor": math.e, "yarn_mscale": 10 * (factor - 1), "yarn_mscale_all_dim": 0.0}
    for name, value in values.items():
        setattr(config, name, value)
    computed = FACTOR_OF_CONFIG.get()(config)
    if not math.isclose(computed, factor, rel_tol=1e-9):
        raise RuntimeError(f"Megatron-Core computes {computed:g} from {values}, not {factor:g}")
