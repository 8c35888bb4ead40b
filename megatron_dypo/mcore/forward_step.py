"""An objective's loss inside Megatron's pipeline schedules. Shape legend in ``megatron_dypo.types``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_dypo.mcore.attention import packed_seq_params
from megatron_dypo.mcore.chunks import unwrap
from megatron_dypo.mcore.moe_router import begin_update
from megatron_dypo.mcore.routing_replay import forget_microbatches, replayed, slots_of
from megatron_dypo.metrics.progress import Progress
from megatron_dypo.objective.loss import LossInputs, sum_names
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.parallel.device import device
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.types import Microbatch, Routes


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceMicrobatch:
    """A microbatch on the device; N are its response tokens.

    ``inputs`` holds the streams (:mod:`megatron_dypo.objective.streams`), which only the loss reads.
    """

    tokens_1T: Tensor
    positions_1T: Tensor
    packed: PackedSeqParams
    padding_1T: Tensor
    """True at padding."""
    response_N: Tensor
    """Positions whose target is a response token."""
    targets_N: Tensor
    inputs: LossInputs
    routes: Routes | None
    """[T, layers, k] The experts to take, still on the CPU; see :mod:`megatron_dypo.mcore.routing_replay`."""


def to_device(batch: Microbatch) -> DeviceMicrobatch:
    """Move the values that the forward pass and the loss read to the device."""
    response_N = np.flatnonzero(batch.response_T)

    def at_response(stream_T: np.ndarray) -> Tensor:
        return torch.from_numpy(stream_T[response_N]).to(device())

    def whole(stream_T: np.ndarray) -> Tensor:
        return torch.from_numpy(stream_T.astype(np.int64))[None].to(device())

    return DeviceMicrobatch(
        tokens_1T=whole(batch.tokens_T),
        positions_1T=whole(batch.positions_T),
        packed=packed_seq_params(torch.from_numpy(batch.cu_seqlens_S).to(device())),
        padding_1T=torch.from_numpy(batch.sample_T < 0)[None].to(device()),
        response_N=torch.from_numpy(response_N).to(device()),
        targets_N=at_response(batch.targets_T.astype(np.int64)),
        inputs=LossInputs(
            streams={name: at_response(stream_T) for name, stream_T in batch.streams.items()},
            sequence=at_response(batch.sequence_T.astype(np.int64)),
            num_sequences=len(batch.cu_seqlens_S) - 1,
        ),
        routes=batch.routes,
    )


def loss_pass(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    *,
    objective: Objective,
    context_group: dist.ProcessGroup | None = None,
    bar: Progress | None = None,
) -> dict[str, float]:
    """Run forward and backward over all microbatches. The DDP buffers then hold gradients summed over replicas.

    The weights of the loss include the global normalisation, so nothing here divides by microbatches, tokens or ranks.

    Args:
        microbatches: packed with the objective's streams.
        context_group: ranks that hold the other parts of the same microbatches (context parallelism).

    Returns:
        The named sums of the loss over this replica's tokens on the last pipeline stage; zeros on other stages.

    Raises:
        ValueError: the names of the sums differ between microbatches.
    """
    names = sum_names(objective.loss, objective.streams)

    def loss(batch: DeviceMicrobatch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logp_N, entropy_N = output
        value, sums = objective.loss(logp_N, entropy_N, batch.inputs, across)
        if sums.keys() != set(names):
            raise ValueError(f"objective's sums {sorted(sums)}: must be {sorted(names)}, as without tokens")
        return value, torch.tensor(1, dtype=torch.int), torch.stack([sums[name] for name in names])

    across = None
    if context_group is not None and context_group.size() > 1:
        across = partial(_all_reduce, group=context_group)
    begin_update(chunks, sum(int((batch.sample_T >= 0).sum()) for batch in microbatches))
    reports = _run(chunks, microbatches, loss, forward_only=False, bar=bar)
    totals = sum(reports, start=torch.zeros(len(names), dtype=torch.float64, device=device()))
    return dict(zip(names, totals.tolist(), strict=True))


def add_over_ranks(sums: Mapping[str, float], layout: MeshRank) -> dict[str, float]:
    """Add the sums of :func:`loss_pass` over the world, counting each token once. Collective."""
    totals = torch.tensor(list(sums.values()), dtype=torch.float64, device=device())
    totals *= layout.tp_rank == 0
    dist.all_reduce(totals)
    return dict(zip(sums, totals.tolist(), strict=True))


def score_pass(chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch]) -> Tensor:
    """Run forward and backward of Σ log π over the response tokens. The microbatches need no streams.

    Returns:
        [] float64 Σ log π over the tokens of this context-parallel rank, on the last pipeline stage; 0 on other stages.
    """

    def total(batch: DeviceMicrobatch, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logp_N = output[0]
        return logp_N.sum(), torch.tensor(1, dtype=torch.int), logp_N.detach().double().sum()

    reports = _run(chunks, microbatches, total, forward_only=False)
    return sum(reports, start=torch.zeros((), dtype=torch.float64, device=device()))


def logprob_pass(
    chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], *, entropy: bool = False
) -> list[Tensor]:
    """Return [N] fp32 log-probs of each microbatch's response tokens, forward only; [] off the last pipeline stage.

    Args:
        entropy: return the entropies of the distributions that the tokens are from instead.
    """

    def collect(batch: DeviceMicrobatch, value_N: Tensor, non_loss_data: bool) -> Tensor:
        return value_N.float().cpu()

    with torch.no_grad():
        return _run(chunks, microbatches, collect, forward_only=True, keeps=int(entropy))


def _run(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    finish: Callable[..., object],
    *,
    forward_only: bool,
    keeps: int = 0,
    bar: Progress | None = None,
) -> list[Tensor]:
    """Run Megatron's schedule for this layout.

    On the last stage ``finish(batch, (logp_N, entropy_N))`` runs; forward only it gets that of both which ``keeps``
    counts, since beside experts Megatron asks what a forward-only pass made for its device
    (pipeline_parallel/schedules.py:286).
    """

    def forward_step(iterator: Iterator[DeviceMicrobatch], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
        batch = next(iterator)
        with replayed(slots[id(model)], batch.routes, is_recomputed=is_recomputed):
            output = model(
                batch.tokens_1T,
                batch.positions_1T,
                None,
                packed_seq_params=batch.packed,
                padding_mask=batch.padding_1T if has_experts else None,
                labels=batch.targets_N,
                loss_mask=batch.response_N,
            )
        return output[keeps] if forward_only and isinstance(output, tuple) else output, partial(finish, batch)

    config, slots = unwrap(chunks[0]).config, slots_of(chunks)
    has_experts = config.num_moe_experts is not None
    is_recomputed = config.recompute_granularity is not None and not forward_only
    batches = [to_device(batch) for batch in microbatches]
    iterators = [iter(batches) for _ in chunks]
    if bar is not None:
        iterators[0] = _counted(batches, bar)
    schedule = get_forward_backward_func()
    try:
        outputs: list[Tensor] = schedule(
            forward_step_func=forward_step,
            data_iterator=iterators,
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=int(microbatches[0].cu_seqlens_S[-1]),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )
    finally:
        forget_microbatches(slots)
    return outputs


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor


def _counted(batches: Sequence[DeviceMicrobatch], bar: Progress) -> Iterator[DeviceMicrobatch]:
    for batch in batches:
        bar.update(1)
        yield batch
