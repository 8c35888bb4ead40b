"""HF tensors flattened into byte buckets, in SGLang's ``flattened_bucket`` format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Tensors that are sent together."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    """Names of torch's types, without ``torch.``."""
    shapes: tuple[tuple[int, ...], ...]
    payload: Tensor
    """[bytes] uint8: the tensors one after the other. Valid until the next bucket is requested."""


def fill_buckets(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[Bucket]:
    """Flatten tensors into buckets of at most ``limit`` bytes, in one buffer that every bucket reuses.

    A tensor of ``limit`` bytes or more gets its own bucket and is not copied. Within a bucket each tensor starts at a
    multiple of its element size, as the receiver requires.
    """
    buffer = torch.empty(0, dtype=torch.uint8)
    held: list[tuple[str, Tensor]] = []
    used = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and (used + size > limit or used % tensor.element_size()):
            yield _bucket(held, buffer[:used])
            held, used = [], 0
        if size >= limit:
            yield _bucket([(name, tensor)], _bytes(tensor))
            continue
        if not buffer.numel():
            buffer = torch.empty(limit, dtype=torch.uint8, device=tensor.device)
        buffer[used : used + size].copy_(_bytes(tensor))
        # Only the description is kept: a reference would keep the whole tensor alive until the bucket is full.
        held.append((name, tensor.to("meta")))
        used += size
    if held:
        yield _bucket(held, buffer[:used])


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _bucket(tensors: Sequence[tuple[str, Tensor]], payload: Tensor) -> Bucket:
    return Bucket(
        names=tuple(name for name, _ in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for _, tensor in tensors),
        payload=payload,
    )
