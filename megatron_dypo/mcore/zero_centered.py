"""Norms whose weight is stored minus one (``layernorm_zero_centered_gamma``), for layers without Transformer Engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised ``hidden``, of the same shape."""
        return F.layer_norm(hidden, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised ``hidden``, of the same shape."""
        assert self.weight is not None
        return F.rms_norm(hidden, self.normalized_shape, self.weight + 1, self.eps)
