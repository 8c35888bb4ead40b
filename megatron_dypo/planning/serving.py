"""Estimate one GPU of an SGLang server: its weights, its KV cache and its decoding speed. Pure arithmetic.

A decoding step makes one token of each request. It reads the weights once, and the KV cache of every running request.
So HBM limits the speed until the batch is large. The KV cache limits the number of requests. FP8 weights
(``refit.quantize``) are fewer bytes to hold and to read; their matmuls are assumed to be no faster than in bf16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dypo.planning.footprint import Footprint, Term
from megatron_dypo.planning.memory import RESERVED
from megatron_dypo.planning.parameters import ServedBytes, active_parameters, served_bytes
from megatron_dypo.planning.setting import Setting

MEM_FRACTION = 0.85
"""SGLang's ``--mem-fraction-static`` if none is given. SGLang's own choice depends on GPU and TP and is close to
this."""
HBM_EFFICIENCY = 0.7
"""Share of the data sheet's rate that decoding kernels reach."""
STEP_OVERHEAD_S = 2e-3
"""Scheduling, sampling and kernel launches of a decoding step."""
ALLREDUCE_S = 15e-6
"""Latency of one all-reduce within a node."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The capacity of one server."""

    weights: ServedBytes
    """Weights on all GPUs of the server together."""
    tensor: int
    """GPUs that share the weights."""
    kv_bytes_per_token: float
    """Bytes of KV cache on one GPU. Heads are replicated if there are more GPUs than heads."""
    kv_tokens: float
    """Tokens that its KV cache holds."""

    @property
    def weights_per_gpu(self) -> float:
        return self.weights.total / self.tensor

    def concurrency(self, tokens: float) -> float:
        """Return how many requests of ``tokens`` tokens on average can run at once."""
        return self.kv_tokens / tokens


def make_server(setting: Setting) -> Server:
    """Return a server of the config."""
    arch, servers, e = setting.arch, setting.config.rollout.servers, setting.element
    per_token = float(arch.num_layers * arch.cached_channels(servers.tensor_parallel) * e)
    weights, tensor = served_bytes(arch, e, setting.config.refit.quantize), servers.tensor_parallel
    static = (servers.mem_fraction or MEM_FRACTION) * setting.gpu.memory
    tokens = max(0.0, (static - weights.total / tensor) / per_token)
    if servers.max_total_tokens is not None:
        tokens = min(tokens, servers.max_total_tokens)
    return Server(weights=weights, tensor=tensor, kv_bytes_per_token=per_token, kv_tokens=tokens)


def server_footprint(setting: Setting) -> Footprint:
    """Return the memory of one GPU of a server. Its KV cache holds at least the longest sequence."""
    server, cfg = make_server(setting), setting.config
    fraction, quantize = cfg.rollout.servers.mem_fraction or MEM_FRACTION, cfg.refit.quantize
    longest = cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
    cache = max(server.kv_tokens, longest) * server.kv_bytes_per_token
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
                why=f"{server.kv_tokens:,.0f} tokens × {server.kv_bytes_per_token / 1024:,.0f} KiB; "
                f"{server.kv_tokens / longest:,.1f} of the longest sequences",
            ),
            Term(name="refit bucket", bytes=cfg.refit.bucket_mib * 2.0**20, why="refit.bucket_mib"),
            Term(name="reserved", bytes=outside, why="driver, captured graphs, workspaces"),
        ),
        capacity=setting.gpu.memory,
        elastic=cache - longest * server.kv_bytes_per_token,
    )


def decode_step_s(setting: Setting, server: Server, batch: float) -> float:
    """Return the seconds of one decoding step with ``batch`` running requests, in the middle of their responses."""
    arch, gpu, tensor = setting.arch, setting.gpu, setting.config.rollout.servers.tensor_parallel
    context = setting.assumed.prompt_tokens + setting.assumed.response_tokens / 2
    read = _weights_read(setting, server, batch) + batch * context * server.kv_bytes_per_token
    # Every token also goes through the output projection, which is not among the layers.
    work = 2.0 * batch * (active_parameters(arch) + arch.hidden_size * arch.vocab_size) / tensor
    reduced = 2 * arch.num_layers * _allreduce_s(setting, batch * arch.hidden_size * setting.element, tensor)
    return max(read / (gpu.hbm * HBM_EFFICIENCY), work / (gpu.bf16 * gpu.matmul)) + reduced + STEP_OVERHEAD_S


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
    is_one_node = tensor <= setting.gpus_per_node
    rate = setting.gpu.nvlink if is_one_node else setting.gpu.network
    latency = ALLREDUCE_S * (1 if is_one_node else math.log2(tensor / setting.gpus_per_node) + 1)
    return latency + 2 * size * (tensor - 1) / tensor / rate
