"""Count the bytes that autograd keeps of one transformer layer until its backward pass, for each token of a microbatch.
Pure.

There are two implementations of a layer (``mcore/features.py`` chooses). *Fused* is Transformer Engine's modules, with
flash attention, on a GPU. *Unfused* is Megatron's local modules around torch's RMSNorm and the packed attention of this
package. Neither keeps S × S attention scores. The counts are read off the tensors that each module saves; those of
unfused layers are measured too (``benchmarks/memory_model.py``).

Symbols: H hidden size, h query heads, g key-value heads, d channels of a head, F channels of the feed-forward layer, e
bytes of an element. Multi-head latent attention keeps latent vectors beside norms and residuals, and a query, a key and
a value of every head. Attention with sinks is that of this package in both implementations
(``planning/sink_activations.py``).

With FP8 (fused only) a linear layer keeps a quantised copy of its input: ``planning/fp8.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.experts import Experts
from megatron_dypo.models.latent_attention import LatentAttention
from megatron_dypo.planning.fp8 import Quantized
from megatron_dypo.planning.sink_activations import sink_bytes

FP32 = 4


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Bytes for each token, grouped by the way tensor parallelism divides them."""

    between: float
    """Norms, residuals and experts. Sequence parallelism splits them; without it each tensor-parallel rank has all."""
    whole: float
    """Tensors that are whole on every tensor-parallel rank, with sequence parallelism too."""
    split: float
    """Heads and channels of the feed-forward layer, which are split over tensor-parallel ranks."""
    attention: float
    """Bytes that core attention keeps, minus those that ``selective`` recomputation needs instead; split too."""
    input: float
    """Input of the layer, the only tensor that full recomputation keeps; divided like ``between``."""
    backward: float
    """Additional gradients half-way through the feed-forward layer's backward pass; split."""

    def kept(self, recompute: str, tensor: int, sequence: bool) -> float:
        """Return the bytes for each token that one rank keeps from the layer's forward to its backward pass."""
        between = tensor if sequence else 1
        if recompute == "full":
            return self.input / between
        attention = self.attention if recompute == "none" else 0.0
        return self.between / between + self.whole + (self.split + attention) / tensor

    def working(self, recompute: str, tensor: int, sequence: bool) -> float:
        """Return the bytes for each token, in addition to ``kept``, while the backward pass is in one layer."""
        backward = self.backward / tensor + self.input / (tensor if sequence else 1)
        # Full recomputation makes the layer's tensors again.
        again = self.kept("none", tensor, sequence) - self.kept(recompute, tensor, sequence)
        return backward + (again if recompute == "full" else 0.0)


def layer_bytes(
    arch: Architecture, element: int, *, fused: bool, expert_tensor: int = 1, fp8: Quantized | None = None
) -> LayerBytes:
    """Return the bytes that a layer of the architecture keeps.

    Args:
        element: bytes, 2 for bf16 and 4 for fp32.
        expert_tensor: ranks that split each expert, and gather each other's tokens for it.
        fp8: bytes of quantised tensors, for a layer in FP8; fused layers only.
    """
    if fused:
        return _fused(arch, element, expert_tensor, fp8)
    assert fp8 is None, "FP8 needs Transformer Engine"
    return _unfused(arch, element, _experts(arch.experts, arch.hidden_size, element, expert_tensor))


def norm_bytes(width: int, element: int, *, fused: bool) -> float:
    """Return the bytes that a norm keeps: its input, its output, and what torch's unfused RMSNorm keeps between them.

    In bf16 the unfused norm keeps two fp32 copies, and not the input.
    """
    if fused:
        return 2 * width * element
    return width * (3 * FP32 if element == FP32 else 2 * FP32 + element)


def _fused(arch: Architecture, e: int, expert_tensor: int, fp8: Quantized | None) -> LayerBytes:
    H, h, g, d = _sizes(arch)
    saved = fp8.saved_input if fp8 else e
    # Values are a view of the projection's output, which therefore stays whole. Rotation makes new q and k.
    q_copy = h * d if arch.qk_norm else 0
    output_copy = fp8.attention_output * h * d if fp8 else 0.0
    heads = e * ((h + 2 * g) * d + (h + g) * d + q_copy + h * d) + output_copy + FP32 * h
    # Inputs and outputs of both norms. An output is the input of a linear layer, and with experts also of the router.
    norms = 2 * e * H + saved * H + (e if arch.experts else saved) * H
    ffn = (2 * e + saved) * _dense_width(arch)
    latents = 0.0
    if arch.latent is not None:
        heads, latents = _latent_heads(arch, e), e * _latent_vectors(arch.latent)
    return LayerBytes(
        between=norms + latents + _fused_experts(arch.experts, H, e, expert_tensor, saved),
        whole=0.0,
        split=heads + ffn,
        # Flash attention keeps only its output (the next projection's input) and one number a head.
        attention=sink_bytes(arch, e, grouped=False) if arch.attention_sinks else 0.0,
        input=e * H,
        backward=_widest(arch) * (e if fp8 is None else max(e, _fp8_backward(fp8, e))),
    )


