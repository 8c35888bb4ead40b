"""Floating-point operations of a training pass over one sequence. Replicas and microbatches are balanced by them. Pure.

The accounting is that of PaLM (Chowdhery et al. 2022, appendix B) and of Megatron-LM (Narayanan et al. 2021, appendix;
``megatron/training/training.py``, ``num_floating_point_operations``), split into terms that grow with the length L of a
sequence, with L², and with its R response tokens. Forward, for each layer with hidden size H, h query heads and g
key-value heads of d channels, and a gated feed-forward layer of F channels::

    linear layers   2 · (H·d·(2h + 2g) + 3·H·F) · L        a multiplication and an addition for each parameter
    causal scores   2 · h·d · L²                           QKᵀ and PV, 2·h·d·L² each, half of it masked
    in a window     2 · h·d · (2·W·L − W²)                 of W last tokens, for L ≥ W

(multi-head latent attention: the parameters of its own projections, and the mean of a key's and a value's channels),

and after the last layer, on response tokens only, ``2 · H·V · R``. As in these sources, norms, rotations, softmax and
the embedding's look-up are left out, and the backward pass takes twice the forward's. The backward pass computes the
output projection once more (:mod:`megatron_dypo.objective.fused_logprobs`), and also the parts that ``model.recompute``
names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.types import Sample


@dataclass(frozen=True, kw_only=True)
class SequenceCost:
    """FLOPs of a sequence: linear·L + quadratic·L² + windowed·(2·w·L − w²) + response·R, over the ranks of a replica
    together; w is the smaller of L and ``window``."""

    linear: float
    quadratic: float
    response: float
    windowed: float = 0.0
    window: int = 0

    def __call__(self, num_tokens: int, num_response_tokens: int) -> float:
        return self.linear * num_tokens + self.scores(num_tokens) + self.response * num_response_tokens

    def scores(self, num_tokens: float) -> float:
        """Return the FLOPs of attention's scores alone."""
        seen = min(num_tokens, self.window)
        return self.quadratic * num_tokens**2 + self.windowed * (2 * seen * num_tokens - seen**2)

    def of(self, sample: Sample) -> float:
        return self(len(sample.tokens), sample.num_response_tokens)


def model_cost(arch: Architecture) -> SequenceCost:
    """Return the FLOPs that an update needs at least: those of :func:`sequence_cost`, with nothing computed twice."""
    cost = sequence_cost(arch)
    return replace(cost, response=2.0 * arch.hidden_size * arch.vocab_size * 3)


def sequence_cost(arch: Architecture, recompute: str = "none") -> SequenceCost:
    """Return the FLOPs of forward and backward pass in the architecture.

    Args:
        recompute: ``ModelConfig.recompute``. ``full`` repeats the forward pass of the layers, ``selective`` only that
            of their attention.
    """
    passes = 3
    width = arch.num_attention_heads * (arch.head_dim + arch.value_dim) // 2
    feed_forward = arch.num_dense_layers * 3 * arch.hidden_size * arch.ffn_hidden_size
    if arch.experts is not None:  # the experts of one token, those that every token passes, and the router
        chosen = 3 * (arch.experts.ffn_hidden_size * arch.experts.per_token + arch.experts.shared_width)
        feed_forward += (
            (arch.num_layers - arch.num_dense_layers) * arch.hidden_size * (chosen + arch.experts.num_experts)
        )
    linear = arch.num_layers * _projections(arch) + feed_forward
    num_windowed = len(arch.windows.layers) if arch.windows else 0
    scores = 2.0 * width * (passes + (recompute in ("full", "selective")))
    return SequenceCost(
        linear=2.0 * linear * (passes + (recompute == "full")),
        quadratic=scores * (arch.num_layers - num_windowed),
        response=2.0 * arch.hidden_size * arch.vocab_size * (passes + 1),
        windowed=scores * num_windowed,
        window=arch.windows.size if arch.windows else 0,
    )


def _projections(arch: Architecture) -> int:
    """Return the parameters of a layer's attention, without norms."""
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    output = heads * arch.value_dim * hidden
    if arch.latent is None:
        return hidden * arch.head_dim * (heads + 2 * arch.num_key_value_heads) + output
    sizes = arch.latent
    queries = heads * sizes.query_dim
    query = hidden * queries if sizes.query_rank is None else sizes.query_rank * (hidden + queries)
    down = hidden * (sizes.key_value_rank + sizes.rope_dim)
    return query + down + sizes.key_value_rank * heads * (sizes.plain_dim + sizes.value_dim) + output
