"""The forward passes that Megatron's pipeline schedules keep in flight, and the time that they leave idle. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def chunks_in_flight(*, stage: int, pipeline: int, virtual_pipeline: int, microbatches: int) -> int:
    """Return the most forward passes through a model chunk that wait for their backward pass on one rank.

    1F1B: the stages behind this one, and itself. Interleaved: the warm-up of ``get_pp_rank_microbatches``
    (megatron/core/pipeline_parallel/schedules.py of 0.16.1), and one more.
    """
    total = microbatches * virtual_pipeline
    if pipeline == 1:
        return 1
    if virtual_pipeline == 1:
        return min(total, pipeline - stage)
    return min(total, 2 * (pipeline - stage - 1) + (virtual_pipeline - 1) * pipeline + 1)


def pipeline_seconds(stages: Sequence[float], *, virtual_pipeline: int, microbatches: int) -> float:
    """Return the time of a pass of all rows through the pipeline, given each stage's work: the slowest one's work, and
    while the pipeline fills and drains the other stages' on one row, of one chunk.

    Of equal stages the idle share of the work is (p − 1)/(m·v) (Narayanan et al. 2021, section 2.2).
    """
    slowest = max(stages)
    return slowest + (sum(stages) - slowest) / (microbatches * virtual_pipeline)
