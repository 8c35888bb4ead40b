"""Megatron-Bridge's provider builds its model of another class than GPTModel.

The provider has no argument for the class: it makes what its module calls ``MCoreGPTModel`` (0.3.1,
``megatron/bridge/models/gpt_provider.py:243``). It takes Megatron's process groups from a private field, which its own
training loop sets (:286).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_PROVIDER = "megatron.bridge.models.gpt_provider"
_MODEL_CLASS = "MCoreGPTModel"


def provide(provider: Any, model: Callable[..., torch.nn.Module], **arguments: Any) -> Any:
    """Return ``provider.provide(**arguments)``, built of ``model`` in place of GPTModel.

    The provider's own steps after that, such as the scaling of embeddings, are kept.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    with _building(model):
        return provider.provide(**arguments)


@contextlib.contextmanager
def _building(model: Callable[..., torch.nn.Module]) -> Iterator[None]:
    """Let the provider's module make ``model`` while the block runs."""
    module = importlib.import_module(_PROVIDER)
    upstream = getattr(module, _MODEL_CLASS)
    setattr(module, _MODEL_CLASS, model)
    try:
        yield
    finally:
        setattr(module, _MODEL_CLASS, upstream)
