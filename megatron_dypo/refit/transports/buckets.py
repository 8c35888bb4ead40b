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


PARTNERS = {"q_a_proj": "kv_a_proj_with_mqa", "kv_a_proj_with_mqa": "q_a_proj"}
"""Modules of one parameter of SGLang that its loader fills only if both tensors are in one update: it drops a lone one
without a word (0.5.23, ``models/deepseek_common/deepseek_weight_loader.py``, ``cached_a_proj``)."""


def fill_buckets(tensors: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[Bucket]:
    """Flatten tensors into buckets of at most ``limit`` bytes, in one buffer that every bucket reuses.

    A tensor of ``limit`` bytes or more gets its own bucket and is not copied. :data:`PARTNERS` are in one bucket,
    whatever their size. Within a bucket each tensor starts at a multiple of its element size, as the receiver requires.
    """
    buffer = torch.empty(0, dtype=torch.uint8)
    held: list[tuple[str, Tensor]] = []
    used = 0
    for unit in _units(tensors):
        first = unit[0][1]
        size = sum(tensor.numel() * tensor.element_size() for _, tensor in unit)
        if held and (used + size > limit or used % first.element_size()):
            yield _bucket(held, buffer[:used])
            held, used = [], 0
        if size >= limit:
            parts = [_bytes(tensor) for _, tensor in unit]
            yield _bucket(unit, parts[0] if len(parts) == 1 else torch.cat(parts))
            continue
        if not buffer.numel():
            buffer = torch.empty(limit, dtype=torch.uint8, device=first.device)
        for name, tensor in unit:
            end = used + tensor.numel() * tensor.element_size()
            buffer[used:end].copy_(_bytes(tensor))
            # Only the description is kept: a reference would keep the whole tensor alive until the bucket is full.
            held.append((name, tensor.to("meta")))
            used = end
    if held:
        yield _bucket(held, buffer[:used])


def _units(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield tensors one by one, and :data:`PARTNERS` in pairs when the second comes; a lone one at the end."""
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        module, _, kind = name.rpartition(".")
        owner, _, last = module.rpartition(".")
        partner = f"{owner}.{PARTNERS[last]}.{kind}" if last in PARTNERS else None
        if partner is None:
            yield [(name, tensor)]
        elif partner in waiting:
            yield [(partner, waiting.pop(partner)), (name, tensor)]
        else:
            waiting[name] = tensor  # a parameter that all ranks hold, or a gathered tensor of its own
    yield from ([pair] for pair in waiting.items())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _bucket(tensors: Sequence[tuple[str, Tensor]], payload: Tensor) -> Bucket:
    return Bucket(
        names=tuple(name for name, _ in tensors),
        dtypes=tuple(str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors),
        shapes=tuple(tuple(tensor.shape) for _, tensor in tensors),
        payload=payload,
    )
