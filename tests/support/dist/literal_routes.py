"""transformers' models with the experts of given routes: a router in a few lines, in the model's own precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.types import Routes, Sample


@contextmanager
def routed(model: Any, sample: Sample) -> Iterator[None]:
    """Run the block with the routes of the sample in every layer; without routes the model chooses."""
    if sample.routes is None:
        yield
        return
    is_gpt_oss = model.config.model_type == "gpt_oss"
    name = "router" if is_gpt_oss else "gate"
    gates = {i: getattr(layer.mlp, name) for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, name)}
    before = [gate.forward for gate in gates.values()]
    for index, gate in gates.items():
        bias, is_normalized = (gate.bias, True) if is_gpt_oss else (None, gate.norm_topk_prob)
        gate.forward = _router(gate, bias, is_normalized, sample.routes[:, index])
    try:
        yield
    finally:
        for gate, forward in zip(gates.values(), before, strict=True):
            gate.forward = forward


def _router(gate: Any, bias: Tensor | None, is_normalized: bool, routes_LK: Routes) -> Any:
    unknown = np.iinfo(routes_LK.dtype).max
    is_sigmoid = hasattr(gate, "e_score_correction_bias")

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden.reshape(-1, gate.hidden_dim), gate.weight, bias)
        scores = torch.sigmoid(logits) if is_sigmoid else torch.softmax(logits, dim=-1)
        rows = []
        for position, row in enumerate(scores + gate.e_score_correction_bias if is_sigmoid else logits):
            given = routes_LK[position].tolist() if position < len(routes_LK) else [unknown]
            rows.append(torch.topk(row, gate.top_k).indices if unknown in given else torch.tensor(given))
        chosen = torch.stack(rows)
        weights = scores.gather(1, chosen)
        if is_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if is_sigmoid:
            weights = gate.routed_scaling_factor * weights
        return logits, weights, chosen

    return forward


def random_routes(sample: Sample, *, layers: int, per_token: int, num_experts: int, seed: int) -> Routes:
    """Return random routes of all tokens but the last; those of every fifth are not known."""
    rng = np.random.default_rng(seed)
    size = (len(sample.tokens) - 1, layers, num_experts)
    routes = rng.random(size).argsort(axis=-1)[..., :per_token].astype(np.uint8)
    routes[4::5] = np.iinfo(np.uint8).max
    return routes
