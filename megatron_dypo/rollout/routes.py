"""The experts that a server chose for each token, as SGLang returns them with ``--enable-return-routed-experts``.

An answer has them as base64 of int32 [L − 1, layers, k], of the prompt and the response but its last token
(srt/managers/io_struct.py, ``routed_experts_start_len``, of 0.5.23). Here they are kept in the smallest type, since
they are the largest part of a rollout: 8 experts in each of 94 layers are 752 bytes a token.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_dypo.types import Routes


class RoutesError(ValueError):
    """An answer without the routes of every token."""


@dataclass(frozen=True, kw_only=True)
class RouteShape:
    """The sizes of a model's routes."""

    num_layers: int
    """Layers of the model, those without experts included."""
    per_token: int
    """k: experts of one token in one layer."""
    num_experts: int

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The type of an expert's number. Its largest value is never an expert."""
        return np.dtype(np.uint8 if self.num_experts < np.iinfo(np.uint8).max else np.uint16)

    @property
    def unknown(self) -> int:
        """The value in place of experts that are not known."""
        return int(np.iinfo(self.dtype).max)

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of one token's routes."""
        return self.num_layers * self.per_token * self.dtype.itemsize

    @property
    def answer_bytes_per_token(self) -> int:
        """Return the bytes of one token's routes in an answer: 4 for each expert, in base64."""
        return -(-self.num_layers * self.per_token * 4 * 4 // 3)


def read_routes(encoded: Any, num_tokens: int, shape: RouteShape) -> Routes:
    """Return the [L − 1, layers, k] routes of a sequence.

    Args:
        encoded: ``meta_info.routed_experts`` of an answer, of any type.
        num_tokens: L, tokens of prompt and response.

    Raises:
        RoutesError: it is not the base64 of so many routes, or names an expert that the model does not have.
    """
    if not isinstance(encoded, str):
        raise RoutesError(
            "no routed_experts: the server needs --enable-return-routed-experts, and a router must pass the request on"
        )
    try:
        raw = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RoutesError(f"routed_experts: no base64: {error}") from error
    expected = (num_tokens - 1, shape.num_layers, shape.per_token)
    if len(raw) != 4 * (num_tokens - 1) * shape.num_layers * shape.per_token:
        raise RoutesError(f"routed_experts of {len(raw)} bytes: must be int32 of shape {list(expected)}")
    experts = np.frombuffer(raw, dtype="<i4")
    if len(experts) and not 0 <= int(experts.min()) <= int(experts.max()) < shape.num_experts:
        raise RoutesError(
            f"routed_experts from {experts.min()} to {experts.max()}: must be in [0, {shape.num_experts})"
        )
    return experts.astype(shape.dtype).reshape(expected)
