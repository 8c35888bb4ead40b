"""The probe: repeated rollouts of the same prompts under fixed weights, their scores, and what they say.

Called by all ranks. The first leader gets the scores of the others through files, estimates, and writes
``probe/step_N.json``, with the scores in ``probe/step_N.npz``. See docs/probe.md.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.probe import ProbeConfig
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.fs import replace_file
from megatron_dypo.loop.policy import Policy
from megatron_dypo.loop.probe_scores import score_groups
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.metrics.probe_files import FOLDER
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.auto_alpha import GradientMoments
from megatron_dypo.probe.scores import Scores, join, load, save
from megatron_dypo.rollout.collect import collect
from megatron_dypo.types import GradedGroup

_SECONDS = ("rollout_seconds", "score_seconds", "estimate_seconds")
"""The parts of a probe that take time, in the order in which they happen."""

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class Prober:
    """The parts of a run that a probe uses."""

    policy: Policy
    replica: Replica
    servers: Servers | NoServers
    ranks: Ranks
    cfg: ProbeConfig
    objective: ObjectiveConfig
    group_size: int
    run_dir: Path
    offloads_servers: bool
    """Whether the servers give up their memory for the scores (``refit.offload_servers``)."""
    timings: Timings

    def is_due(self, step: int) -> bool:
        """Return whether the config asks for a probe of the weights of ``step``."""
        return self.cfg.every > 0 and step % self.cfg.every == 0


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """The outcome of one probe."""

    moments: GradientMoments | None
    """Variances and covariance of the gradients of Mid prompts, the same on every rank; None: they cannot be told."""
    metrics: dict[str, float]
    """``probe/…`` metrics, on the global leader; {} elsewhere."""


def probe(prober: Prober, step: int) -> ProbeReport:
    """Measure the weights of ``step``, which the servers hold. Collective over the world.

    Raises:
        RunEnded: fewer than three prompts have all their rollouts and verdicts.
    """
    start = time.monotonic()
    groups = _sample(prober, step)
    prober.servers.offload_servers()
    report = measure(prober, groups, step, rollout_seconds=time.monotonic() - start)
    if prober.offloads_servers:
        prober.servers.refit(step)
    return report


def measure(prober: Prober, groups: Sequence[GradedGroup], step: int, *, rollout_seconds: float) -> ProbeReport:
    """Score the rollouts and traces of this replica's prompts, estimate, write the files. Collective over the world.

    Args:
        groups: all rollouts of each prompt with their verdicts, by the order of the prompts.
        rollout_seconds: what sampling took, for the files.
    """
    clock = [time.monotonic()]
    name = prober.run_dir / FOLDER / f"step_{step:06d}"
    with prober.timings.measure("probe"):
        scores = _gathered(prober, groups, step, name)
    clock.append(time.monotonic())
    result: dict[str, Any] = {}
    if scores is not None:
        _save(scores, name.with_suffix(".npz"))
        result = _analyse(prober, scores)
        clock.append(time.monotonic())
        result["cost"] = _cost(scores, rollout_seconds, clock)
        _write(result, name.with_suffix(".json"))
    return ProbeReport(moments=prober.ranks.of_leaders(_moments(result))[0], metrics=_metrics(result))


def _sample(prober: Prober, step: int) -> list[GradedGroup]:
    """Return this replica's prompts with all their rollouts and verdicts."""
    assert isinstance(prober.servers, Servers), "a probe needs servers"
    ask = functools.partial(collect, group_size=prober.cfg.repeats * prober.group_size, desc="probe")
    sampled = prober.servers.sample(prober.replica.probe_prompts(prober.cfg.prompts), step, "probe", ask)
    groups = [group for group in prober.servers.grade(sampled.groups) if group.tier is not None]
    left = sum(prober.ranks.of_leaders(len(groups)))
    if left < 3:
        raise RunEnded(Cause.NO_VERDICTS, f"probe: only {left} of {prober.cfg.prompts} prompts have all their verdicts")
    return groups


def _gathered(prober: Prober, groups: Sequence[GradedGroup], step: int, name: Path) -> Scores | None:
    """Return the scores of all replicas' prompts on the global leader; None elsewhere."""
    ranks = prober.ranks
    mine = score_groups(
        groups,
        step,
        policy=prober.policy,
        ranks=ranks,
        cfg=prober.cfg,
        group_size=prober.group_size,
        reference=prober.objective.reference.mode,
    )
    own, part = [] if mine is None else [mine], None
    if own and not ranks.is_global_leader:
        part = name.with_name(f"{name.name}.replica_{ranks.replica}.npz")
        _save(own.pop(), part)
    paths = [path for path in ranks.of_leaders(part) if path is not None]
    if not ranks.is_global_leader:
        return None
    parts = [*own, *map(load, paths)]
    for path in paths:
        path.unlink()
    return parts[0] if len(parts) == 1 else join(parts)


def _save(scores: Scores, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save(scores, path)


def _analyse(prober: Prober, scores: Scores) -> dict[str, Any]:
    from megatron_dypo.probe.gradients import Setting  # scipy, which most runs never need
    from megatron_dypo.probe.result import analyse

    cfg, mode = prober.objective, prober.objective.reference.mode
    setting = Setting(
        group_size=prober.group_size,
        length_normalization=cfg.length_normalization,
        normalize_std=cfg.normalize_std,
        advantage_epsilon=cfg.advantage_epsilon,
        constant_length=cfg.constant_length,
        reference=mode if mode in scores.log_ratio_N else "old",
        beta_gal=cfg.beta_gal,
    )
    return analyse(
        scores,
        setting,
        cfg.alpha_at(scores.step),
        target=prober.cfg.target_teacher,
        seed=prober.cfg.seed,
        is_projected=prober.cfg.dimension > 0,
    )


def _cost(scores: Scores, rollout_seconds: float, clock: Sequence[float]) -> dict[str, float]:
    """Return what the probe took; ``clock`` has the times before the scores, after them and after the estimates."""
    seconds = [rollout_seconds, *(after - before for before, after in itertools.pairwise(clock))]
    return {
        **dict(zip(_SECONDS, seconds, strict=True)),
        "trajectories": len(scores.length_N),
        "response_tokens": int(scores.length_N.sum()),
        "dimension": scores.score_Nd.shape[1],
    }


def _write(result: dict[str, Any], path: Path) -> None:
    from megatron_dypo.probe.result import text

    replace_file(path, json.dumps(result, indent=1) + "\n")
    log.info("probe of step %d: %s\n%s", result["step"], path, text(result))


def _moments(result: Mapping[str, Any]) -> GradientMoments | None:
    """Return the moments of Mid prompts; None where one of them cannot be told, or on ranks without a result."""
    if not result:
        return None
    total = result["moments"]["mid"]["total"]
    values = {name: total[name]["value"] for name in ("grpo", "gal", "covariance")}
    return None if None in values.values() else GradientMoments(**values)


def _metrics(result: Mapping[str, Any]) -> dict[str, float]:
    if not result:
        return {}
    mid = result["moments"]["mid"]
    estimates = {
        "probe/var_grpo": mid["total"]["grpo"],
        "probe/var_gal": mid["total"]["gal"],
        "probe/covariance": mid["total"]["covariance"],
        "probe/snr_mix": mid["signal_to_noise"]["mix"],
        "probe/cosine": mid["cosine_of_means"],
        "probe/best_alpha": mid["mix"]["best_alpha"],
    }
    known = {name: one["value"] for name, one in estimates.items() if one["value"] is not None}
    return {**known, "probe/seconds": sum(result["cost"][part] for part in _SECONDS)}
