"""The policy as one trainer rank holds it, and the turns in which ranks send whole tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.bridged import WholeWeights
from megatron_dypo.models.families.registry import match
from megatron_dypo.models.gather import in_table_order, iter_hf_tensors, sent_params, written_specs
from megatron_dypo.models.hf.write import TensorSpec
from megatron_dypo.parallel.groups import MeshRank

Turn = tuple[int, int]
"""One turn of sending: (pipeline stage, expert rank)."""
_ONLY_TURN = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The policy as this rank holds it."""

    layout: MeshRank
    arch: Architecture
    named_params: Callable[[], Iterable[tuple[str, Tensor]]]
    """Yields this rank's shards under Megatron-Core names with global layer indices."""
    values: Callable[[Tensor], Tensor] = Tensor.detach
    """Returns a parameter, or a dequantised copy of one in FP8."""

    @property
    def turns(self) -> list[Turn]:
        """Return all turns in order.

        In the first turn of a stage, its leader sends the stage's dense tensors and its own experts.
        """
        return list(itertools.product(range(self.layout.pipeline), range(1 if self._stacks else self.layout.expert)))

    @property
    def _stacks(self) -> bool:
        """Return whether a stage's leader sends all its experts, since an HF folder has them in one tensor."""
        return self.arch.experts is not None and self.arch.experts.is_stacked

    @property
    def _turn_of_experts(self) -> Turn:
        """Return the turn of this rank's experts."""
        return self.layout.pp_rank, 0 if self._stacks else self.layout.ep_rank

    @property
    def own_turn(self) -> Turn | None:
        """Return the turn in which this rank sends whole tensors; None if it only takes part in gathers, or in
        nothing."""
        layout = self.layout
        leads = layout.leads_stage or (layout.leads_experts and not self._stacks)
        return self._turn_of_experts if leads else None

    def joins(self, turn: Turn) -> bool:
        """Return whether this rank takes part in a turn.

        It does so in the first turn of its stage, when dense tensors are gathered, and in the turn of its experts.
        """
        layout = self.layout
        is_of_experts = layout.sends_experts and turn == self._turn_of_experts
        return is_of_experts or (layout.sends_dense and turn == (layout.pp_rank, 0))

    def params(self, turn: Turn | None = None) -> list[tuple[str, Tensor]]:
        """Return this rank's parameters that are sent in one turn, or (None) in all turns."""
        sent = sent_params(self.named_params(), self.arch, self.layout)
        sent = in_table_order(sent, self.arch) if self._stacks else sent
        if turn is None:
            return sent
        own, first = self._turn_of_experts, (self.layout.pp_rank, 0)
        return [(n, p) for n, p in sent if (own if match(n, self.arch).is_expert else first) == turn]

    def tensors(self, turn: Turn | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF tensors that this rank sends in one turn, or (None) in all turns, one at a time.

        Collective over the ranks that join the turn (None: over all senders of a stage). All must exhaust the iterator.
        """
        return iter_hf_tensors(self.params(turn), self.arch, self.layout, self.values)

    def specs(self) -> list[TensorSpec]:
        """List the tensors that :meth:`tensors` yields here."""
        return written_specs(self.params(), self.arch, self.layout)


@dataclass(frozen=True, kw_only=True)
class WholeSource(Source):
    """The policy of a model without a name table: one turn, in which the global leader sends every tensor.

    All pipeline and tensor-parallel ranks of the first replica take part in it.
    """

    weights: WholeWeights

    @property
    def turns(self) -> list[Turn]:
        return [_ONLY_TURN]

    @property
    def own_turn(self) -> Turn | None:
        return _ONLY_TURN if self.layout.is_global_leader else None

    def joins(self, turn: Turn) -> bool:
        return self.layout.sends_dense

    def params(self, turn: Turn | None = None) -> list[tuple[str, Tensor]]:
        """Return nothing: a rank's parameters are not named one by one."""
        return []

    def tensors(self, turn: Turn | None = None) -> Iterator[tuple[str, Tensor]]:
        return self.weights.tensors()

    def specs(self) -> list[TensorSpec]:
        return self.weights.specs()
