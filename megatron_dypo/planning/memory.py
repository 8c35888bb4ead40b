"""Count the memory of one trainer rank, term by term, as ``mcore/`` allocates it. Pure arithmetic.

Symbols: T tokens of a microbatch on this rank, t tensor-parallel ranks, e bytes of an element of the model.

For each parameter Megatron's DDP and optimizer hold the parameter (e bytes), a gradient (4 bytes,
``grad_reduce_in_fp32``), two moments (4 bytes each), and for bf16 an fp32 main parameter. The distributed optimizer
divides the last three by the number of ranks with the same parameters. ``planning/fp8.py`` describes the effect of FP8
on parameters and activations.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from megatron_dypo.config.tree import Config
from megatron_dypo.objective.chunks import BLOCKS_SHARE, LOGITS_SHARE, SCRATCH_SHARE, rows_of_chunks
from megatron_dypo.planning.activations import FP32, LayerBytes, layer_bytes, norm_bytes
from megatron_dypo.planning.devices import GIB
from megatron_dypo.planning.footprint import Footprint, Term
from megatron_dypo.planning.fp8 import fp8_layers
from megatron_dypo.planning.parameters import Counts, stage_parameters
from megatron_dypo.planning.schedule import chunks_in_flight
from megatron_dypo.planning.setting import Setting

RESERVED = int(2.5 * GIB)
"""Bytes for the driver's context, buffers of the communication library and workspaces of matmuls."""
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
FRAGMENTATION = 0.05
"""Memory that the caching allocator holds but cannot use, relative to an update's allocations."""


def trainer_footprints(setting: Setting) -> list[Footprint]:
    """Return the footprint of one rank in each pipeline stage, first to last."""
    return [_stage(setting, stage) for stage in range(setting.config.parallel.pipeline)]


def stage_counts(setting: Setting, stage: int) -> Counts:
    """Count the parameters of one rank of a stage."""
    parallel, arch = setting.config.parallel, setting.arch
    return stage_parameters(
        arch,
        tensor=parallel.tensor,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        layers=setting.mesh.stage_layers(arch.num_layers)[stage],
        is_first=stage == 0,
        is_last=stage == parallel.pipeline - 1,
        fp8_layers=_fp8_layers(setting, stage),
        dense_layers=_dense_layers(setting, stage),
    )


def largest_counts(setting: Setting) -> Counts:
    """Count the parameters of one rank of the stage that has the most."""
    stages = range(setting.config.parallel.pipeline)
    return max((stage_counts(setting, stage) for stage in stages), key=lambda counts: counts.total)


def reference_bytes(setting: Setting) -> float:
    """Return the host memory of the reference policy's copies on one node (``mcore/reference.py``)."""
    return largest_counts(setting).total * setting.element * min(setting.gpus_per_node, setting.trainer_gpus)


def _stage(setting: Setting, stage: int) -> Footprint:
    counts, parallel = stage_counts(setting, stage), setting.config.parallel
    held = model_state(setting, counts)
    update = [_activations(setting, stage), _working_set(setting, stage, counts)]
    update += [_gather_buffer(setting), _streams(setting)]
    fixed = []
    if setting.on_gpu:
        slack = FRAGMENTATION * sum(term.bytes for term in (*held, *update))
        fixed = [
            Term(name="reserved", bytes=RESERVED, why="driver, communication, workspaces"),
            Term(name="fragmentation", bytes=slack, why=f"{FRAGMENTATION:.0%} of all above"),
        ]
    where = f"trainer, stage {stage + 1} of {parallel.pipeline}" if parallel.pipeline > 1 else "trainer"
    return Footprint(where=where, terms=(*held, *update, *fixed), capacity=setting.gpu.memory)


def model_state(setting: Setting, counts: Counts) -> list[Term]:
    """Return the memory of parameters, gradients and optimizer."""
    cfg, e = setting.config, setting.element
    mesh = setting.mesh
    shards, expert_shards = mesh.stage_size // mesh.tensor, mesh.stage_size // mesh.expert_ranks
    if not cfg.optimizer.distributed:
        shards = expert_shards = 1
    state = optimizer_bytes(cfg, e)
    kind = "main parameter and two moments" if e < FP32 else "two moments"
    sharing = f" shared {shards} ways" if cfg.optimizer.distributed else ", optimizer.distributed=false"
    kept = 1 - cfg.optimizer.cpu_offload
    offload = f", {cfg.optimizer.cpu_offload:.0%} of it on the host" if cfg.optimizer.cpu_offload else ""
    gradient = FP32 if cfg.parallel.megatron.get("grad_reduce_in_fp32", True) else e
    return [
        *_parameters(setting, counts),
        Term(
            name="gradients",
            bytes=counts.total * gradient,
            why=f"{'fp32' if gradient == FP32 else f'{gradient} B'}, all of them on every replica",
        ),
        Term(
            name="optimizer",
            bytes=kept * state * (counts.dense / shards + counts.experts / expert_shards),
            why=f"{'' if cfg.optimizer.precision_aware else 'fp32 '}{kind}, {state} B{sharing}{offload}",
        ),
    ]


