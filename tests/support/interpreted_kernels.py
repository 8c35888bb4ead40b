"""This package's Triton kernels without a GPU: Triton's interpreter runs them in numpy."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_dypo import objective
from megatron_dypo.objective import fused_logprobs
from megatron_dypo.objective.projection import Projection

NAME = "megatron_dypo.objective.exponentials_triton"


@functools.cache
def interpreted() -> ModuleType:
    """Return the module of the kernels, imported for the interpreter. Other imports of it, or of Triton, are as usual.

    Triton looks at its setting when it decorates a function, those of its own library too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in list(sys.modules):
            if name == NAME or (name.split(".")[0] == "triton" and not name.startswith("triton._C")):
                patch.delitem(sys.modules, name)
        before = set(sys.modules)
        patch.setattr(objective, NAME.rpartition(".")[2], None, raising=False)
        module = importlib.import_module(NAME)
        for name in set(sys.modules) - before:
            del sys.modules[name]
    return module


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let ``fused_logprobs`` compute in the kernels for fp32. Return a list that grows by a name with each launch."""
    kernels, launches = interpreted(), list[str]()
    one_at_a_time = threading.Lock()  # the interpreter replaces functions of triton.language while a kernel runs

    class Counted(kernels.TritonExponentials):  # type: ignore[name-defined]
        def sums(self, *args: Any) -> None:
            with one_at_a_time:
                launches.append("sums")
                super().sums(*args)

        def gradients(self, *args: Any, **options: Any) -> torch.Tensor:
            with one_at_a_time:
                launches.append("gradients")
                result: torch.Tensor = super().gradients(*args, **options)
                return result

    def choose(call: Any, projection: Projection, device: torch.device) -> Any:
        assert call.dtype == torch.float32
        return Counted(projection.operand)

    monkeypatch.setattr(fused_logprobs._Call, "exponentials", choose)
    return launches
