"""GPTModel whose last stage returns log-probs of response tokens without the logits of a whole microbatch.

Shape legend: T tokens of a packed microbatch, N its response tokens, H hidden size, V vocabulary entries on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_dypo.mcore.compat.gpt_model import ResponseModel
from megatron_dypo.objective.fused_logprobs import GradientSink, fused_logprobs


class PolicyModel(ResponseModel):
    """A model from tokens to log-probs of the response tokens. Prompts and padding cost nothing after the last layer.

    ``model(tokens_1T, positions_1T, None, labels=targets_N, loss_mask=response_N, ...)``, where ``response_N`` are
    positions in the microbatch and ``targets_N`` the token ids there, returns on the last stage
    ``(logp_N, entropy_N)``, fp32; ``entropy_N`` is None in eval mode, unless ``scores_entropy``. Without labels, and on
    other stages, it is GPTModel. Under Megatron's DDP the gradient of the output weight is accumulated in its
    ``main_grad``.
    """

    def __init__(self, *args: Any, num_tokens: int, logprob_memory: int | None = None, **kwargs: Any) -> None:
        """
        Args:
            num_tokens: size of the real vocabulary; GPTModel's ``vocab_size`` includes padding.
            logprob_memory: ``memory_budget`` of ``fused_logprobs``, in bytes.
        """
        super().__init__(*args, **kwargs)
        self._num_tokens = num_tokens
        self._logprob_memory = logprob_memory
        self.scores_entropy = False
        """Whether entropies are computed in eval mode too."""
        self.before_output: Callable[[Tensor], None] = _do_nothing
        """Called with the output weight before it is read. No forward pass of a module reads it, so that Megatron's
        hooks do not see that."""

    def response_outputs(
        self, hidden_T1H: Tensor, targets_N: Tensor, response_N: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs and entropies of the response tokens; see the class."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, group=group)
        hidden_NH = hidden_T1H[:, 0].index_select(0, response_N)
        if not self.config.sequence_parallel:
            hidden_NH = copy_to_tensor_model_parallel_region(hidden_NH, group=group)
        is_tied = self.share_embeddings_and_output_weights
        weight_VH = self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight
        self.before_output(weight_VH)
        return fused_logprobs(
            hidden_NH,
            weight_VH,
            targets_N,
            vocab_size=self._num_tokens,
            group=group,
            with_entropy=self.training or self.scores_entropy,
            memory_budget=self._logprob_memory,
            sink=_main_grad_sink(weight_VH, is_embedding=is_tied and self.pre_process),
        )


def _do_nothing(weight: Tensor) -> None:
    """Do nothing: the weight is whole."""


def _main_grad_sink(weight_VH: Tensor, *, is_embedding: bool) -> GradientSink | None:
    """Return a sink into DDP's fp32 buffer, under the convention of Megatron's own fused weight gradients.

    DDP's hook (distributed_data_parallel.py:427-448) adds ``param.grad`` unless ``grad_added_to_main_grad``; with
    overlap it requires some ``param.grad``. If the parameter is also the embedding, ``param.grad`` is the embedding's
    gradient, which the hook must add (``zero_out_wgrad``). Otherwise it is memory that nobody reads.
    """
    main_grad = getattr(weight_VH, "main_grad", None)
    if main_grad is None or main_grad.dtype != torch.float32:
        return None

    def done() -> Tensor | None:
        if is_embedding:
            return None
        weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(weight_VH)

    return GradientSink(total_VH=main_grad, done=done)
