"""A synthetic policy and batch that depend only on sizes: the same on every machine and in every precision."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_dypo.checks import require, require_positive
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.objective.totals import add_counts, count_groups
from megatron_dypo.types import Sample, SampleKind, Totals, Treatment

GROUP_SIZE, NUM_CORRECT = 8, 3
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class CheckSizes:
    """Sizes of the policy and of the batch."""

    hidden: int = 4096
    layers: int = 4
    head_dim: int = 128
    vocab: int = 32_000
    tokens: int = 18_432
    """Approximate tokens of one update; a microbatch holds up to half of them."""
    length: int = 1024
    """Tokens of each sequence; a quarter is prompt."""
    steps: int = 50

    def __post_init__(self) -> None:
        require_positive(self, "hidden", "layers", "head_dim", "vocab", "tokens", "steps")
        require(self.hidden % self.head_dim == 0, f"hidden={self.hidden}", f"must be a multiple of {self.head_dim}")
        require(self.length >= 8, f"length={self.length}", "must be at least 8")
        fewest = (GROUP_SIZE + 1) * self.length
        require(self.tokens >= fewest, f"tokens={self.tokens}", f"must hold a group and a trace: {fewest} at least")


def architecture(sizes: CheckSizes) -> Architecture:
    """Return a Llama with four query heads for a key-value head, and 3.5 × hidden in the feed-forward layer."""
    heads = sizes.hidden // sizes.head_dim
    return Architecture(
        family="llama",
        num_layers=sizes.layers,
        hidden_size=sizes.hidden,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        head_dim=sizes.head_dim,
        ffn_hidden_size=7 * sizes.hidden // 2,
        vocab_size=sizes.vocab,
        max_position_embeddings=sizes.length,
        norm_epsilon=1e-5,
        rope_theta=500_000.0,
        rope_scaling=None,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
    )


def make_samples(sizes: CheckSizes) -> list[Sample]:
    """Return groups of rollouts, some of them right (Mid), and one trace (Hard) for each, up to ``tokens`` tokens."""
    generator = np.random.default_rng(0)
    samples = []
    for order in range(sizes.tokens // ((GROUP_SIZE + 1) * sizes.length)):
        prompt = generator.integers(0, sizes.vocab, sizes.length // 4, dtype=np.int32)
        for member in range(GROUP_SIZE + 1):
            is_trace = member == GROUP_SIZE
            response = generator.integers(0, sizes.vocab, sizes.length - len(prompt), dtype=np.int32)
            samples.append(
                Sample(
                    order=2 * order + is_trace,
                    member=0 if is_trace else member,
                    treatment=Treatment.DISTILL if is_trace else Treatment.REINFORCE,
                    kind=SampleKind.TRACE if is_trace else SampleKind.ROLLOUT,
                    tokens=np.concatenate([prompt, response]),
                    num_prompt_tokens=len(prompt),
                    policy_version=0,
                    is_correct=member < NUM_CORRECT,
                    reward=float(member < NUM_CORRECT),
                    rollout_logp=None if is_trace else np.zeros(len(response), np.float32),
                )
            )
    return samples


def count(samples: Sequence[Sample]) -> Totals:
    """Return the totals of the whole batch."""
    return add_counts([count_groups([list(group) for _, group in itertools.groupby(samples, key=lambda s: s.order)])])
