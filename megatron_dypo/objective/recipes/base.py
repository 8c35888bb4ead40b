"""The interface of an objective: the groups it learns from, the weights of their tokens, its streams, loss, metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.schedule import bounds
from megatron_dypo.objective.loss import LossInputs, PolicyTokens, Sums, token_loss
from megatron_dypo.objective.metrics import LOSS_METRICS, SumMetric
from megatron_dypo.objective.sequences import Across
from megatron_dypo.objective.streams import STREAMS, Stream
from megatron_dypo.objective.token_weights import add_weights, entropy_weight
from megatron_dypo.rollout.plan import GroupPlan, whole_group
from megatron_dypo.types import GradedGroup, Prompt, Sample, TokenWeights, Totals, Treatment


@dataclass(frozen=True, kw_only=True)
class WeightedGroup:
    """Token weights of each member of a group, in the group's order."""

    weights: Sequence[TokenWeights]
    sums: Mapping[str, float] = field(default_factory=dict)
    """The group's share of sums for the metrics. If the loss has only the gradient of a term and not its value, the sum
    ``objective`` is the group's share of that value (``train/loss``)."""


@dataclass(frozen=True, kw_only=True)
class TraceBuffer:
    """A buffer of traces. Once it has enough of them, the newest make up an update of their own."""

    size: int
    """Traces of one such update, over all replicas. If that many are there when a rollout batch begins, the update
    follows the updates of that batch. At most one such update follows a rollout batch."""
    keeps: int
    """Most traces that a replica keeps. It keeps the newest and forgets older ones."""


class Objective(ABC):
    """One objective. The trainer calls these methods and knows nothing else about the objective.

    Every method is pure: it uses no ranks and no I/O, and keeps no state between steps.
    """

    streams: tuple[Stream, ...] = STREAMS
    """Values of each response token that the loss reads. Write ``(*STREAMS, Stream(name="shape"))`` to add one."""
    metrics: tuple[SumMetric, ...] = LOSS_METRICS
    """Metrics that an update writes, computed from the sums of the loss and of the groups."""
    options_type: type | None = None
    """A frozen dataclass of the objective's own options; ``objective.options`` is read into it. None: the objective has
    no options, or reads ``cfg.options`` itself."""

    def __init__(self, cfg: ObjectiveConfig) -> None:
        """Keep the config. Raises ValueError for options that the objective cannot work with."""
        self.cfg = cfg

    def with_alpha(self, alpha: float) -> Objective:
        """Return the same objective with another α."""
        return type(self)(replace(self.cfg, alpha=alpha))

    @abstractmethod
    def needs_rollouts(self, step: int) -> bool:
        """Say whether the step samples rollouts. If not, it learns from traces alone, and no server is asked."""

    def needs_reference(self) -> bool:
        """Say whether ``Sample.ref_logp`` is read."""
        return False

    def needs_entropy_gradient(self) -> bool:
        """Say whether the loss has a gradient of the entropy, by ``entropy_weight`` or by ``loss_term``."""
        return bounds(self.cfg.entropy_coef)[1] > 0

    def needs_current_logprobs(self) -> bool:
        """Say whether ``Sample.current_logp_sum`` is read for samples that older weights sampled."""
        return False

    def needs_teacher_logp(self) -> bool:
        """Say whether ``Sample.teacher_logp`` is read for any rollout. If so, the run asks the servers of a teacher."""
        return False

    def reads_teacher(self, group: Sequence[Sample]) -> bool:
        """Say whether ``Sample.teacher_logp`` is read for the rollouts of this group."""
        return self.needs_teacher_logp()

    def needs_trace_verdict(self) -> bool:
        """Say whether the verifier judges the teacher's trace that is drawn beside the rollouts of its group.

        The trace's sample then has ``is_correct`` and ``reward``. A group whose trace gets no verdict is dropped.
        """
        return False

    def num_rollouts(self, group_size: int) -> int:
        """Return the number of rollouts to sample for a prompt; ``group_size`` is ``rollout.group_size``."""
        return group_size

    def plan_group(self, prompt: Prompt, group_size: int, *, step: int, seed: int) -> GroupPlan:
        """Return the parts in which the rollouts of a prompt are sampled; a pure function of its arguments.

        Args:
            step: the optimizer step for which rollouts are collected.
            seed: the run's seed, for draws (:mod:`megatron_dypo.data.teachers`).
        """
        return whole_group(self.num_rollouts(group_size))

    def forces_prefixes(self) -> bool:
        """Say whether a plan may have a part with a prefix. The tokens of a prefix have no log-probs from a server."""
        return False

    def parts_in_turn(self) -> int:
        """Return the most requests for one group that wait for each other; a collection may take that much longer."""
        return 1

    def needs_old_entropy(self) -> bool:
        """Say whether ``Sample.old_entropy`` is read for rollouts with forced tokens."""
        return False

    def trace_buffer(self) -> TraceBuffer | None:
        """Return how traces are buffered for updates of their own; None: no trace is. Every call returns the same."""
        return None

    def buffers_trace(self, group: GradedGroup, step: int) -> bool:
        """Say whether a trace of the group's prompt is put into the buffer, whatever :meth:`treat` says of the group.

        In its update the trace is a group of its own with the treatment ``DISTILL``, for :meth:`token_weights`.
        """
        return False

    @abstractmethod
    def treat(self, group: GradedGroup, step: int) -> Treatment:
        """Return the treatment of a group. A group without rollouts has no verdicts, and its ``tier`` is None."""

    @abstractmethod
    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        """Return the weights of one whole group: a trace, the k rollouts of a prompt, or rollouts and then a trace."""

    def weights_of(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        """Return :meth:`token_weights` plus the entropy bonus of ``entropy_coef`` on every response token.

        Raises:
            ValueError: there is an entropy weight, but :meth:`needs_entropy_gradient` says no: it would have no effect.
        """
        weighted = self.token_weights(group, totals, step)
        if bonus := entropy_weight(totals, self.cfg, step):
            weights = [add_weights(own, {"entropy_weight": bonus}) for own in weighted.weights]
            return WeightedGroup(weights=weights, sums=weighted.sums)
        if not self.needs_entropy_gradient() and any("entropy_weight" in own for own in weighted.weights):
            raise ValueError("token weights hold entropy_weight, and needs_entropy_gradient() says no")
        return weighted

    def loss_term(self, policy: PolicyTokens, x: LossInputs) -> tuple[Tensor, Sums]:
        """Return the objective's own term of the loss of one microbatch, a scalar, and named sums, scalars over N.

        A token that ``policy.is_kept`` masks must contribute nothing. Every call returns the same names. The value of
        the term is the sum ``objective``, if there is one, else the scalar.
        """
        return policy.logp.new_zeros(()), {}

    def loss(
        self, logp_N: Tensor, entropy_N: Tensor, x: LossInputs, across: Across | None = None
    ) -> tuple[Tensor, Sums]:
        """Return the loss of one microbatch and named sums; see :func:`megatron_dypo.objective.loss.token_loss`."""
        has_term = type(self).loss_term is not Objective.loss_term
        if not self.needs_entropy_gradient():
            entropy_N = entropy_N.detach()  # its gradient would cost another pass over the logits
        return token_loss(logp_N, entropy_N, x, self.cfg, across, self.loss_term if has_term else None)