def _fp8_backward(fp8: Quantized, e: int) -> float:
    """Return a channel's additional bytes in the backward pass of the feed-forward layer's first half.

    They are the gradients of gate and value and their quantised copies, minus the channel's own tensors, freed by then.
    """
    return 2 * (e + fp8.gradient) - (2 * e + fp8.saved_input)


def _unfused(arch: Architecture, e: int, experts: float) -> LayerBytes:
    H, h, g, d = _sizes(arch)
    qkv, is_narrow = (h + 2 * g) * d, e != FP32
    head_norms = 0
    if arch.qk_norm:
        head_norms = 2 * FP32 * (h + g) * d if is_narrow else FP32 * (qkv + h * d + (h + g) * d)
    # Kept by attention: padded copies of q, k and v, the output and its log-sum-exp. Kept for recomputation instead:
    # rotated q and k, and the projection's output.
    core: float = e * (qkv + h * d) + FP32 * h
    core_inputs = e * (h + g) * d + (0 if arch.qk_norm and not is_narrow else e * qkv)
    if arch.attention_sinks:
        core = sink_bytes(arch, e, grouped=True)
    latents, ffn = 0.0, 5 * _dense_width(arch)
    if arch.latent is not None:
        # Values and outputs have a query's channels, some of them zeros (``mcore/attention.py``).
        core, core_inputs = e * 4 * h * d + FP32 * h, e * h * (2 * d + arch.value_dim)
        latents = e * arch.latent.rope_dim + sum(norm_bytes(n, e, fused=False) for n in _ranks(arch.latent))
    return LayerBytes(
        between=2 * norm_bytes(H, e, fused=False) + latents + experts,
        whole=4 * arch.rotary_dim * e,  # cosines and sines, for q and for k
        split=head_norms + e * (h * arch.value_dim + ffn) + core_inputs,
        attention=core - core_inputs,
        input=e * H,
        backward=e * 2 * _widest(arch),
    )


def _experts(experts: Experts | None, H: int, e: int, split: int) -> float:
    """Return the bytes for each token of its experts' inputs, channels and outputs, under perfect balance."""
    if experts is None:
        return 0.0
    # The bounded gate and its sigmoid are two more tensors.
    channels = (6 if experts.clamp is None else 8) * experts.ffn_hidden_size
    return _router(experts) + e * experts.per_token * (2 * split * H + channels)


def _fused_experts(experts: Experts | None, H: int, e: int, split: int, saved: float) -> float:
    """Return the bytes for each token of its experts' inputs and channels; ``saved``: bytes of an input's element."""
    if experts is None:
        return 0.0
    F = experts.ffn_hidden_size
    return _router(experts) + experts.per_token * (saved * (split * H + F) + e * 2 * F)


def _dense_width(arch: Architecture) -> int:
    """Return the channels of the layer's MLP, or of the one that every token passes beside its experts."""
    return arch.experts.shared_width if arch.experts else arch.ffn_hidden_size


def _latent_heads(arch: Architecture, e: int) -> int:
    """Return the bytes of queries, keys, values and outputs of all heads, and of one number a head."""
    h = arch.num_attention_heads
    return e * 2 * h * (arch.head_dim + arch.value_dim) + FP32 * h


def _ranks(latent: LatentAttention) -> list[int]:
    return [latent.key_value_rank, *([latent.query_rank] if latent.query_rank is not None else [])]


def _latent_vectors(latent: LatentAttention) -> int:
    """Return the channels of the latent vectors, before and after their norms, and of the rotated key."""
    return 2 * sum(_ranks(latent)) + latent.rope_dim


def _router(experts: Experts) -> int:
    return 3 * FP32 * experts.num_experts


def _widest(arch: Architecture) -> int:
    experts = arch.experts
    return max(experts.ffn_hidden_size * experts.per_token if experts else 0, _dense_width(arch))


def _sizes(arch: Architecture) -> tuple[int, int, int, int]:
    return arch.hidden_size, arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
