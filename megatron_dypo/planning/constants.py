"""The constants of the time model that no data sheet has. All of them are here, each with its origin.

``benchmarks/plan_fit.py`` fits those marked *fitted* to one half of the published runs in
``benchmarks/published_steps.yaml``, starting from a guess that it also holds against the data (``prior``).
``megatron-dypo plan --calibrate`` replaces them by a run's own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Rates relative to data sheets, and seconds that depend on software."""

    matmul: float
    """Fitted. Speed of a layer's kernels in training, relative to ``Gpu.matmul``."""
    expert_matmul: float
    """Fitted. Speed of grouped matmuls of experts, relative to a dense layer's."""
    dense_layer_s: float
    """Fitted. Least seconds of a dense layer's forward pass for one microbatch: the host's launches. A backward pass
    takes two of them."""
    expert_layer_s: float
    """Fitted. The same for a layer of experts with Megatron's all-to-all: routing, permutation, exchange of counts."""
    fused_expert_layer_s: float
    """Fitted. The same with DeepEP or HybridEP (``parallel.expert_dispatcher``)."""
    hbm: float
    """Fitted. Share of the data sheet's memory rate that decoding reaches."""
    decode_layer_s: float
    """Fitted. Seconds of a layer in a decoding step besides reading or multiplying: gaps between its kernels."""
    scheduler_s: float
    """Fitted. Seconds of a decoding step besides its kernels: scheduling, sampling, launches."""
    request_s: float
    """Fitted. Additional seconds of a decoding step for each running request."""
    switch_s: float
    """Fitted. Seconds in which servers on the trainer's GPUs go to sleep and wake, once a rollout batch."""
    loop_s: float
    """Fitted. Seconds of a rollout batch that are in no other part: data, grading, advantages, logs."""
    refit: float
    """A guess. Share of a link's rate that refits reach."""


FITTED = Constants(
    matmul=0.98,
    expert_matmul=0.6,
    dense_layer_s=2.4e-3,
    expert_layer_s=4.53e-3,
    fused_expert_layer_s=3.12e-3,
    hbm=0.705,
    decode_layer_s=6.38e-5,
    scheduler_s=5.09e-3,
    request_s=2.14e-5,
    switch_s=4.79,
    loop_s=3.82,
    refit=0.5,
)
"""The result of ``benchmarks/plan_fit.py``; its output is ``benchmarks/results/plan_fit.txt``."""
