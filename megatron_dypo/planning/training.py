"""Estimate the seconds of the trainer's passes: matmuls at a share of the GPU's peak, and communication that is not
hidden. Pure.

FLOPs are those of :mod:`megatron_dypo.models.flops`. Communication by axis, for each microbatch of T tokens and each
layer (Korthikanti et al. 2022, section 4.2.2; Narayanan et al. 2021, section 3):

- tensor: four all-gathers or reduce-scatters of T·H elements in the forward pass and four in the backward pass; with
  sequence parallelism two more, one for each of the two inputs. Each moves (t − 1)/t of T·H elements a rank.
- context: keys and values go round the ring once forward and, with their gradients, twice backward.
- expert: a token's hidden state goes to its experts and back, forward and backward. Ranks of the same node exchange
  over NVLink, at the same time as others over the network.
- pipeline: sending hidden states between stages, the bubble, and waiting for the stage with the most layers.
- launches: a layer takes at least the seconds in which the host launches it for a microbatch, whatever its size
  (``constants.py``).
- data: gradients in fp32 once an update, and parameters back if the optimizer is distributed.

FP8 speeds up linear layers and their recomputation (``planning/fp8.py``, ``devices.FP8_SHARE``). With ``param_gather``
it also shrinks the parameters that are gathered. Traffic between tensor-parallel ranks is counted in bf16 even so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dypo.models.flops import SequenceCost, sequence_cost
from megatron_dypo.planning.fp8 import expert_share, fp8_flops
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
"""Share of context-parallel traffic that attention does not hide, and of tensor-parallel traffic that matmuls do not
hide under ``tp_comm_overlap``."""


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Seconds of one forward pass, or of a forward and backward pass, over all microbatches of a batch."""

    compute: float
    tensor: float
    context: float
    expert: float
    launches: float
    """The GPU waits for the host, whose launches of a layer take longer than the layer."""
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
    forward = replace(
        cost,
        linear=cost.linear / 3,
        quadratic=cost.quadratic / 3,
        windowed=cost.windowed / 3,
        response=cost.response / 4,
    )
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


def _layer_seconds(setting: Setting, cost: SequenceCost, sequences: float) -> float:
    """Return the seconds of the matmuls of all layers for ``sequences`` sequences, spread over all GPUs."""
    linear = cost.linear * setting.sequence_tokens
    slower = 1 / setting.constants.expert_matmul - 1
    in_fp8 = fp8_flops(setting.arch, setting.config.model.fp8) * (1 - 1 / setting.gpu.fp8_gain)
    flops = linear * (1 + expert_share(setting.arch) * slower) * (1 - in_fp8)
    flops += cost.scores(setting.sequence_tokens)
    return flops * sequences / setting.trainer_gpus / _rate(setting)


def _output_seconds(setting: Setting, cost: SequenceCost, sequences: float) -> float:
    """Return the seconds of the output projection, spread over the GPUs of the last stage."""
    flops = cost.response * setting.assumed.response_tokens * sequences * setting.output_passes / 4
    return flops * setting.config.parallel.pipeline / setting.trainer_gpus / _rate(setting)


def _rate(setting: Setting) -> float:
    """Return the FLOP/s that a GPU reaches in bf16."""
    return setting.gpu.bf16 * setting.gpu.matmul * setting.constants.matmul


