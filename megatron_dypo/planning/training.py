"""Estimate the seconds of the trainer's passes: matmuls at a share of the GPU's peak, and communication that is not
hidden. Pure.

FLOPs are those of :mod:`megatron_dypo.models.flops`. Communication by axis, for each microbatch of T tokens and each
layer (Korthikanti et al. 2022, section 4.2.2; Narayanan et al. 2021, section 3):

- tensor: four all-gathers or reduce-scatters of T·H elements in the forward pass and four in the backward pass; with
  sequence parallelism two more, one for each of the two inputs. Each moves (t − 1)/t of T·H elements a rank.
- context: keys and values go round the ring once forward and, with their gradients, twice backward.
- expert: a token's hidden state goes to its experts and back, forward and backward.
- pipeline: sending hidden states between stages, the bubble, and waiting for the stage with the most layers.
- data: gradients in fp32 once an update, and parameters back if the optimizer is distributed.

FP8 speeds up linear layers and their recomputation (``planning/fp8.py``, ``devices.FP8_SHARE``). With ``param_gather``
it also shrinks the parameters that are gathered. Traffic between tensor-parallel ranks is counted in bf16 even so.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.models.flops import SequenceCost, sequence_cost
from megatron_dypo.planning.fp8 import fp8_flops
from megatron_dypo.planning.memory import largest_counts
from megatron_dypo.planning.parameters import Counts
from megatron_dypo.planning.schedule import pipeline_seconds
from megatron_dypo.planning.setting import Setting

LINK_EFFICIENCY = 0.8
BUCKET = 40_000_000
"""Fewest parameters that Megatron's DDP reduces at once (``DistributedDataParallelConfig.bucket_size``)."""
HOP_S = 10e-6
"""Latency of one step of a ring between nodes."""
RING_EXPOSED = 0.25
"""Share of context-parallel traffic that attention does not hide."""


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Seconds of one forward pass, or of a forward and backward pass, over all microbatches of a batch."""

    compute: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    """The bubble, waiting for the slowest stage, and sending hidden states."""
    data: float = 0.0
    """Reducing gradients and gathering parameters, once."""
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        seconds: float = sum(vars(self).values())
        return seconds


def update_time(setting: Setting) -> PassTime:
    """Return the time of one optimizer step."""
    cfg = setting.config
    cost = sequence_cost(setting.arch, cfg.model.recompute)
    passes = 3 + (cfg.model.recompute == "full")
    return pass_time(setting, cost, setting.sequences_per_update, passes, is_update=True)


def logprob_time(setting: Setting, sequences: float) -> PassTime:
    """Return the time of a forward pass over ``sequences`` rollouts, for log π_old or for log π_ref."""
    cost = sequence_cost(setting.arch)
    # An update's cost is three passes, and four of the output projection; this is one of each.
    forward = SequenceCost(linear=cost.linear / 3, quadratic=cost.quadratic / 3, response=cost.response / 4)
    return pass_time(setting, forward, sequences, 1, is_update=False)


def swap_time(setting: Setting) -> float:
    """Return the seconds of moving π_ref into the model and out again. Each way, this rank's parameters go to the host,
    and other parameters come from it."""
    counts = largest_counts(setting)
    return 4 * counts.total * setting.element / setting.gpu.pcie


def update_flops(setting: Setting) -> float:
    """Return the FLOPs of an update that MFU counts: those without recomputation."""
    return _flops(setting, sequence_cost(setting.arch)) * setting.sequences_per_update


def _flops(setting: Setting, cost: SequenceCost) -> float:
    return cost(setting.sequence_tokens, setting.assumed.response_tokens)


def _compute_seconds(setting: Setting, cost: SequenceCost, sequences: float) -> float:
    """Return the seconds of the matmuls of ``sequences`` sequences, spread over all GPUs."""
    flops = _flops(setting, cost) * sequences
    in_fp8 = fp8_flops(setting.arch, setting.config.model.fp8) * cost.linear * setting.sequence_tokens * sequences
    flops -= in_fp8 * (1 - 1 / setting.gpu.fp8_gain)
    return flops / setting.trainer_gpus / (setting.gpu.bf16 * setting.gpu.matmul)


def pass_time(setting: Setting, cost: SequenceCost, sequences: float, passes: int, *, is_update: bool) -> PassTime:
    """Return the time of one pass over all sequences.

    ``cost`` is the cost of one sequence. ``passes`` is the work for each token, in forward passes: a backward pass
    counts as two.
    """
    parallel, arch = setting.config.parallel, setting.arch
    tokens = sequences * setting.sequence_tokens / setting.data / parallel.context
    hidden = tokens * arch.hidden_size * setting.element
    compute = _compute_seconds(setting, cost, sequences)
    layers = arch.num_layers / parallel.pipeline
    tensor = layers * _tensor_seconds(setting, hidden, passes, is_update)
    context = layers * _context_seconds(setting, tokens, is_update)
    expert = layers * _expert_seconds(setting, hidden, is_update)
    busy = compute + tensor + context + expert
    whole = pipeline_seconds(
        [busy * count / layers for count in setting.mesh.stage_layers(arch.num_layers)],
        virtual_pipeline=setting.mesh.virtual_pipeline,
        microbatches=setting.microbatches,
    )
    sent = 0.0
    if parallel.pipeline > 1:
        sent = (2 if is_update else 1) * hidden / parallel.tensor / (LINK_EFFICIENCY * setting.gpu.network)
    data, optimizer = _once(setting) if is_update else (0.0, 0.0)
    return PassTime(
        compute=compute,
        tensor=tensor,
        context=context,
        expert=expert,
        pipeline=whole - busy + sent,
        data=data,
        optimizer=optimizer,
    )


def _link(setting: Setting, span: int) -> float:
    """Return the bytes/s between ranks, if ``span`` neighbouring GPUs communicate."""
    return LINK_EFFICIENCY * (setting.gpu.nvlink if span <= setting.gpus_per_node else setting.gpu.network)


def _tensor_seconds(setting: Setting, hidden: float, passes: int, is_update: bool) -> float:
    """Return the seconds of one layer's tensor-parallel communication; ``hidden``: bytes of all hidden states."""
    parallel = setting.config.parallel
    calls = 8 + 2 * parallel.sequence if is_update else 4
    calls += 4 * (passes == 4)  # the recomputed forward pass
    return calls * hidden * (parallel.tensor - 1) / parallel.tensor / _link(setting, parallel.tensor)


