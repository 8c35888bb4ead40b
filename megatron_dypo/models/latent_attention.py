"""Multi-head latent attention of an HF ``config.json`` (DeepSeek-V2, arXiv 2405.04434, section 2.1), as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.models.hf.fields import Fields
from megatron_dypo.models.hf.rope_scaling import RopeScaling, YarnRopeScaling


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Keys and values of all heads come from one short vector of each token; some channels of a key are rotated, and
    shared by all heads."""

    query_rank: int | None
    """``q_lora_rank``: channels of the vector that queries come from; None: they come from the hidden state."""
    key_value_rank: int
    """``kv_lora_rank``: channels of the vector that keys and values come from."""
    plain_dim: int
    """``qk_nope_head_dim``: channels of a query or key head that are not rotated."""
    rope_dim: int
    """``qk_rope_head_dim``: channels that are rotated."""
    value_dim: int
    """``v_head_dim``: channels of a value head."""

    @property
    def query_dim(self) -> int:
        """Return the channels of a query or key head."""
        return self.plain_dim + self.rope_dim


def read_latent_attention(fields: Fields, heads: int, scaling: RopeScaling | None) -> LatentAttention:
    """Return the attention of a config.

    Raises:
        ValueError: a field is missing, out of its range, or asks for what is not supported.
    """
    if fields.optional_integer("num_key_value_heads", heads) not in (None, heads):
        fields.refuse("num_key_value_heads", f"must be num_attention_heads={heads} in multi-head latent attention")
    if not fields.flag("rope_interleave", True):
        fields.refuse("rope_interleave", "only true is supported, as in DeepSeek-V3: SGLang rotates neighbours")
    rope_dim = fields.integer("qk_rope_head_dim", 64)
    if rope_dim % 2:
        fields.refuse("qk_rope_head_dim", "must be even, as rotary positions turn pairs of channels")
    _check_scaling(fields, scaling)
    return LatentAttention(
        query_rank=fields.optional_integer("q_lora_rank", 1536),
        key_value_rank=fields.integer("kv_lora_rank", 512),
        plain_dim=fields.integer("qk_nope_head_dim", 128),
        rope_dim=rope_dim,
        value_dim=fields.integer("v_head_dim", 128),
    )


def _check_scaling(fields: Fields, scaling: RopeScaling | None) -> None:
    if scaling is None:
        return
    if not isinstance(scaling, YarnRopeScaling):
        raise ValueError(
            f"{fields.where}: rope_type={scaling.rope_type!r}: only 'default' and 'yarn' are supported with multi-head "
            "latent attention, as SGLang takes every scaling of it for yarn"
        )
    if abs(scaling.attention_factor - 1) > 1e-6:
        raise ValueError(
            f"{fields.where}: attention_factor={scaling.attention_factor:g} of the yarn scaling: must be 1 with "
            "multi-head latent attention, that is mscale = mscale_all_dim, since only some channels are rotated"
        )
