"""The router of a mixture of experts: Megatron's, with a load-balancing loss that keeps its own normaliser.

For each layer and each microbatch with n real tokens (without padding), E experts, and k experts for each token::

    L = E · Σ_e f_e · P_e      f_e = share of the n·k assignments that expert e got
                               P_e = mean over the n tokens of the softmax over all experts

so that L = 1 under perfect balance. The loss gets the term ``coefficient · Σ_layers Σ_microbatches (n/N) · L``, where N
counts the real tokens of all microbatches of all replicas in the update. This is a mean over tokens, however they are
spread over microbatches and ranks. (transformers' ``load_balancing_loss_func`` is k · L for one layer; it pools the
layers, so that one layer's imbalance can cancel another's.)

Megatron's own loss does not fit: with ``calculate_per_token_loss`` it is multiplied by the number of tokens, because
all gradients are later divided by the global number of tokens (transformer/moe/router.py:456-472 of 0.16.1). A globally
normalised objective has no such division.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_tokens_per_expert_and_token_count
from torch import Tensor

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.mcore.compat.router import RouterWithOwnBalance
from megatron_dypo.models.experts import BiasedSigmoid, Experts
from megatron_dypo.parallel.device import device


class BalancedRouter(RouterWithOwnBalance):
    """See the module's docstring. Shape legend: T tokens on this rank, E experts."""

    update_tokens: float = 0.0
    """N of the update, set by :func:`begin_update`; 0 outside of updates, when there is no load-balancing loss."""
    balance: Tensor | float = 0.0
    """This rank's part of Σ (n/N) · L so far in the update; a tensor after the first microbatch."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route: [T, 1, E] logits → [T, E] routing weights, [T, E] whether chosen. The mask is True at padding."""
        if padding_mask is not None and len(padding_mask) != len(logits):
            # Megatron cuts the mask for sequence parallelism on the first stage only (models/gpt/gpt_model.py:314).
            padding_mask = padding_mask.chunk(self.tp_group.size())[self.tp_group.rank()]
        routed: tuple[Tensor, Tensor] = super().routing(logits, padding_mask=padding_mask)
        return routed

    def balanced(self, probs_TE: Tensor, scores_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        """Attach this rank's part of coefficient · (n/N) · L to the routing weights. Inputs are 0 at padding."""
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0 or self.update_tokens == 0:
            return probs_TE
        counts_E, _, num_tokens = get_tokens_per_expert_and_token_count(
            chosen_TE, self.tp_cp_group, topk=self.topk, with_padding_mask=True
        )
        # This rank's part of n·L: the softmax of its tokens. It is 0 for a microbatch of padding only.
        total = (scores_TE.sum(dim=0) * counts_E).sum() * self.config.num_moe_experts
        loss = total / (self.topk * num_tokens.clamp(min=1)) / self.update_tokens
        self.balance = self.balance + loss.detach()
        scaled: Tensor = MoEAuxLossAutoScaler.apply(probs_TE, coefficient * loss)
        return scaled


def routers(chunks: Sequence[torch.nn.Module]) -> Iterator[BalancedRouter]:
    """Yield the routers of this rank's layers; none in a dense model."""
    for chunk in chunks:
        yield from (module for module in chunk.modules() if isinstance(module, BalancedRouter))


def expert_biases(chunk: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the router biases of a chunk, [E] fp32, under their names in it. They are buffers, not parameters."""
    for name, module in chunk.named_modules():
        if isinstance(module, BalancedRouter) and module.expert_bias is not None:
            yield f"{name}.expert_bias", module.expert_bias


def keep_bias_in_fp32(chunk: torch.nn.Module) -> None:
    """Make the router biases fp32 again, which a wrapper has converted to the parameters' type.

    Megatron does so at the first forward pass only (transformer/moe/router.py:196 of 0.16.1), when loaded values would
    be rounded already.
    """
    for module in chunk.modules():
        if isinstance(module, BalancedRouter) and module.expert_bias is not None:
            module.expert_bias = module.expert_bias.float()


def mark_experts(chunk: torch.nn.Module) -> None:
    """Make DDP sum gradients of experts over the ranks that hold the same experts. Call it before DDP wraps the chunk.

    Megatron marks expert parameters only under expert parallelism (tensor_parallel/layers.py:829,886,1209 of 0.16.1).
    Without the mark, each tensor-parallel rank would keep the gradient of only its own tokens, and split experts would
    be reduced over ranks that hold other parts. It marks the bias of an expert's output as one that tensor-parallel
    ranks hold in common (:1228): it would add to its gradient those of other ranks' experts, and count it in the
    gradient's norm on the first rank alone.
    """
    for name, parameter in chunk.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def begin_update(chunks: Sequence[torch.nn.Module], num_tokens: int) -> None:
    """Tell the routers how many real tokens the update has. Collective over data-parallel ranks if they balance.

    Args:
        num_tokens: real tokens of all microbatches of this replica; under context parallelism only those of this rank's
            parts.
    """
    mine = [router for router in routers(chunks) if router.is_aux_loss_enabled()]
    if not mine:
        return
    total = torch.tensor([float(num_tokens)], dtype=torch.float64, device=device())
    dist.all_reduce(total, group=mine[0].tp_dp_cp_group)
    for router in mine:
        router.update_tokens = float(total) / router.tp_group.size()
        router.balance = 0.0


@contextmanager
def leave_out_balance(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Run the block's passes without the load-balancing loss."""
    mine = list(routers(chunks))
    before = [router.update_tokens for router in mine]
    for router in mine:
        router.update_tokens = 0.0
    try:
        yield
    finally:
        for router, num_tokens in zip(mine, before, strict=True):
            router.update_tokens = num_tokens


def balance_metrics(chunks: Sequence[torch.nn.Module]) -> dict[str, float]:
    """Return the load-balancing loss of the update, without its coefficient, as a mean over the layers; {} without one.

    Collective over the world after the backward pass.
    """
    mine = [router for router in routers(chunks) if router.is_aux_loss_enabled()]
    if not mine:
        return {}
    total = torch.tensor([sum(float(router.balance) for router in mine)], dtype=torch.float64, device=device())
    dist.all_reduce(total)
    return {"train/load_balancing_loss": float(total) / mine[0].config.num_layers}


def moe_settings(
    experts: Experts, *, grouped: bool, parallel: ParallelConfig, moe_aux_loss_coef: float
) -> dict[str, Any]:
    """Return the fields of Megatron's configuration."""
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # The softmax over the chosen experts' logits equals the softmax over all, divided by the sum of the chosen.
        "moe_router_pre_softmax": not experts.normalized,
        # Logits in the model's type, softmax in fp32, as in transformers and the rollout servers.
        "moe_router_dtype": None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": moe_aux_loss_coef,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
        "moe_shared_expert_intermediate_size": experts.shared_width or None,
        **_sigmoid_settings(experts.biased_sigmoid),
    }


def _sigmoid_settings(router: BiasedSigmoid | None) -> dict[str, Any]:
    if router is None:
        return {}
    is_limited = router.top_groups < router.num_groups
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,  # the bias stays as it was loaded
        "moe_router_topk_scaling_factor": router.scale,
        "moe_router_num_groups": router.num_groups if is_limited else None,
        "moe_router_group_topk": router.top_groups if is_limited else None,
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",  # as in transformers, also for the logits
    }
