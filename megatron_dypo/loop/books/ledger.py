"""The ledger of a run: an account of every draw of a prompt.

Each draw is on exactly one account: trained on (its rollouts, a teacher's trace, or both), dropped for one reason,
waiting for an update, or in flight. So at any time::

    drawn = trained + dropped + waiting + in flight

Each replica's leader keeps the ledger of its own draws. :func:`balance` adds them up and compares them with the
contents of queues and streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dypo.types import DropReason, Treatment

_TRAINED = {
    Treatment.REINFORCE: "trained_rl",
    Treatment.DISTILL: "trained_sft",
    Treatment.MIX: "trained_mix",
}
_WORDS = {
    DropReason.EASY: "Easy",
    DropReason.NO_TEACHER: "Hard without a teacher's trace",
    DropReason.TOO_LONG: "too long",
    DropReason.INCOMPLETE: "with an incomplete group",
    DropReason.REFUSED: "refused by a server",
    DropReason.NO_VERDICT: "without a verdict",
    DropReason.NO_TEACHER_LOGP: "without a teacher's log-probs",
    DropReason.STALE: "stale",
}


@dataclass(kw_only=True)
class Ledger:
    """The draws of one replica since the run began, without those that are still open."""

    drawn: int = 0
    """Number of draws taken from the run's sequence of draws."""
    trained: Counter[Treatment] = field(default_factory=Counter)
    """Draws that have been in all their updates."""
    dropped: Counter[DropReason] = field(default_factory=Counter)

    def draw(self, count: int) -> None:
        self.drawn += count

    def train(self, treatment: Treatment, count: int = 1) -> None:
        self.trained[treatment] += count

    def drop(self, reason: DropReason, count: int = 1) -> None:
        self.dropped[reason] += count

    def __add__(self, other: Ledger) -> Ledger:
        return Ledger(
            drawn=self.drawn + other.drawn,
            trained=self.trained + other.trained,
            dropped=self.dropped + other.dropped,
        )

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as a checkpoint stores it."""
        return {
            "drawn": self.drawn,
            "trained": {treatment.value: count for treatment, count in self.trained.items() if count},
            "dropped": {reason.value: count for reason, count in self.dropped.items() if count},
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Ledger:
        """Read what :meth:`as_json` returned."""
        return cls(
            drawn=int(stored["drawn"]),
            trained=Counter({Treatment(name): int(count) for name, count in stored["trained"].items()}),
            dropped=Counter({DropReason(name): int(count) for name, count in stored["dropped"].items()}),
        )


@dataclass(frozen=True, kw_only=True)
class OpenDraws:
    """Draws of one replica that have not ended yet."""

    waiting: int = 0
    """In a queue, or in the rollout batch with updates left."""
    in_flight: int = 0
    """Drawn, and neither graded nor dropped."""

    def __add__(self, other: OpenDraws) -> OpenDraws:
        return OpenDraws(waiting=self.waiting + other.waiting, in_flight=self.in_flight + other.in_flight)


@dataclass(frozen=True, kw_only=True)
class Balance:
    """The books of all replicas together."""

    ledger: Ledger
    open: OpenDraws

    @property
    def difference(self) -> int:
        """Number of draws on no account (positive) or on several (negative); 0 unless this package has a bug."""
        ended = sum(self.ledger.trained.values()) + sum(self.ledger.dropped.values())
        return self.ledger.drawn - ended - self.open.waiting - self.open.in_flight

    def counts(self) -> dict[str, int]:
        """Return every account by name, zeros included."""
        trained = {name: self.ledger.trained[treatment] for treatment, name in _TRAINED.items()}
        dropped = {f"dropped_{reason.value}": self.ledger.dropped[reason] for reason in DropReason}
        open_draws = {"waiting": self.open.waiting, "in_flight": self.open.in_flight}
        return {"drawn": self.ledger.drawn, **trained, **dropped, **open_draws}

    def metrics(self) -> dict[str, float]:
        return {f"ledger/{name}": float(count) for name, count in self.counts().items()}

    def line(self) -> str:
        """Return one line for people: "48 prompts drawn: 20 trained (RL 12, SFT 8), 25 Easy, 3 waiting"."""
        trained = self.ledger.trained
        mixed = f", both {trained[Treatment.MIX]}" if trained[Treatment.MIX] else ""
        kinds = f"RL {trained[Treatment.REINFORCE]}, SFT {trained[Treatment.DISTILL]}{mixed}"
        parts = [
            f"{sum(trained.values())} trained ({kinds})",
            *dropped_words(self.ledger.dropped),
        ]
        parts += [f"{self.open.waiting} waiting"] if self.open.waiting else []
        parts += [f"{self.open.in_flight} in flight"] if self.open.in_flight else []
        return f"{self.ledger.drawn} prompts drawn: " + ", ".join(parts)


def balance(books: Sequence[tuple[Ledger, OpenDraws]]) -> Balance:
    """Add up the books of all replicas."""
    return Balance(
        ledger=sum((ledger for ledger, _ in books), Ledger()), open=sum((open for _, open in books), OpenDraws())
    )


def dropped_words(dropped: Mapping[DropReason, int]) -> list[str]:
    """Return ``["31 Easy", "1 Hard without a teacher's trace"]``, without zeros."""
    return [f"{dropped[reason]} {words}" for reason, words in _WORDS.items() if dropped.get(reason)]
