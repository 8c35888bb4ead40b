"""Make the real Python packages of Transformer Engine importable in this process, on a machine without a GPU."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

from tests.support.te.extension import NAME, StandIn

_ONNX = "transformer_engine.pytorch.onnx_extensions"
"""Imports ``onnxscript``, which serves exports to ONNX alone."""


def use_transformer_engine(folder: Path) -> None:
    """Import Transformer Engine from ``folder``, over a stand-in of its compiled extension.

    Call this before the first import of Megatron, in a process of its own. A machine with one H100 answers to what
    Transformer Engine asks ``torch.cuda`` while it is imported; tensors are on the CPU.
    """
    from megatron_dypo.parallel import device

    assert not any(name.split(".")[0] in ("megatron", "transformer_engine") for name in sys.modules)
    device.device_kind()  # it is remembered: this package goes on to see a CPU
    _answer_as_h100()
    sys.path.insert(0, str(folder))
    for name in (NAME, _ONNX):
        sys.modules[name] = StandIn(name)
    # Without its own name for the build, transformer_engine.common loads libraries when it is imported.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    package = types.ModuleType("transformer_engine")
    package.__path__ = [str(folder / "transformer_engine")]
    sys.modules["transformer_engine"] = package
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None
    del sys.modules["transformer_engine"]
    import transformer_engine.pytorch

    transformer_engine.common = common
    _use_in_models()


def _use_in_models() -> None:
    """Let this package build models of Transformer Engine's layers, although it sees no GPU."""
    from megatron_dypo.mcore import features

    features.shield_imports = lambda: None
    features.uses_transformer_engine = lambda: True
    features.probe = lambda: features.Features(transformer_engine=True, grad_accumulation_fusion=False)


def _answer_as_h100() -> None:
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )

    def answer(value: Any) -> Any:
        return lambda *args, **kwargs: value

    torch.cuda.is_available = answer(True)
    torch.cuda.device_count = answer(1)
    torch.cuda.current_device = answer(0)
    torch.cuda.get_device_properties = answer(properties)
    torch.cuda.get_device_capability = answer((properties.major, properties.minor))