def _context_seconds(setting: Setting, tokens: float, is_update: bool) -> float:
    parallel, arch = setting.config.parallel, setting.arch
    channels = arch.num_key_value_heads * (arch.head_dim + arch.value_dim)
    kv = tokens * channels * setting.element / parallel.tensor
    rounds = (3 if is_update else 1) * (parallel.context - 1)
    return RING_EXPOSED * rounds * kv / _link(setting, parallel.tensor * parallel.context)


def _expert_seconds(setting: Setting, hidden: float, is_update: bool) -> float:
    experts, parallel = setting.arch.experts, setting.config.parallel
    if experts is None:
        return 0.0
    moved = hidden / parallel.tensor * experts.per_token * (parallel.expert - 1) / parallel.expert
    return (4 if is_update else 2) * moved / _link(setting, parallel.expert)


def _once(setting: Setting) -> tuple[float, float]:
    """Return the seconds of reducing gradients over the replicas, and of reading and writing the optimizer's state."""
    cfg, counts = setting.config, largest_counts(setting)
    ranks = setting.data * cfg.parallel.context
    gathered = _gathered_bytes(setting, counts)
    moved = (counts.total * 4 + (gathered if cfg.optimizer.distributed else counts.total * 4)) * (ranks - 1) / ranks
    shards = ranks if cfg.optimizer.distributed else 1
    # The gradient, the main parameter and two moments are read; the last three and the parameter are written.
    touched = (counts.total * (4 * 4 + 3 * 4) + gathered) / shards
    # Megatron's buckets grow to a million parameters for each rank, so the hops do not grow with many ranks.
    hops = 2 * (ranks - 1) * max(1.0, counts.total / max(BUCKET, 1_000_000 * ranks))
    reduced = moved / _link(setting, setting.mesh.stage_size) + hops * HOP_S
    return reduced, touched / setting.gpu.hbm


def _gathered_bytes(setting: Setting, counts: Counts) -> float:
    """Return the bytes of a rank's parameters in the type in which they are written and gathered."""
    fp8 = setting.quantized
    if fp8 is None or not setting.config.model.fp8.param_gather:
        return counts.total * setting.element
    return counts.fp8 * fp8.gathered + counts.other * setting.element
