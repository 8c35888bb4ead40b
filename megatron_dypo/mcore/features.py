"""Transformer Engine and Apex: probed here and nowhere else."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_dypo.checks import require
from megatron_dypo.config.fp8 import Fp8Config, Recipe, dotted, missing_capability
from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.config.training import OptimizerConfig
from megatron_dypo.parallel import device
from megatron_dypo.supported import numbers

_GPU_ONLY = ("transformer_engine", "apex")
_MUON_SINCE = (0, 17)
"""Megatron whose Muon works with the ``emerging_optimizers`` that PyPI has."""
_PACKAGES = ("deep_ep", "emerging_optimizers")
_OLDEST_TE: dict[Recipe, tuple[int, int]] = {
    "delayed": (2, 0),
    "tensorwise": (2, 2),
    "blockwise": (2, 3),
    "mxfp8": (2, 1),
}
"""Recipe → oldest version of Transformer Engine."""
_NOTICES = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""Logger of core 0.17 to 0.19 → beginning of a notice to programmers, which a user of this package cannot act on."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Features:
    """Which optional parts are in use."""

    transformer_engine: bool
    """Layers, attention and fused Adam of Transformer Engine."""
    grad_accumulation_fusion: bool
    """Weight-gradient GEMMs add into the main gradient (Apex' ``fused_weight_gradient_mlp_cuda``)."""
    fp8_obstacles: Mapping[str, str] = field(default_factory=dict)
    """FP8 recipe → reason, for each recipe that cannot run on this machine."""
    on_gpu: bool = False
    packages: frozenset[str] = frozenset()
    """Those of ``deep_ep`` and ``emerging_optimizers`` that are installed."""
    megatron: str = ""
    """Version of megatron-core."""

    def require(self, parallel: ParallelConfig, optimizer: OptimizerConfig) -> None:
        """Refuse named options that this machine cannot run.

        Raises:
            ValueError: e.g. ``optimizer.cpu_offload=0.5: needs a GPU: this machine has none``.
        """
        dispatcher, no_gpu = parallel.expert_dispatcher, "a GPU: this machine has none"
        muon = "optimizer.algorithm=muon"
        needs = (
            (dispatcher != "alltoall", self.on_gpu, f"parallel.expert_dispatcher={dispatcher}", no_gpu),
            (optimizer.cpu_offload > 0, self.on_gpu, f"optimizer.cpu_offload={optimizer.cpu_offload}", no_gpu),
            (
                optimizer.precision_aware,
                self.transformer_engine,
                "optimizer.precision_aware=true",
                "Transformer Engine, which is not in use here",
            ),
            (
                dispatcher != "alltoall",
                "deep_ep" in self.packages,
                f"parallel.expert_dispatcher={dispatcher}",
                "the package deep_ep, which is not installed",
            ),
            (
                optimizer.algorithm == "muon",
                "emerging_optimizers" in self.packages,
                muon,
                "the package emerging_optimizers, which is not installed",
            ),
            (
                optimizer.algorithm == "muon",
                numbers(self.megatron) >= _MUON_SINCE,
                muon,
                f"megatron-core {dotted(_MUON_SINCE)} or newer, found {self.megatron}",
            ),
        )
        for is_asked, is_there, value, what in needs:
            require(is_there or not is_asked, value, f"needs {what}")

    def __str__(self) -> str:
        layers = "Transformer Engine" if self.transformer_engine else "torch, padded causal attention"
        fusion = "fused (Apex)" if self.grad_accumulation_fusion else "plain"
        return f"layers: {layers}; gradient accumulation: {fusion}"


def shield_imports() -> None:
    """Hide GPU-only packages from Megatron if there is no GPU. Call it before the first import of ``megatron``.

    Without a GPU ``import transformer_engine`` raises RuntimeError, which Megatron's ``except ImportError`` does not
    catch. PyPI's ``apex`` is a different project, which Megatron would mistake for NVIDIA's.
    """
    # A dozen of Megatron's modules warn that they found neither. Features reports once what is in use.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    # Its checkpoints use deprecated parts of torch, which warn for each tensor.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed\.checkpoint")
    for logger, notice in _NOTICES.items():
        logging.getLogger(logger).addFilter(functools.partial(_begins_otherwise, notice))
    for name in _GPU_ONLY:
        found = importlib.util.find_spec(name) is not None
        if found and not (device.on_gpu() and _is_nvidias(name)):
            _log.warning("%s is installed but cannot be used here; it is left out", name)
            sys.modules[name] = None  # type: ignore[assignment]


def uses_transformer_engine() -> bool:
    """Return whether models are built of Transformer Engine's layers. It does not start CUDA."""
    return device.on_gpu() and importlib.util.find_spec("transformer_engine") is not None


def probe() -> Features:
    """Return the features that work on this machine."""
    has_te = uses_transformer_engine()
    return Features(
        transformer_engine=has_te,
        grad_accumulation_fusion=device.on_gpu() and _loads("fused_weight_gradient_mlp_cuda"),
        fp8_obstacles=fp8_obstacles(
            te_version=importlib.metadata.version("transformer_engine") if has_te else None,
            capability=device.compute_capability(),
            toolkit=device.toolkit_version(),
        ),
        on_gpu=device.on_gpu(),
        megatron=importlib.metadata.version("megatron-core"),
        packages=frozenset(name for name in _PACKAGES if importlib.util.find_spec(name) is not None),
    )


def fp8_obstacles(
    *, te_version: str | None, capability: tuple[int, int] | None, toolkit: tuple[int, ...]
) -> dict[str, str]:
    """Return FP8 recipe → missing requirement. The rules are those of Transformer Engine
    (:data:`megatron_dypo.config.fp8.CAPABILITIES`) and Megatron (``fp8_utils.get_fp8_recipe``).

    Args:
        te_version: version of Transformer Engine; None: not in use.
        capability: compute capability of the GPU; None on a CPU.
        toolkit: version of the CUDA toolkit with which torch was built.
    """
    obstacles: dict[str, str] = {}
    for recipe, oldest in _OLDEST_TE.items():
        if capability is None:
            obstacles[recipe] = "a GPU: this machine has none"
        elif te_version is None:
            obstacles[recipe] = "Transformer Engine, which is not installed"
        elif numbers(te_version) < oldest:
            obstacles[recipe] = f"Transformer Engine {dotted(oldest)} or newer, found {te_version}"
        elif missing := missing_capability(recipe, capability):
            obstacles[recipe] = missing
        elif recipe == "blockwise" and toolkit < (12, 9):
            obstacles[recipe] = f"a torch built with toolkit 12.9 or newer, found {dotted(toolkit) or 'none'}"
    return obstacles


def require_fp8(fp8: Fp8Config, features: Features) -> None:
    """Refuse a recipe that cannot run here.

    Raises:
        ValueError: e.g. ``model.fp8.recipe=mxfp8: needs compute capability 10.0 or higher and below 12.0, found 9.0``.
    """
    obstacle = features.fp8_obstacles.get(fp8.recipe)
    require(obstacle is None, f"model.fp8.recipe={fp8.recipe}", f"needs {obstacle}")


def _begins_otherwise(notice: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(notice)


def _loads(extension: str) -> bool:
    """Return whether a compiled module is there and fits this torch. Megatron raises later if it does not."""
    try:
        importlib.import_module(extension)
    except ImportError as error:
        if importlib.util.find_spec(extension) is not None:
            _log.warning("%s is installed but cannot be loaded (%s); it is left out", extension, error)
        return False
    return True


def _is_nvidias(name: str) -> bool:
    return name != "apex" or importlib.util.find_spec("apex.multi_tensor_apply") is not None