def optimizer_bytes(config: Config, element: int) -> int:
    """Return the bytes of optimizer state for each parameter: two moments, and a main parameter beside a bf16 one.

    With ``optimizer.precision_aware`` the moments have the types of ``optimizer.megatron``, and the main parameter is
    the 16 bits that the bf16 parameter lacks. Muon keeps one moment of a matrix; it is planned like Adam.
    """
    if not config.optimizer.precision_aware:
        return 2 * FP32 + (FP32 if element < FP32 else 0)
    given = config.optimizer.megatron
    moments = [_SIZES.get(str(given.get(name, "float32")), FP32) for name in ("exp_avg_dtype", "exp_avg_sq_dtype")]
    main = 2 if given.get("store_param_remainders", True) else FP32
    return sum(moments) + (main if element < FP32 else 0)


def _parameters(setting: Setting, counts: Counts) -> list[Term]:
    """Return the memory of the parameters, and of FP8 copies that exist in addition to bf16 parameters."""
    e, fp8 = setting.element, setting.quantized
    if fp8 is None:
        return [Term(name="parameters", bytes=counts.total * e, why=f"{counts.total / 1e9:.3f}e9 × {e} B")]
    copies = counts.fp8 * fp8.weight
    in_fp8 = f"{counts.fp8 / 1e9:.3f}e9 × {fp8.weight:.3g} B in FP8"
    if not setting.config.model.fp8.param_gather:
        return [
            Term(name="parameters", bytes=counts.total * e, why=f"{counts.total / 1e9:.3f}e9 × {e} B"),
            Term(name="FP8 weights", bytes=copies, why=f"{in_fp8}, beside those"),
        ]
    each = e * (2 if fp8.is_buffered else 1)
    why = f"{in_fp8}, {counts.other / 1e9:.3f}e9 × {each} B"
    return [Term(name="parameters", bytes=copies + counts.other * each, why=why)]


def _fp8_layers(setting: Setting, stage: int) -> int:
    return fp8_layers(setting.config.model.fp8, setting.mesh, setting.arch.num_layers, stage)


def _dense_layers(setting: Setting, stage: int) -> int:
    """Return how many layers of a stage have an MLP."""
    arch = setting.arch
    return sum(not arch.has_experts(layer) for layer in setting.mesh.layers_of(stage, arch.num_layers))


def _activations(setting: Setting, stage: int) -> Term:
    """Return the memory that layers keep from forward to backward pass, over all microbatches in flight."""
    cfg, arch, e = setting.config, setting.arch, setting.element
    parallel = cfg.parallel
    virtual, tokens = setting.mesh.virtual_pipeline, setting.row_tokens / parallel.context
    between = parallel.tensor if parallel.sequence else 1
    in_flight = chunks_in_flight(
        stage=stage, pipeline=parallel.pipeline, virtual_pipeline=virtual, microbatches=setting.microbatches
    )
    layers = setting.mesh.stage_layers(arch.num_layers)[stage] // virtual
    kept = in_flight * layers * _mean_kept(setting, stage)
    if parallel.pipeline > 1:
        kept += in_flight * e * arch.hidden_size / between  # sent tensors stay until their gradients come back
    if stage == parallel.pipeline - 1:
        kept += norm_bytes(arch.hidden_size, e, fused=setting.fused) / between
    noun = ("row" if virtual == 1 else "chunk pass") + ("s" if virtual == 1 else "es") * (in_flight > 1)
    return Term(
        name="activations",
        bytes=tokens * kept,
        why=f"{in_flight} {noun} in flight × {layers} layers × {tokens:,.0f} tokens, recompute={cfg.model.recompute}",
    )


def _mean_kept(setting: Setting, stage: int) -> float:
    """Return the bytes for each token that a layer of the stage keeps, averaged over bf16 and FP8 layers, and over
    layers with an MLP and with experts."""
    parallel, recompute = setting.config.parallel, setting.config.model.recompute
    layers = setting.mesh.stage_layers(setting.arch.num_layers)[stage]
    narrow, dense = _fp8_layers(setting, stage) / layers, _dense_layers(setting, stage) / layers

    def mean(kind: bool) -> float:
        bf16, fp8 = (layer.kept(recompute, parallel.tensor, parallel.sequence) for layer in _layers(setting, kind))
        return bf16 + narrow * (fp8 - bf16)

    return dense * (mean(False) if dense else 0.0) + (1 - dense) * (mean(True) if dense < 1 else 0.0)


