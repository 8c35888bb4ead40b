"""Count forward passes in flight and idle time in Megatron's pipeline schedules. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def chunks_in_flight(*, stage: int, pipeline: int, virtual_pipeline: int, microbatches: int) -> int:
    """Return the largest number of forward passes through a model chunk that wait for their backward pass on one rank.

    In the 1F1B schedule it is the number of later stages, plus one. In the interleaved schedule it is the warm-up of
    ``get_pp_rank_microbatches`` (megatron/core/pipeline_parallel/schedules.py of 0.16.1), plus one.
    """
    total = microbatches * virtual_pipeline
    if pipeline == 1:
        return 1
    if virtual_pipeline == 1:
        return min(total, pipeline - stage)
    return min(total, 2 * (pipeline - stage - 1) + (virtual_pipeline - 1) * pipeline + 1)


def pipeline_seconds(stages: Sequence[float], *, virtual_pipeline: int, microbatches: float) -> float:
    """Return the time of a pass of all microbatches through the pipeline, given the work of each stage.

    It is the work of the slowest stage, plus the work of the other stages on one chunk of one microbatch, while the
    pipeline fills and drains. For equal stages the idle share is (p − 1)/(m·v) (Narayanan et al. 2021, section 2.2).
    """
    slowest = max(stages)
    return slowest + (sum(stages) - slowest) / (microbatches * virtual_pipeline)
