"""The token-local loss inside Megatron's pipeline schedules. Shape legend in ``megatron_dypo.types``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dypo.config import ObjectiveConfig
from megatron_dypo.mcore.attention import packed_seq_params
from megatron_dypo.objective.loss import STATISTICS, LossInputs, token_loss
from megatron_dypo.parallel.device import device
from megatron_dypo.progress import Progress
from megatron_dypo.types import Microbatch


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceMicrobatch:
    """A microbatch as the model wants it; N are its response tokens."""

    tokens_1T: Tensor
    positions_1T: Tensor
    packed: PackedSeqParams
    response_N: Tensor
    """Positions in the row whose target is a response token."""
    targets_N: Tensor
    inputs: LossInputs


def to_device(batch: Microbatch) -> DeviceMicrobatch:
    """Move what the forward pass and the loss read."""
    response_N = np.flatnonzero(batch.response_T)

    def at_response(stream_T: np.ndarray) -> Tensor:
        return torch.from_numpy(stream_T[response_N]).to(device())

    def row(stream_T: np.ndarray) -> Tensor:
        return torch.from_numpy(stream_T.astype(np.int64))[None].to(device())

    return DeviceMicrobatch(
        tokens_1T=row(batch.tokens_T),
        positions_1T=row(batch.positions_T),
        packed=packed_seq_params(torch.from_numpy(batch.cu_seqlens_S).to(device())),
        response_N=torch.from_numpy(response_N).to(device()),
        targets_N=at_response(batch.targets_T.astype(np.int64)),
        inputs=LossInputs(
            advantage=at_response(batch.advantage_T),
            surrogate=at_response(batch.surrogate_T),
            kl=at_response(batch.kl_T),
            nll=at_response(batch.nll_T),
            old_logp=at_response(batch.old_logp_T),
            ref_logp=at_response(batch.ref_logp_T),
            rollout_logp=at_response(batch.rollout_logp_T),
            is_trace=at_response(batch.is_trace_T),
        ),
    )


def loss_pass(
    chunks: Sequence[Any],
    microbatches: Sequence[Microbatch],
    *,
    cfg: ObjectiveConfig,
    bar: Progress | None = None,
) -> Tensor:
    """Forward and backward over all microbatches; gradients end in the DDP buffers, summed over replicas.

    The loss is globally normalised by its weights, so nothing here divides by microbatches, tokens or ranks.

    Returns:
        [len(STATISTICS)] float64 sums over this replica's tokens on the last pipeline stage, zeros elsewhere.
    """

    def loss(batch: DeviceMicrobatch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logp_N, entropy_N = output
        value, sums = token_loss(logp_N, entropy_N, batch.inputs, cfg)
        return value, torch.tensor(1, dtype=torch.int), sums

    reports = _run(chunks, microbatches, loss, forward_only=False, bar=bar)
    return sum(reports, start=torch.zeros(len(STATISTICS), dtype=torch.float64, device=device())).cpu()


def logprob_pass(chunks: Sequence[Any], microbatches: Sequence[Microbatch]) -> list[Tensor]:
    """Forward only: [N] fp32 log-probs of each microbatch's response tokens; [] off the last pipeline stage."""

    def collect(batch: DeviceMicrobatch, output: tuple[Tensor, Tensor], non_loss_data: bool) -> Tensor:
        return output[0].cpu()

    with torch.no_grad():
        return _run(chunks, microbatches, collect, forward_only=True)


def _run(
    chunks: Sequence[Any],
    microbatches: Sequence[Microbatch],
    finish: Callable[..., Any],
    *,
    forward_only: bool,
    bar: Progress | None = None,
) -> list[Any]:
    """Megatron's schedule for this layout; ``finish(batch, (logp_N, entropy_N))`` runs on the last stage."""

    def forward_step(iterator: Iterator[DeviceMicrobatch], model: Any) -> tuple[Any, Callable[..., Any]]:
        batch = next(iterator)
        output = model(
            batch.tokens_1T,
            batch.positions_1T,
            None,
            packed_seq_params=batch.packed,
            labels=batch.targets_N,
            loss_mask=batch.response_N,
        )
        return output, partial(finish, batch)

    batches = [to_device(batch) for batch in microbatches]
    iterators = [iter(batches) for _ in chunks]
    if bar is not None:
        iterators[0] = _counted(batches, bar)
    schedule = get_forward_backward_func()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iterators,
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=int(microbatches[0].cu_seqlens_S[-1]),
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )


def _counted(batches: Sequence[DeviceMicrobatch], bar: Progress) -> Iterator[DeviceMicrobatch]:
    for batch in batches:
        bar.update(1)
        yield batch
