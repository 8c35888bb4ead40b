"""The panels of a report: the metrics of each, with title, unit and colours."""

from __future__ import annotations

from dataclasses import dataclass

TIER_COLORS = {"easy": "#3f9b74", "mid": "#e3a32f", "hard": "#c9504f"}
"""Colours of the tiers; the page's style sheet has the same."""
_BLUE, _ORANGE, _PURPLE, _TEAL, _GRAY, _BROWN = "#2f6db5", "#d9772b", "#7b5ea7", "#2a9d9d", "#98a1ab", "#8c6a4f"
CYCLE = (_BLUE, _ORANGE, _PURPLE, _TEAL, _BROWN, "#c2528b", "#6b8e23", _GRAY)
"""Colours of series whose names depend on the run, in turn."""


@dataclass(frozen=True)
class Line:
    """One series of a panel."""

    metric: str
    label: str
    color: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot of the page."""

    title: str
    lines: tuple[Line, ...] = ()
    """Series of one run; a comparison draws a line for each run instead."""
    unit: str = ""
    """Title of the vertical axis."""
    note: str = ""
    stacked: bool = False
    percent: bool = False
    log: bool = False
    level: float | None = None
    """Height of a dashed horizontal line; None: no line."""


PANELS = (
    Panel(
        title="Reward",
        unit="mean over rollouts",
        lines=(Line("rollout/reward", "reward", _BLUE), Line("rollout/accuracy", "correct", _TEAL)),
    ),
    Panel(
        title="Difficulty tiers",
        unit="share of graded prompts",
        note="Easy: every rollout correct. Mid: some. Hard: none.",
        stacked=True,
        percent=True,
        lines=tuple(Line(f"gate/{tier}", tier.capitalize(), color) for tier, color in TIER_COLORS.items()),
    ),
    Panel(
        title="Offline share",
        unit="share of the update",
        note="Share of the update that comes from teachers' traces, not from the policy's own rollouts.",
        percent=True,
        lines=(
            Line("gate/offline_share_prompts", "prompts", _BLUE),
            Line("gate/offline_share_sequences", "sequences", _ORANGE),
            Line("gate/offline_share_tokens", "tokens", _PURPLE),
        ),
    ),
    Panel(
        title="Loss terms",
        unit="loss",
        note="Each term carries its weight in the objective, unless its name says otherwise.",
        lines=(
            Line("train/loss", "total", _GRAY),
            Line("train/pg_loss", "GRPO", _BLUE),
            Line("gal/loss", "GAL (unweighted)", _ORANGE),
            Line("train/sft_loss", "SFT", _PURPLE),
            Line("train/kl_loss", "KL", _TEAL),
        ),
    ),
    Panel(
        title="GAL: η and saturation",
        unit="mean over pairs",
        note="η = E[σ(−β·d)²] is ¼ at the reference. It falls as successes become likelier than failures.",
        level=0.25,
        lines=(Line("gal/eta", "η", _BLUE), Line("gal/saturation", "saturated pairs", _ORANGE)),
    ),
    Panel(
        title="GAL: margin and drift",
        unit="nats",
        note="Margin: log-ratio of successes minus that of failures. Log-ratio: of a trajectory, to the reference "
        "policy. Drift: distance of the update's policy from the policy that made its rollouts.",
        lines=(
            Line("gal/margin", "margin", _BLUE),
            Line("gal/log_ratio", "log-ratio", _ORANGE),
            Line("gal/drift", "drift", _PURPLE),
        ),
    ),
    Panel(title="Policy entropy", unit="nats per token", lines=(Line("train/entropy", "entropy", _BLUE),)),
    Panel(
        title="Gradient norm",
        unit="before clipping",
        log=True,
        lines=(Line("train/grad_norm", "gradient norm", _BLUE),),
    ),
    Panel(
        title="Log-prob gap",
        unit="nats per token",
        note="Servers against trainer, on the same tokens and weights.",
        log=True,
        lines=(
            Line("train/train_rollout_logprob_abs_diff", "mean", _BLUE),
            Line("train/train_rollout_logprob_abs_diff_max", "max", _GRAY),
        ),
    ),
    Panel(
        title="Time of a step",
        unit="seconds",
        stacked=True,
        lines=(
            Line("timing_s/gen", "rollouts", _BLUE),
            Line("timing_s/reward", "grading", _TEAL),
            Line("timing_s/old_log_prob", "old log-probs", _ORANGE),
            Line("timing_s/ref_log_prob", "reference log-probs", "#eab587"),
            Line("timing_s/update_actor", "update", _PURPLE),
            Line("timing_s/refit", "refit", "#c2528b"),
            Line("timing_s/save_checkpoint", "checkpoint", _BROWN),
            Line("timing_s/eval", "evaluation", "#9fc5e8"),
            Line("timing_s/other", "other", _GRAY),
        ),
    ),
    Panel(
        title="Throughput",
        unit="tokens per second",
        lines=(
            Line("perf/tokens_per_sec", "whole step", _BLUE),
            Line("perf/rollout_tokens_per_sec", "rollouts", _ORANGE),
            Line("perf/update_tokens_per_sec", "update", _PURPLE),
        ),
    ),
    Panel(
        title="Response length",
        unit="tokens",
        lines=(
            Line("rollout/response_len/mean", "mean", _BLUE),
            Line("rollout/response_len/max", "max", _GRAY),
        ),
    ),
    Panel(
        title="Accounts of the prompts",
        unit="draws since the start",
        note="Each draw of a prompt is on one account. If many draws are dropped for reasons other than Easy, look at "
        "the data, the servers and the verifier.",
        stacked=True,
        lines=(
            Line("ledger/trained_rl", "trained on rollouts", _BLUE),
            Line("ledger/trained_sft", "trained on a trace", _PURPLE),
            Line("ledger/trained_mix", "trained on both", _TEAL),
            Line("ledger/dropped_easy", "Easy", TIER_COLORS["easy"]),
            Line("ledger/dropped_no_teacher", "no teacher", TIER_COLORS["hard"]),
            Line("ledger/dropped_too_long", "too long", _BROWN),
            Line("ledger/dropped_incomplete", "incomplete group", _ORANGE),
            Line("ledger/dropped_refused", "refused", "#c2528b"),
            Line("ledger/dropped_no_verdict", "no verdict", "#eab587"),
            Line("ledger/dropped_no_teacher_logp", "no teacher's log-probs", "#8c6bb1"),
            Line("ledger/dropped_stale", "stale", "#6b8e23"),
            Line("ledger/waiting", "waiting", _GRAY),
            Line("ledger/in_flight", "in flight", "#9fc5e8"),
        ),
    ),
    Panel(
        title="Truncated and failed",
        unit="share of rollouts, count",
        lines=(
            Line("rollout/truncated_ratio", "truncated (share)", _BLUE),
            Line("rollout/verifier_errors", "verifier errors (count)", _ORANGE),
        ),
    ),
)
