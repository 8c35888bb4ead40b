"""The number of parameters of the policy, for checks."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_dypo.config.model import ModelConfig
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.planning.parameters import whole_model


def num_parameters(model: ModelConfig, arch: Architecture) -> int | None:
    """Count the parameters by the name table or, without one, by the tensors of ``model.hf_path``.

    None: there is no table, and no whole weights are there, which other checks say.
    """
    if not arch.is_bridged:
        return whole_model(arch).total
    from megatron_dypo.models.hf.files import SafetensorsFiles

    try:
        files = SafetensorsFiles(Path(model.hf_path))
    except ValueError:
        return None
    shapes = [tuple[int, ...](files.slice(name).get_shape()) for name in files.file_of]
    return sum(map(math.prod, shapes))
