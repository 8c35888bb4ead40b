"""Estimate one GPU of an SGLang server: its weights, its KV cache and its decoding speed. Pure arithmetic.

A decoding step makes one token of each request. It reads the weights once, and the KV cache of every running request.
So HBM limits the speed until the batch is large. The KV cache limits the number of requests. FP8 weights
(``refit.quantize``) are fewer bytes to hold and to read; their matmuls are assumed to be no faster than in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.planning.footprint import Footprint, Term
from megatron_dypo.planning.memory import RESERVED, largest_counts, model_state
from megatron_dypo.planning.parameters import ServedBytes, active_parameters, served_bytes
from megatron_dypo.planning.setting import Setting

MEM_FRACTION = 0.85
"""SGLang's ``--mem-fraction-static`` if none is given. SGLang's own choice depends on GPU and TP and is close to
this."""
ALLREDUCE_S = 15e-6
"""Latency of one all-reduce within a host."""
HOSTS_ALLREDUCE_S = 50e-6
"""A guess: latency of one all-reduce between hosts, where kernels that read each other's memory do not reach."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The capacity of one server."""

    weights: ServedBytes
    """Weights on all GPUs of the server together."""
    tensor: int
    """GPUs that share the weights."""
    copies: int
    """Copies of attention. Each has its own requests, and a share of the GPUs for their KV cache."""
    kv_bytes_per_token: float
    """Bytes of KV cache on one GPU of a copy. Heads are replicated if there are more GPUs than heads."""
    kv_tokens: float
    """Tokens that its KV cache holds, in all copies together."""

    @property
    def weights_per_gpu(self) -> float:
        return self.weights.total / self.tensor

    @property
    def kv_tokens_per_copy(self) -> float:
        return self.kv_tokens / self.copies

    def concurrency(self, tokens: float) -> float:
        """Return how many requests of ``tokens`` tokens on average can run at once."""
        return self.kv_tokens / tokens


def make_server(setting: Setting) -> Server:
    """Return a server of the config."""
    arch, servers, e = setting.arch, setting.config.rollout.servers, setting.element
    mesh = setting.server_mesh
    copies, tensor = mesh.attention_data, mesh.tensor
    per_token = float(arch.num_layers * arch.cached_channels(mesh.attention) * e)
    weights = served_bytes(arch, e, setting.config.refit.quantize, copies)
    beside = trainer_bytes(setting)
    static = (servers.mem_fraction or MEM_FRACTION) * setting.gpu.memory
    if beside:
        static = min(static, setting.gpu.memory - beside - RESERVED - setting.config.refit.bucket_mib * 2**20)
    tokens = max(0.0, (static - weights.total / tensor) / per_token)
    if servers.max_total_tokens is not None:
        tokens = min(tokens, servers.max_total_tokens)
    return Server(
        weights=weights, tensor=tensor, copies=copies, kv_bytes_per_token=per_token, kv_tokens=copies * tokens
    )


def trainer_bytes(setting: Setting) -> float:
    """Return the memory that the trainer holds on a server's GPU while the server samples; 0: GPUs of its own."""
    if not setting.is_colocated or setting.frees_trainer:
        return 0.0
    return sum(term.bytes for term in model_state(setting, largest_counts(setting)))


def server_footprint(setting: Setting) -> Footprint:
    """Return the memory of one GPU of a server. Its KV cache holds at least the longest sequence."""
    server, cfg = make_server(setting), setting.config
    fraction, quantize = cfg.rollout.servers.mem_fraction or MEM_FRACTION, cfg.refit.quantize
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    cache = max(server.kv_tokens_per_copy, longest) * server.kv_bytes_per_token
    outside = min((1 - fraction) * setting.gpu.memory, RESERVED)
    return Footprint(
        where="server",
        terms=(
            Term(
                name="weights",
                bytes=server.weights_per_gpu,
                why=f"split {server.tensor} ways{'' if quantize == 'none' else f', linear ones in {quantize}'}",
            ),
            Term(
                name="KV cache",
                bytes=cache,
                why=f"{server.kv_tokens_per_copy:,.0f} tokens × {server.kv_bytes_per_token / 1024:,.0f} KiB; "
                f"{server.kv_tokens_per_copy / longest:,.1f} of the longest sequences",
            ),
            *_trainer_beside(setting),
            Term(name="refit bucket", bytes=cfg.refit.bucket_mib * 2.0**20, why="refit.bucket_mib"),
            Term(name="reserved", bytes=outside, why="driver, captured graphs, workspaces"),
        ),
        capacity=setting.gpu.memory,
        elastic=cache - longest * server.kv_bytes_per_token,
    )


def _trainer_beside(setting: Setting) -> list[Term]:
    beside = trainer_bytes(setting)
    return (
        [Term(name="trainer", bytes=beside, why="weights, gradients and optimizer on the same GPU")] if beside else []
    )


def decode_step_s(setting: Setting, server: Server, batch: float, context: float | None = None) -> float:
    """Return the seconds of one decoding step.

    Args:
        batch: running requests.
        context: tokens that a request has on average. None: in the middle of a mean response.
    """
    arch, gpu, tensor = setting.arch, setting.gpu, setting.config.rollout.servers.tensor_parallel
    constants = setting.constants
    if context is None:
        context = setting.assumed.prompt_tokens + setting.assumed.response_tokens / 2
    read = _weights_read(setting, server, batch) + batch / server.copies * context * server.kv_bytes_per_token
    # Every token also goes through the output projection, which is not among the layers.
    work = 2.0 * batch * (active_parameters(arch) + arch.hidden_size * arch.vocab_size) / tensor
    reduced = 2 * arch.num_layers * _allreduce_s(setting, batch * arch.hidden_size * setting.element, tensor)
    kernels = max(read / (gpu.hbm * constants.hbm), work / (gpu.bf16 * gpu.matmul))
    return (
        kernels
        + reduced
        + arch.num_layers * constants.decode_layer_s
        + constants.scheduler_s
        + batch * constants.request_s
    )


def prefill_s(setting: Setting, tokens: float) -> float:
    """Return the seconds that a server takes to read ``tokens`` of prompts."""
    tensor = setting.config.rollout.servers.tensor_parallel
    return 2.0 * tokens * active_parameters(setting.arch) / (tensor * setting.gpu.bf16 * setting.gpu.matmul)


def _weights_read(setting: Setting, server: Server, batch: float) -> float:
    """Return the bytes of weights that a decoding step reads on a GPU. Only experts that a token uses are read."""
    experts = setting.arch.experts
    if experts is None:
        return server.weights_per_gpu
    touched: float = 1 - (1 - experts.per_token / experts.num_experts) ** max(batch, 1)
    return (server.weights.dense + server.weights.experts * touched) / server.tensor


def _allreduce_s(setting: Setting, size: float, tensor: int) -> float:
    if tensor == 1:
        return 0.0
    rate = setting.gpu.nvlink if tensor <= setting.gpus_per_node else setting.gpu.network
    latency = ALLREDUCE_S if tensor <= setting.gpu.per_host else HOSTS_ALLREDUCE_S
    return latency + 2 * size * (tensor - 1) / tensor / rate
