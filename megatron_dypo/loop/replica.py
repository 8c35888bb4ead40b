"""The data of a replica. The leader holds all of it; followers only join forward and backward passes.

Both have the same methods, so that the loop is the same code on every rank: a follower has no prompts, no waiting
groups and nothing to write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from megatron_dypo.batching.queues import Queues
from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.eval.prompts import EvalItem, EvalPrompt
from megatron_dypo.loop.books.admission import Admitted, sample_rows
from megatron_dypo.loop.books.ledger import Ledger
from megatron_dypo.loop.books.outcomes import Outcomes
from megatron_dypo.loop.draws import Draws
from megatron_dypo.metrics.samples import SampleLog, eval_folder, sample_row
from megatron_dypo.types import DropReason, GradedGroup, Prompt, Treatment

HeldOutItem: TypeAlias = tuple[EvalItem, Sequence[EvalPrompt]]
"""An item, and the prompts of its responses; () if they are too long."""


class HeldOut(Protocol):
    """The items of one evaluation set; see :class:`megatron_dypo.eval.prompts.EvalSet`."""

    def items(self, replica: int, replicas: int) -> Iterable[EvalItem]: ...

    def prompts(self, item: EvalItem) -> Sequence[EvalPrompt]: ...


class Decoder(Protocol):
    """The part of a tokenizer that writing samples needs."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(kw_only=True)
class Books:
    """The accounts of a replica's draws, since the run began and in the current collection."""

    ledger: Ledger = field(default_factory=Ledger)
    """The ledger. On the global leader of a resumed run it includes all draws before the resume."""
    outcomes: Outcomes = field(default_factory=Outcomes)

    def drop(self, reason: DropReason, count: int = 1, message: str = "") -> None:
        """Enter dropped draws; ``message`` is the reason in words."""
        self.ledger.drop(reason, count)
        self.outcomes.drop(reason, count, message=message)


@dataclass(kw_only=True)
class Leader:
    """The first rank of a replica. It holds prompts, waiting groups, the books, and the files of samples."""

    draws: Draws
    tokenizer: Decoder
    held_out: Mapping[str, HeldOut]
    """Name of an evaluation set → its items."""
    sample_log: SampleLog
    run_dir: Path
    books: Books
    queues: Queues = field(default_factory=Queues)
    inputs: dict[str, Any] = field(default_factory=dict)
    """Everything that a resumed run must have again; see :mod:`megatron_dypo.loop.setup.inputs`."""
    stop_ids: tuple[int, ...] = ()
    """Ids of the tokens that end a response."""

    @property
    def num_prompts(self) -> int:
        """Rows of the data."""
        return len(self.draws.source)

    def id_of(self, order: int) -> str:
        """Return the id of the prompt of a draw."""
        return self.draws.source.id_of(order)

    def begin_round(self, count: int) -> list[Prompt]:
        """Return the prompts of a round; see :meth:`Draws.begin_round`."""
        return self.draws.begin_round(count)

    def end_round(self) -> None:
        """Forget the prompts of the round; see :meth:`Draws.end_round`."""
        self.draws.end_round()

    def begin_listed(self, orders: Collection[int]) -> list[Prompt]:
        """Return the prompts of these draws; see :meth:`Draws.begin_listed`."""
        return self.draws.begin_listed(orders)

    def end_listed(self, orders: Collection[int]) -> None:
        """Forget these prompts; see :meth:`Draws.end_listed`."""
        self.draws.end_listed(orders)

    def unfinished(self) -> list[Prompt]:
        """Return the prompts that are drawn but not finished, without those that a stream keeps."""
        return self.draws.unfinished

    def leave_out(self, counts: DropCounts) -> None:
        """Add the prompts and traces that the draws of a stream left out."""
        self.draws.left_out.append(counts)

    def take_left_out(self) -> DropCounts:
        """Return the prompts and traces that draws left out since the last call."""
        taken = DropCounts()
        while self.draws.left_out:
            taken += self.draws.left_out.popleft()
        return taken

    def held_out_items(self, name: str) -> list[HeldOutItem]:
        """Return this replica's part of an evaluation set, each item with the prompts of its responses."""
        held_out = self.held_out[name]
        return [(item, held_out.prompts(item)) for item in held_out.items(self.draws.replica, self.draws.replicas)]

    def probe_prompts(self, count: int) -> list[Prompt]:
        """Return this replica's part of the run's first ``count`` prompts, which then still count as not drawn."""
        draws = self.draws
        return draws.source.at(range(draws.replica, min(count, len(draws.source)), draws.replicas))[0]

    def write_samples(self, step: int, admitted: Sequence[Admitted]) -> None:
        """Write the file in ``samples/`` of the collection for ``step``."""
        self.sample_log.write(step, [row for one in admitted for row in sample_rows(step, one, self._text_of)])

    def write_evaluation(self, step: int, name: str, groups: Sequence[GradedGroup]) -> None:
        """Write the responses to one evaluation set."""
        log_of_set = SampleLog(self.run_dir, shard=self.sample_log.shard, folder=eval_folder(name))
        log_of_set.write(step, [sample_row(step, group, Treatment.DROP) for group in groups])

    def _text_of(self, prompt: Prompt, teacher: str) -> str:
        return self.tokenizer.decode(prompt.traces[teacher].tolist())


@dataclass(kw_only=True)
class Follower:
    """Any other rank of a replica. It holds no data; its queues and books stay empty."""

    queues: Queues = field(default_factory=Queues)
    books: Books = field(default_factory=Books)
    num_prompts: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()

    def id_of(self, order: int) -> str:
        return str(order)

    def begin_round(self, count: int) -> list[Prompt]:
        return []

    def end_round(self) -> None: ...

    def begin_listed(self, orders: Collection[int]) -> list[Prompt]:
        return []

    def end_listed(self, orders: Collection[int]) -> None: ...

    def unfinished(self) -> list[Prompt]:
        return []

    def leave_out(self, counts: DropCounts) -> None: ...

    def take_left_out(self) -> DropCounts:
        return DropCounts()

    def held_out_items(self, name: str) -> list[HeldOutItem]:
        return []

    def probe_prompts(self, count: int) -> list[Prompt]:
        return []

    def write_samples(self, step: int, admitted: Sequence[Admitted]) -> None: ...

    def write_evaluation(self, step: int, name: str, groups: Sequence[GradedGroup]) -> None: ...


Replica: TypeAlias = "Leader | Follower"
