"""Megatron-Bridge's provider builds its model of another class than GPTModel.

The provider has no argument for the class: it makes what its module calls ``MCoreGPTModel``. It takes Megatron's
process groups from a private field, which its own training loop sets.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_dypo.mcore.compat.private_name import PrivateName

MODEL_CLASS = PrivateName(
    package="megatron-bridge",
    module="megatron.bridge.models.gpt_provider",
    name="MCoreGPTModel",
    source="NVIDIA-NeMo/Megatron-Bridge 0.3.1 src/megatron/bridge/models/gpt_provider.py:277",
    oldest="0.3",
)
"""The class of the model that a provider makes."""
PROCESS_GROUPS = PrivateName(
    package="megatron-bridge",
    module="megatron.bridge.models.gpt_provider",
    name="GPTModelProvider._pg_collection",
    source="NVIDIA-NeMo/Megatron-Bridge 0.3.1 src/megatron/bridge/models/gpt_provider.py:196",
    oldest="0.3",
)
"""The field with the process groups; None in the class."""


def provide(provider: Any, model: Callable[..., torch.nn.Module], **arguments: Any) -> Any:
    """Return ``provider.provide(**arguments)``, built of ``model`` in place of GPTModel.

    The provider's own steps after that, such as the scaling of embeddings, are kept.

    Raises:
        RuntimeError: this Megatron-Bridge has other private names.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    PROCESS_GROUPS.get()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    with _building(model):
        return provider.provide(**arguments)


@contextlib.contextmanager
def _building(model: Callable[..., torch.nn.Module]) -> Iterator[None]:
    """Let the provider's module make ``model`` while the block runs."""
    upstream, module = MODEL_CLASS.get(), importlib.import_module(MODEL_CLASS.module)
    setattr(module, MODEL_CLASS.name, model)
    try:
        yield
    finally:
        setattr(module, MODEL_CLASS.name, upstream)
