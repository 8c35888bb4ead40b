"""The version of the installed Megatron-Core, for code that differs between its releases."""

from __future__ import annotations

import importlib.metadata

from megatron_dypo.supported import numbers

CORE = numbers(importlib.metadata.version("megatron-core"))
"""(0, 19, 2) of Megatron-Core 0.19.2."""
