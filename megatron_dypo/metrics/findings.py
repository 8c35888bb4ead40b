"""The findings of a check: problems, missing files and notes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_dypo.ending import Cause, cause_of


@dataclass(kw_only=True)
class Findings:
    """Lists that the checks fill; every entry names file or key, value and rule."""

    problems: list[str] = field(default_factory=list)
    """Findings for which a run refuses to start, or would learn nothing."""
    missing: list[str] = field(default_factory=list)
    """Files that are not on this machine. A run refuses to start; a dry run may be on another machine."""
    notes: list[str] = field(default_factory=list)
    """Findings that do not keep a run from starting."""

    @contextlib.contextmanager
    def noting(self, where: str = "") -> Iterator[None]:
        """Run a block. An error of input in it becomes a problem, and warnings of the package become notes.

        ``where`` is put in front of both, unless it is there. An error that is nobody's input
        (:func:`~megatron_dypo.ending.cause_of`) is raised.
        """
        prefix = f"{where}: " if where else ""
        logger = logging.getLogger("megatron_dypo")
        propagates, handlers = logger.propagate, logger.handlers
        # Replace all other handlers, so that each finding is reported once, by the caller.
        logger.propagate, logger.handlers = False, [_Notes(prefix, self.notes)]
        try:
            yield
        except ValueError as error:
            if cause_of(error) is not Cause.BAD_INPUT:
                raise
            self.problems.append(str(error) if str(error).startswith(prefix) else f"{prefix}{error}")
        finally:
            logger.propagate, logger.handlers = propagates, handlers

    def refused(self, *, dry_run: bool, strict: bool) -> list[str]:
        """Return the findings that end the command with an error. In a dry run missing files count only if strict."""
        missing = [] if dry_run and not strict else self.missing
        return [*self.problems, *missing, *(self.notes if strict else [])]


class _Notes(logging.Handler):
    def __init__(self, prefix: str, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._prefix, self._notes = prefix, notes

    def emit(self, record: logging.LogRecord) -> None:
        self._notes.append(f"{self._prefix}{record.getMessage()}")
