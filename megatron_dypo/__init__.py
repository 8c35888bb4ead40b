"""DYPO (Dynamic Policy Optimization, arXiv 2604.08926) for Megatron-Core and SGLang.

The names of ``__all__`` are the public interface; ``docs/python_api.md`` describes them. Each is imported when it is
first asked for, so that ``import megatron_dypo`` loads neither torch nor Megatron.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Cause": "megatron_dypo.ending",
    "Config": "megatron_dypo.config.tree",
    "DataConfig": "megatron_dypo.config.data",
    "GradingConfig": "megatron_dypo.config.grading",
    "Tier": "megatron_dypo.types",
    "Verifier": "megatron_dypo.grading.verify",
    "dump_config": "megatron_dypo.config.reading.load",
    "gal_coefficients": "megatron_dypo.objective.gal",
    "grade_tier": "megatron_dypo.grading.tiers",
    "group_advantages": "megatron_dypo.objective.advantage",
    "load_config": "megatron_dypo.config.reading.load",
    "load_tokenizer": "megatron_dypo.data.tokenizer.open",
    "open_prompts": "megatron_dypo.data.dataset",
    "read_metrics": "megatron_dypo.metrics.records",
    "read_samples": "megatron_dypo.metrics.samples",
    "render_report": "megatron_dypo.metrics.report.page",
    "run_training": "megatron_dypo.launch.from_python",
    "verify_choice": "megatron_dypo.grading.choice",
    "verify_exact": "megatron_dypo.grading.exact",
    "verify_math": "megatron_dypo.grading.math",
}
"""Public name → the module that defines it. No name may be that of a module of the package: importing that module would
replace the name."""

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'megatron_dypo' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
