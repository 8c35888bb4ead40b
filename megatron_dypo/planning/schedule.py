"""What Megatron's pipeline schedules keep in flight, and what they leave idle. Pure."""

from __future__ import annotations


def chunks_in_flight(*, stage: int, pipeline: int, virtual_pipeline: int, microbatches: int) -> int:
    """Forward passes through a model chunk whose backward pass has not been made yet, at most, on one rank.

    1F1B: the stages behind this one, and itself. Interleaved: the warm-up of ``get_pp_rank_microbatches``
    (megatron/core/pipeline_parallel/schedules.py of 0.16.1), and one more.
    """
    total = microbatches * virtual_pipeline
    if pipeline == 1:
        return 1
    if virtual_pipeline == 1:
        return min(total, pipeline - stage)
    return min(total, 2 * (pipeline - stage - 1) + (virtual_pipeline - 1) * pipeline + 1)


def bubble(*, pipeline: int, virtual_pipeline: int, microbatches: int) -> float:
    """Idle time over working time: (p − 1)/(m·v) (Narayanan et al. 2021, section 2.2)."""
    return (pipeline - 1) / (microbatches * virtual_pipeline)