def _layers(setting: Setting, has_experts: bool) -> tuple[LayerBytes, LayerBytes]:
    """Return the bytes of a layer in the parameters' type, and of one in FP8; without FP8 both are the same."""
    make = partial(
        layer_bytes,
        setting.arch if has_experts else replace(setting.arch, experts=None),
        setting.element,
        fused=setting.fused,
        expert_tensor=setting.config.parallel.expert_tensor,
    )
    return make(), make(fp8=setting.quantized)


def _working_set(setting: Setting, stage: int, counts: Counts) -> Term:
    """Return the memory, besides activations, of the backward pass of one layer, or of the loss if it needs more."""
    parallel, tokens = setting.config.parallel, setting.row_tokens / setting.config.parallel.context
    recompute = setting.config.model.recompute
    kinds = {setting.arch.has_experts(layer) for layer in setting.mesh.layers_of(stage, setting.arch.num_layers)}
    layers = [layer for kind in kinds for layer in _layers(setting, kind)]
    working = max(layer.working(recompute, parallel.tensor, parallel.sequence) for layer in layers)
    backward = tokens * working + setting.element * counts.largest  # a weight's gradient, before it is added
    loss = _loss(setting, tokens) if stage == parallel.pipeline - 1 else 0.0
    why = "backward pass of one layer" if backward > loss else "the loss: logits, gradients of hidden states and weight"
    return Term(name="working set", bytes=max(backward, loss), why=why)


def _loss(setting: Setting, tokens: float) -> float:
    """Return the bytes that ``objective/fused_logprobs.py`` holds if every token of the microbatch is a response token.

    On a GPU, where kernels read the logits, there are a chunk of them in fp32 and its gradients in the weight's type. A
    CPU's forward pass holds a chunk, and a copy of some of its rows for the entropy; its backward pass converts blocks
    of the weight. Both hold the gradients of the chosen hidden states in two types, and the gradient of the output
    weight that is returned to autograd.
    """
    arch, e = setting.arch, setting.element
    width = -(-arch.vocab_size // setting.config.parallel.tensor)
    budget = _logprob_budget(setting, width)
    narrower = e if e < FP32 else 0
    most = (budget / (FP32 + narrower) if setting.on_gpu else budget * LOGITS_SHARE / FP32) / width
    rows = rows_of_chunks(math.ceil(tokens), max(1, int(most)))
    logits, hidden = rows * width * FP32, tokens * arch.hidden_size
    if setting.on_gpu:
        forward, operands = 0.0, float(rows * width * narrower)
    else:
        forward = min(budget * SCRATCH_SHARE, logits)
        operands = min(budget * BLOCKS_SHARE, width * arch.hidden_size * FP32) if narrower else 0.0
    backward = e * width * arch.hidden_size + e * hidden + 2 * FP32 * rows * arch.hidden_size
    chosen = e * hidden * (2 if setting.config.parallel.sequence else 1)  # gathered ones, response tokens'
    return chosen + logits + operands + max(forward, backward) + 20 * FP32 * tokens


def _logprob_budget(setting: Setting, width: int) -> float:
    """Return the scratch bytes of ``fused_logprobs``: the config's, or its default."""
    given = setting.config.model.logprob_memory_mib
    return max(256 * 2**20, width * setting.arch.hidden_size * FP32) if given is None else given * 2**20


def _gather_buffer(setting: Setting) -> Term:
    parallel = setting.config.parallel
    size = setting.row_tokens / parallel.context * setting.arch.hidden_size * setting.element
    return Term(
        name="gather buffer",
        bytes=size if parallel.sequence else 0.0,
        why="inputs of layers gathered over tensor-parallel ranks" if parallel.sequence else "no sequence parallelism",
    )


def _streams(setting: Setting) -> Term:
    """Return the memory of an update's microbatches, which are all on the device from its start
    (``mcore/forward_step.py``)."""
    tokens = setting.microbatches * min(setting.row_tokens, setting.config.batching.tokens_per_microbatch)
    per_token = 17 + 61  # ids, positions and padding; for a response token also targets, streams and indices
    return Term(
        name="rows", bytes=per_token * tokens / setting.config.parallel.context, why="token streams of the update"
    )