def pass_time(setting: Setting, cost: SequenceCost, sequences: float, passes: int, *, is_update: bool) -> PassTime:
    """Return the time of one pass over all sequences.

    ``cost`` is the cost of one sequence. ``passes`` is the work for each token, in forward passes: a backward pass
    counts as two.
    """
    parallel, arch = setting.config.parallel, setting.arch
    tokens = sequences * setting.sequence_tokens / setting.data / parallel.context
    hidden = tokens * arch.hidden_size * setting.element
    layer_compute, output = (seconds(setting, cost, sequences) for seconds in (_layer_seconds, _output_seconds))
    layers = arch.num_layers / parallel.pipeline
    tensor = layers * _tensor_seconds(setting, hidden, passes, is_update)
    context = layers * _context_seconds(setting, tokens, is_update)
    expert = layers * _expert_seconds(setting, hidden, passes, layer_compute / layers)
    microbatches = setting.microbatches_of(sequences)
    on_gpu = layer_compute + tensor + context + expert
    launches = max(0.0, layers * microbatches * passes * _launch_s(setting) - on_gpu)
    busy = on_gpu + launches
    stages = [busy * count / layers for count in setting.mesh.stage_layers(arch.num_layers)]
    if setting.balanced_output:
        stages = [stage + output / parallel.pipeline for stage in stages]
    else:
        stages[-1] += output
    whole = pipeline_seconds(stages, virtual_pipeline=setting.mesh.virtual_pipeline, microbatches=microbatches)
    compute = layer_compute + output / parallel.pipeline
    sent = 0.0
    if parallel.pipeline > 1:
        sent = (2 if is_update else 1) * hidden / parallel.tensor / (LINK_EFFICIENCY * setting.gpu.network)
    data, optimizer = _once(setting, busy / microbatches) if is_update else (0.0, 0.0)
    return PassTime(
        compute=compute,
        tensor=tensor,
        context=context,
        expert=expert,
        launches=launches,
        pipeline=whole - busy - output / parallel.pipeline + sent,
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
    shown = RING_EXPOSED if setting.config.model.megatron.get("tp_comm_overlap", False) else 1.0
    return shown * calls * hidden * (parallel.tensor - 1) / parallel.tensor / _link(setting, parallel.tensor)


def _context_seconds(setting: Setting, tokens: float, is_update: bool) -> float:
    parallel, arch = setting.config.parallel, setting.arch
    channels = arch.num_key_value_heads * (arch.head_dim + arch.value_dim)
    kv = tokens * channels * setting.element / parallel.tensor
    rounds = (3 if is_update else 1) * (parallel.context - 1)
    return RING_EXPOSED * rounds * kv / _link(setting, parallel.tensor * parallel.context)


def _launch_s(setting: Setting) -> float:
    constants = setting.constants
    if setting.arch.experts is None:
        return constants.dense_layer_s
    is_alltoall = setting.config.parallel.expert_dispatcher == "alltoall"
    return constants.expert_layer_s if is_alltoall else constants.fused_expert_layer_s


def _expert_seconds(setting: Setting, hidden: float, passes: int, compute: float) -> float:
    """Return the seconds of one layer's exchange of tokens between experts that nothing hides.

    Args:
        hidden: bytes of all hidden states.
        passes: a forward pass and the recomputed one exchange twice, a backward pass too (and counts as two passes).
        compute: seconds of the layer's matmuls, which hide the exchange if Megatron overlaps them.
    """
    experts, parallel = setting.arch.experts, setting.config.parallel
    if experts is None or parallel.expert == 1:
        return 0.0
    moved = hidden / parallel.tensor * experts.per_token
    near = min(parallel.expert, max(1, setting.gpus_per_node // parallel.expert_tensor))
    inside = moved * (near - 1) / parallel.expert / (LINK_EFFICIENCY * setting.gpu.nvlink)
    nodes = parallel.expert / near
    copies = (nodes - 1) / nodes
    if parallel.expert_dispatcher != "alltoall":  # a token goes once to each other node that has an expert for it
        copies = min(copies, (nodes - 1) * (1 - (1 - 1 / nodes) ** experts.per_token) / experts.per_token)
    outside = moved * copies / (LINK_EFFICIENCY * setting.gpu.network)
    exchange = {1: 2, 3: 4, 4: 6}[passes] * max(inside, outside)
    is_hidden = bool(parallel.megatron.get("overlap_moe_expert_parallel_comm", False))
    return max(0.0, exchange - compute) if is_hidden else exchange


def _once(setting: Setting, microbatch: float) -> tuple[float, float]:
    """Return the seconds of reducing gradients over the replicas that nothing hides, and of reading and writing the
    optimizer's state; ``microbatch``: seconds of one, whose backward pass hides a reduction that overlaps it."""
    cfg, counts = setting.config, largest_counts(setting)
    ranks = setting.data * cfg.parallel.context
    copies = setting.mesh.stage_size // setting.mesh.expert_ranks
    gathered = _gathered_bytes(setting, counts)
    share = (counts.dense * (ranks - 1) / ranks + counts.experts * (copies - 1) / copies) / counts.total
    moved = (counts.total * 4 + (gathered if cfg.optimizer.distributed else counts.total * 4)) * share
    shards = ranks if cfg.optimizer.distributed else 1
    # The gradient, the main parameter and two moments are read; the last three and the parameter are written.
    touched = (counts.total * (4 * 4 + 3 * 4) + gathered) / shards
    # Megatron's buckets grow to a million parameters for each rank, so the hops do not grow with many ranks.
    hops = 2 * (ranks - 1) * max(1.0, counts.total / max(BUCKET, 1_000_000 * ranks))
    reduced = moved / _link(setting, setting.mesh.stage_size) + hops * HOP_S
    hidden = microbatch * (2 * cfg.optimizer.overlap_grad_reduce + cfg.optimizer.overlap_param_gather) / 3
    return max(0.0, reduced - hidden), touched / setting.gpu.hbm


def _gathered_bytes(setting: Setting, counts: Counts) -> float:
    """Return the bytes of a rank's parameters in the type in which they are written and gathered."""
    fp8 = setting.quantized
    if fp8 is None or not setting.config.model.fp8.param_gather:
        return counts.total * setting.element
    return counts.fp8 * fp8.gathered + counts.other * setting.element
