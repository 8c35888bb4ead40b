"""GPU memory that another process opens must not lie in segments that grow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from megatron_dypo.mcore.compat.storages import shareable_memory


class Allocator:
    """A stand-in for torch's allocator: its setting, and the pool of the block."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.settings: list[str] = []
        self.pool: object = None
        patch.setattr(torch.cuda.memory, "_set_allocator_settings", self.settings.append)
        patch.setattr(torch.cuda, "MemPool", object)
        patch.setattr(torch.cuda, "use_mem_pool", self.use)

    @contextlib.contextmanager
    def use(self, pool: object) -> Iterator[None]:
        self.pool = pool
        yield
        self.pool = None


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_do_not_grow_inside_the_block_and_do_after_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    allocator = Allocator(monkeypatch)
    monkeypatch.setenv(name, "max_split_size_mb:64, expandable_segments:True")
    with shareable_memory() as owner:
        assert allocator.settings == ["expandable_segments:False"]
        assert allocator.pool is owner, "memory of the pool that grows must not be used again"
    assert allocator.settings == ["expandable_segments:False", "expandable_segments:True"]
    with contextlib.suppress(KeyError), shareable_memory():
        raise KeyError
    assert allocator.settings[-1] == "expandable_segments:True"


def test_the_allocator_is_left_alone_if_segments_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    with shareable_memory():
        pass
    assert allocator.settings == []
