"""Whether a layout suits a mixture of experts; imports neither torch nor Megatron."""

from __future__ import annotations

from megatron_dypo.architecture import Architecture
from megatron_dypo.config import ParallelConfig


def check_experts(arch: Architecture, parallel: ParallelConfig) -> None:
    """Whether the axes fit a mixture of experts, or the lack of one.

    Raises:
        ValueError: names the axis and the rule.
    """
    if arch.experts is None:
        if parallel.expert > 1:
            raise ValueError(f"expert_parallel={parallel.expert}: a {arch.family} model has no experts")
        return
    if arch.experts.num_experts % parallel.expert:
        raise ValueError(f"expert_parallel={parallel.expert} does not divide num_experts={arch.experts.num_experts}")
    if parallel.tensor > 1 and not parallel.sequence:
        raise ValueError(
            f"tensor_parallel={parallel.tensor}: a mixture of experts needs parallel.sequence=true with it "
            "(Megatron refuses to train one otherwise)"
        )
