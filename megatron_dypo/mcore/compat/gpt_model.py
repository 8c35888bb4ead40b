"""GPTModel with a public method for the step from the last hidden states to the model's output.

Shape legend: T tokens of a packed microbatch, N its response tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dypo.mcore.compat.private_name import PrivateName

POSTPROCESS = PrivateName(
    package="megatron-core",
    module="megatron.core.models.gpt",
    name="GPTModel._postprocess",
    source="NVIDIA/Megatron-LM core_v0.16.1 megatron/core/models/gpt/gpt_model.py:559",
    oldest="0.16",
    takes=("hidden_states", "labels", "loss_mask"),
)
"""Computes logits, or a loss if there are labels, on the last stage."""
POSTPROCESS.get()


class ResponseModel(GPTModel):
    """A GPTModel whose last stage returns :meth:`response_outputs` if it gets labels."""

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, labels: Tensor | None = None, loss_mask: Any = None, **kwargs: Any
    ) -> Any:
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=labels, loss_mask=loss_mask, **kwargs)
        return self.response_outputs(hidden_states, labels, loss_mask)

    def response_outputs(self, hidden_T1H: Tensor, targets_N: Tensor, response_N: Tensor) -> Any:
        """Return the outputs for the tokens ``targets_N`` at the positions ``response_N`` in the microbatch.

        Args:
            hidden_T1H: hidden states; under sequence parallelism those of this rank's tokens.
        """
        raise NotImplementedError
