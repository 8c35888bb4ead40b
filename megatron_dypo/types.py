"""The nouns of the pipeline: data → rollout → grading → objective → batching → mcore → refit.

Shape suffixes, used in the whole package:

    B  sequences or prompts in a batch      G  members of one group (k rollouts of one prompt)
    T  tokens of one packed microbatch      L  tokens of one sequence: prompt then response
    R  response tokens of one sequence      V  vocabulary entries (V/tp on one tensor-parallel rank)
    H  hidden size                          S  sequences packed into one microbatch

Token ids are ``int32``, log-probs and weights ``float32``. Log-probs are natural logarithms and belong to the
token at the same index (not to its successor).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Routes = npt.NDArray[np.unsignedinteger[Any]]
"""[L', layers, k] The experts of each token in each layer of a mixture of experts, counted from 0, in the smallest type
(:class:`megatron_dypo.rollout.routes.RouteShape`). The rows are those of the first L' tokens of a sequence. Layers
without experts have rows too, whose values have no meaning."""

StreamValue = float | Floats | npt.NDArray[np.bool_]
"""The value of one stream of one sequence: one number for all its response tokens, or [R] one for each."""
TokenWeights = Mapping[str, StreamValue]
"""An objective's weights on the response tokens of one sequence: stream name → value. Absent streams are 0.
:data:`megatron_dypo.objective.streams.STREAMS` has the names that every objective may use."""


class Tier(enum.Enum):
    """Difficulty of a prompt for the current policy (paper, section 3.1)."""

    EASY = "easy"
    """Every rollout of the group is correct."""
    MID = "mid"
    """Some rollouts are correct."""
    HARD = "hard"
    """No rollout is correct."""


class Treatment(enum.Enum):
    """The use that an objective makes of a graded group."""

    DROP = "drop"
    DISTILL = "distill"
    """Learn from a teacher's trace."""
    REINFORCE = "reinforce"
    """Learn from the group's own rollouts."""
    MIX = "mix"
    """Learn from both at once: the group's rollouts and a teacher's trace, as one group."""


class SampleKind(enum.Enum):
    """The origin of the response of one sequence."""

    ROLLOUT = "rollout"
    """The policy sampled it, possibly after the first tokens of a teacher."""
    TRACE = "trace"
    """A teacher wrote it."""


class DropReason(enum.Enum):
    """Why a draw of a prompt was dropped; at most one reason each (see :mod:`megatron_dypo.loop.books.ledger`)."""

    EASY = "easy"
    """Graded, and the objective learns nothing from its tier."""
    NO_TEACHER = "no_teacher"
    """The objective distills it, and it has no trace."""
    TOO_LONG = "too_long"
    """The prompt is longer than ``data.max_prompt_tokens``."""
    INCOMPLETE = "incomplete"
    """Its group stayed incomplete after all retries, or at its deadline."""
    REFUSED = "refused"
    """A server refused the request for good (HTTP 400, 413 or 422)."""
    NO_VERDICT = "no_verdict"
    """The verifier failed on a rollout of its group."""
    NO_TEACHER_LOGP = "no_teacher_logp"
    """The teacher gave no log-probs of a rollout of its group."""
    STALE = "stale"
    """It waited for longer than ``batching.max_staleness``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One row of the training data, tokenised."""

    prompt_id: str
    """Stable across runs: the row's own ``id`` field, else ``<file name>:<line>``."""
    visit: int
    """Number of earlier draws of this prompt (its epoch)."""
    order: int
    """Position of this draw in the run's sequence of draws. The queues are first in, first out by it."""
    tokens: Tokens
    """[L] The prompt, chat template and generation header included."""
    text: str
    """The text that ``tokens`` decode to."""
    answer: Any
    """The gold answer: text, or an object or a list for a verifier of the user's own."""
    source: str
    traces: Mapping[str, Tokens] = field(default_factory=dict)
    """Teacher name → [R] target tokens, end-of-sequence included. Any subset of the teachers."""
    verifier: str | None = None
    """The row's own verifier; None: the config's (``grading.by_source``, ``grading.verifier``)."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """One sampled response."""

    tokens: Tokens
    """[R] Response tokens; the matched stop token, if any, is the last."""
    logp: Floats
    """[R] The server's log-probs of ``tokens`` under its untempered distribution; NaN on forced tokens."""
    text: str
    finish: Literal["stop", "length"]
    """``length`` marks a truncated rollout."""
    policy_version: int
    """Version of the weights that sampled the first token (the oldest, if a refit happened in between)."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """(version, index of the first token that it sampled), in the order of the tokens."""
    num_forced_tokens: int = 0
    """The first of ``tokens`` that are a teacher's, which the policy was made to go on from."""
    routes: Routes | None = None
    """[L − 1, layers, k] The server's choice of experts for the prompt and the response but its last token, which no
    forward pass of the server read; None: not asked for, or nothing was sampled."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verifier's verdict on one rollout or one teacher's trace."""

    is_correct: bool
    reward: float
    """Shaped reward, for the advantage only; the gate reads ``is_correct``."""
    error: str | None = None
    """Why there is no verdict (an exception or a deadline). ``is_correct`` is then False and has no meaning."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RolloutGroup:
    """The k rollouts of one prompt; none when the objective learns from traces alone."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...] = ()
    """Those of the first rollouts, where later ones depended on them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GradedGroup:
    """A group with its verdicts and its tier.

    ``tier`` is None if there was nothing to grade, or if a rollout (or a trace that the objective wants judged) has no
    verdict. The latter group says nothing about the prompt's difficulty and is dropped.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    verdicts: tuple[Verdict, ...]
    tier: Tier | None
    trace_verdict: Verdict | None = None
    """The verdict on the teacher's trace that is drawn for this visit; None if there is no trace, or if the objective
    does not ask for its verdict."""

    @property
    def num_correct(self) -> int:
        """The rollouts that the verifier found correct."""
        return sum(verdict.is_correct for verdict in self.verdicts)


@dataclass(kw_only=True, eq=False)
class Sample:
    """One sequence that waits for, or enters, an update."""

    order: int
    """``Prompt.order`` of its prompt: samples with the same ``order`` are one group."""
    member: int
    """Index in its group."""
    treatment: Treatment
    """The treatment of its group, whose members may be of both kinds."""
    kind: SampleKind
    tokens: Tokens
    """[L] Prompt then response."""
    num_prompt_tokens: int
    policy_version: int
    """Version that sampled the group; for a trace without rollouts, the version that found the prompt Hard."""
    num_forced_tokens: int = 0
    """The first response tokens of a rollout that are a teacher's, which the policy was made to go on from."""
    is_buffered: bool = False
    """A trace that was put aside for an update of its own, besides what becomes of its group."""
    is_correct: bool = False
    reward: float = 0.0
    rollout_logp: Floats | None = None
    """[R] The server's log-probs, NaN on forced tokens; None for a trace."""
    old_logp: Floats | None = None
    """[R] log π_old, by the trainer's own forward pass or the servers' (``old_logp.source``)."""
    old_entropy: Floats | None = None
    """[R] Entropy of π_old, of a rollout with forced tokens where the objective reads it."""
    current_logp_sum: float | None = None
    """Σ_t log π_θ under the weights of the next update, if they differ from π_old's; else None."""
    logp_version: int | None = None
    """Version of the weights that computed ``old_logp``; None without ``old_logp``."""
    ref_logp: Floats | None = None
    """[R] log π_ref."""
    teacher_logp: Floats | None = None
    """[R] log π_T from a teacher's server, if the objective reads it; None: not asked yet, or never."""
    weights: TokenWeights | None = None
    routes: Routes | None = None
    """[L', layers, k] The experts that passes of the policy must take for the first L' of ``tokens``
    (``objective.replay``); None: those that the router chooses. Only the leader of a replica holds them."""

    @property
    def num_response_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Counts over the global batch. The objective reads no other global quantity."""

    num_prompts: int
    """n: prompts of the update; each counts once, however many sequences it has."""
    num_sequences: Mapping[SampleKind, int]
    num_response_tokens: Mapping[SampleKind, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Microbatch:
    """Sequences packed for one forward pass (``thd``), padded to ``T`` tokens; the last sequence may be padding.

    With context parallelism each sequence ends in padding up to a multiple of 2·context, and a rank's part of the
    microbatch (:func:`megatron_dypo.batching.zigzag.shard`) has ``T / context`` tokens.
    """

    tokens_T: Tokens
    positions_T: Tokens
    """Position within the sequence; restarts at 0."""
    cu_seqlens_S: Tokens
    """[S+1] Boundaries of the sequences in the whole microbatch, padding included; the last is its length."""
    targets_T: Tokens
    """The next token of the same sequence; 0 where there is none."""
    response_T: npt.NDArray[np.bool_]
    """True where ``targets_T`` is a response token; only these positions enter the loss."""
    sequence_T: Tokens
    """Index of the token's sequence in ``cu_seqlens_S``, padding included."""
    sample_T: Tokens
    """Index into the samples that were packed, −1 on padding."""
    streams: Mapping[str, npt.NDArray[Any]]
    """Name → [T]: values for ``targets_T`` that the loss reads; outside the response, the stream's fill."""
    routes: Routes | None = None
    """[T', layers, k] The experts for the tokens and the layers of one rank; None: those that its routers choose."""
