"""TopKRouter with public methods for the load-balancing loss and for the experts' loads.

Shape legend: T tokens on this rank, E experts.
"""

from __future__ import annotations

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_dypo.mcore.compat.private_name import PrivateName

APPLY_AUX_LOSS = PrivateName(
    package="megatron-core",
    module="megatron.core.transformer.moe.router",
    name="TopKRouter._apply_aux_loss",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/transformer/moe/router.py:275",
    oldest="0.16",
    takes=("probs", "scores_for_aux_loss", "routing_map", "with_padding_mask"),
)
"""Attaches the load-balancing loss ``aux_loss`` to the routing weights; ``TopKRouter.routing`` calls it in training."""
APPLY_AUX_LOSS.get()

APPLY_EXPERT_BIAS = PrivateName(
    package="megatron-core",
    module="megatron.core.transformer.moe.router",
    name="TopKRouter._apply_expert_bias",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/transformer/moe/router.py:512",
    oldest="0.16",
    takes=("routing_map", "padding_mask"),
)
"""Counts the tokens of each expert, for updates of the routers' bias; ``TopKRouter.routing`` calls it. With a mask of
padding it fails: it combines [T, E] with [T]."""
APPLY_EXPERT_BIAS.get()


class RouterWithOwnBalance(TopKRouter):
    """A router whose load-balancing loss :meth:`balanced` computes."""

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        return self.balanced(probs, scores_for_aux_loss, routing_map)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count nothing: the bias stays as it was loaded."""

    def balanced(self, probs_TE: Tensor, scores_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        """Return the routing weights with the loss attached.

        Args:
            scores_TE: softmax over all experts.
            chosen_TE: whether the token goes to the expert.
        """
        raise NotImplementedError
