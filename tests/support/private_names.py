"""Find every PrivateName of the package."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_dypo.mcore import compat
from megatron_dypo.mcore.compat.private_name import PrivateName


def all_private_names() -> dict[str, PrivateName]:
    """Return the private names of ``mcore/compat/``, by file and name."""
    found: dict[str, PrivateName] = {}
    for module in pkgutil.iter_modules(compat.__path__):
        values = vars(importlib.import_module(f"{compat.__name__}.{module.name}"))
        found |= {f"{module.name}.{name}": value for name, value in values.items() if isinstance(value, PrivateName)}
    return found
