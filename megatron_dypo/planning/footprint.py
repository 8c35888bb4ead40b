"""A memory table: the memory that one process needs on one device, term by term."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Term:
    """One line of a memory table."""

    name: str
    bytes: float
    why: str
    """The calculation in a few words."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """The memory that one process needs on one device."""

    where: str
    terms: tuple[Term, ...]
    capacity: float
    """Bytes of the device."""
    elastic: float = 0.0
    """Bytes of terms that use memory only if there is room."""

    @property
    def total(self) -> float:
        return sum(term.bytes for term in self.terms)

    @property
    def spare(self) -> float:
        return self.capacity - self.total

    @property
    def room(self) -> float:
        """Return the bytes that are free or could be freed."""
        return self.spare + self.elastic

    @property
    def largest(self) -> Term:
        return max(self.terms, key=lambda term: term.bytes)

    def __getitem__(self, name: str) -> float:
        return next(term.bytes for term in self.terms if term.name == name)


def fullest(footprints: list[Footprint]) -> Footprint:
    return min(footprints, key=lambda footprint: footprint.room)
