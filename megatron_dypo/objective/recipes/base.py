"""The seam of an objective: which groups it learns from, the weights on their tokens, its streams, loss and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    """Token weights of each member of a group, in its order."""

    weights: Sequence[TokenWeights]
    sums: Mapping[str, float] = field(default_factory=dict)
    """The group's share of sums for the metrics; ``objective`` is its share of the objective's value (``train/loss``),
    where the loss holds only the gradient of a term."""


@dataclass(frozen=True, kw_only=True)
class TraceBuffer:
    """Traces that are put aside, and make up an update of their own once there are enough."""

    size: int
    """Traces of one update, over all replicas: the newest. It follows the updates of the rollout batch that was begun
    when they were there; each rollout batch is followed by one such update at most."""
    keeps: int
    """Traces that a replica keeps, the newest; older ones are forgotten."""


class Objective(ABC):
    """One objective. The trainer calls these methods and knows nothing else of it.

    Everything is pure: no ranks, no I/O, no state that one step leaves for another.
    """

    streams: tuple[Stream, ...] = STREAMS
    """Values of each response token that the loss reads. To add one: ``(*STREAMS, Stream(name="shape"))``."""
    metrics: tuple[SumMetric, ...] = LOSS_METRICS
    """Metrics that an update writes, computed from the sums of the loss and of the groups."""
    options_type: type | None = None
    """A frozen dataclass of the objective's own options, which ``objective.options`` is read into; None: it has none,
    or reads ``cfg.options`` itself."""

    def __init__(self, cfg: ObjectiveConfig) -> None:
        """Keep the config; ValueError for options that the objective cannot work with."""
        self.cfg = cfg

    @abstractmethod
    def needs_rollouts(self, step: int) -> bool:
        """Say whether the step samples; False: it learns from traces alone, and no server is asked."""

    def needs_reference(self) -> bool:
        """Say whether ``Sample.ref_logp`` is read."""
        return False

    def needs_entropy_gradient(self) -> bool:
        """Say whether the loss has a gradient of the entropy: of ``entropy_weight``, or of a ``loss_term``."""
        return bounds(self.cfg.entropy_coef)[1] > 0

    def needs_current_logprobs(self) -> bool:
        """Say whether ``Sample.current_logp_sum`` is read of samples that older weights made."""
        return False

    def needs_teacher_logp(self) -> bool:
        """Say whether ``Sample.teacher_logp`` is read of any rollout; the run then asks the servers of a teacher."""
        return False

    def reads_teacher(self, group: Sequence[Sample]) -> bool:
        """Say whether ``Sample.teacher_logp`` is read of the rollouts of this group."""
        return self.needs_teacher_logp()

    def needs_trace_verdict(self) -> bool:
        """Say whether the verifier judges the teacher's trace that is drawn beside the rollouts of its group.

        The trace's sample then has ``is_correct`` and ``reward``. A group whose trace gets no verdict is dropped.
        """
        return False

    def num_rollouts(self, group_size: int) -> int:
        """Return the rollouts to sample of a prompt, where ``rollout.group_size`` is ``group_size``."""
        return group_size

    def plan_group(self, prompt: Prompt, group_size: int, *, step: int, seed: int) -> GroupPlan:
        """Return the parts in which the rollouts of a prompt are sampled; a pure function of its arguments.

        Args:
            step: the optimizer step that collects.
            seed: of the run, for draws (:mod:`megatron_dypo.data.teachers`).
        """
        return whole_group(self.num_rollouts(group_size))

    def forces_prefixes(self) -> bool:
        """Say whether a plan has a part with a prefix: such tokens have no log-probs by a server."""
        return False

    def parts_in_turn(self) -> int:
        """Return the most requests for one group that wait for each other, by which a collection may take longer."""
        return 1

    def needs_old_entropy(self) -> bool:
        """Say whether ``Sample.old_entropy`` is read of rollouts with forced tokens."""
        return False

    def trace_buffer(self) -> TraceBuffer | None:
        """Return how traces are buffered for updates of their own; None: none are. The same in every call."""
        return None

    def buffers_trace(self, group: GradedGroup, step: int) -> bool:
        """Say whether a trace of the group's prompt is put into the buffer, whatever :meth:`treat` makes of the group.

        It is alone in its group then, of treatment ``DISTILL``, and :meth:`token_weights` gets it in its own update.
        """
        return False

    @abstractmethod
    def treat(self, group: GradedGroup, step: int) -> Treatment:
        """Say what becomes of a group; its ``tier`` is None, and it has no verdicts, where there were no rollouts."""

    @abstractmethod
    def token_weights(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        """Return the weights of one whole group: one trace, the k rollouts of one prompt, or both, the trace last."""

    def weights_of(self, group: Sequence[Sample], totals: Totals, step: int) -> WeightedGroup:
        """Return :meth:`token_weights`, and the entropy bonus of ``entropy_coef`` on every response token.

        Raises:
            ValueError: an entropy weight where :meth:`needs_entropy_gradient` says that it has no effect.
        """
        weighted = self.token_weights(group, totals, step)
        if bonus := entropy_weight(totals, self.cfg, step):
            weights = [add_weights(own, {"entropy_weight": bonus}) for own in weighted.weights]
            return WeightedGroup(weights=weights, sums=weighted.sums)
        if not self.needs_entropy_gradient() and any("entropy_weight" in own for own in weighted.weights):
            raise ValueError("token weights hold entropy_weight, and needs_entropy_gradient() says no")
        return weighted

    def loss_term(self, policy: PolicyTokens, x: LossInputs) -> tuple[Tensor, Sums]:
        """Return what the objective adds to the loss of one microbatch, a scalar, and named sums: scalars, [N] summed.

        A token that ``policy.is_kept`` masks must contribute nothing. The names are the same in every call. The term's
        value is the sum ``objective``, if there is one, else the scalar.
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
