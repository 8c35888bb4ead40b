"""Private names of other packages, which may change without notice."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass
from typing import Any

from megatron_dypo.supported import is_at_least

_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class PrivateName:
    """A private name, with the version and the signature that this package uses."""

    package: str
    """The distribution that has it, by its name for pip."""
    module: str
    name: str
    """Name within the module; dots lead to attributes."""
    source: str
    """Repository, version and line where it was read."""
    oldest: str
    """The first version of the package that has the name in this form."""
    takes: tuple[str, ...] = ()
    """Parameters of a function that this package passes, or receives if it overrides the function."""
    needs_te: bool = False
    """Whether the name exists only where Transformer Engine can be imported."""

    def get(self) -> Any:
        """Return the object of that name.

        Raises:
            RuntimeError: the package is too old, no longer has the name, or the function takes other arguments.
        """
        version = importlib.metadata.version(self.package)
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part, _MISSING)
        if found is _MISSING or not is_at_least(version, self.oldest) or not self._takes_all(found):
            raise RuntimeError(
                f"{self.package} {version}: {self.module}.{self.name} must be as in {self.oldest} or later "
                f"({self.source}); install a version that megatron-dypo supports"
            )
        return found

    def _takes_all(self, found: Any) -> bool:
        return not self.takes or set(self.takes) <= inspect.signature(found).parameters.keys()
