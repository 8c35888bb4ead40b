"""The probe: repeated rollouts of the same prompts under fixed weights, their scores, and what they say.

Called by all ranks. Each leader writes the scores of its prompts to a file; the first one reads these files, estimates
and writes ``probe/step_N.json``, with the scores in ``probe/step_N.npz``. See docs/probe.md.
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

import numpy as np
from numpy.typing import NDArray

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.probe import ProbeConfig
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.fs import replace_file
from megatron_dypo.loop.policy import Policy
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Replica
from megatron_dypo.loop.servers import NoServers, Servers
from megatron_dypo.metrics.probe_files import FOLDER
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.auto_alpha import GradientMoments
from megatron_dypo.objective.route import rollout_samples, trace_sample
from megatron_dypo.probe.scores import Scores, join, load, save
from megatron_dypo.rollout.collect import collect
from megatron_dypo.types import GradedGroup, Sample, Treatment

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
class Trajectory:
    """One rollout or trace of a measured prompt."""

    sample: Sample
    prompt_id: str
    repeat: int = -1
    """The group of rollouts that it belongs to; −1 for a trace."""
    teacher: str | None = None


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
    clock = [time.monotonic()]
    groups = _sample(prober, step)
    prober.servers.offload_servers()
    clock.append(time.monotonic())
    with prober.timings.measure("probe"):
        mine = _score(prober, groups, step)
    folder, name = prober.run_dir / FOLDER, f"step_{step:06d}"
    part = folder / f"{name}.replica_{prober.ranks.replica}.npz"
    if mine is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save(mine, part)
    written = prober.ranks.of_leaders(None if mine is None else str(part))
    clock.append(time.monotonic())
    result: dict[str, Any] = {}
    if prober.ranks.is_global_leader:
        scores = _joined([Path(one) for one in written if one is not None], folder / f"{name}.npz")
        result = _analyse(prober, scores)
        clock.append(time.monotonic())
        result["cost"] = _cost(scores, clock)
        _write(result, folder / f"{name}.json")
    if prober.offloads_servers:
        prober.servers.refit(step)
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


def _trajectories(group: GradedGroup, group_size: int, step: int) -> list[Trajectory]:
    """Return the rollouts of a prompt in groups of ``group_size``, then the trace of each of its teachers."""
    rollouts = rollout_samples(group, Treatment.REINFORCE)
    found = [
        Trajectory(sample=sample, prompt_id=group.prompt.prompt_id, repeat=sample.member // group_size)
        for sample in rollouts
    ]
    for number, (teacher, tokens) in enumerate(sorted(group.prompt.traces.items()), start=len(rollouts)):
        sample = trace_sample(group, tokens, Treatment.DISTILL, member=number, version=step)
        found.append(Trajectory(sample=sample, prompt_id=group.prompt.prompt_id, teacher=teacher))
    return found


def _score(prober: Prober, groups: Sequence[GradedGroup], step: int) -> Scores | None:
    """Return the scores of this replica's prompts; None if it has none, and on ranks that are no leaders."""
    found = [one for group in groups for one in _trajectories(group, prober.group_size, step)]
    samples = [one.sample for one in found]
    scores = prober.policy.scores(samples, dimension=prober.cfg.dimension, seed=prober.cfg.seed)
    ratios = _log_ratios(prober, samples)
    prompts = sorted({(one.sample.order, one.prompt_id) for one in found})
    prompt_ids = [name for _, name in sorted(entry for part in prober.ranks.of_leaders(prompts) for entry in part)]
    named = sorted({one.teacher for one in found if one.teacher is not None})
    teachers = sorted({name for part in prober.ranks.of_leaders(named) for name in part})
    if not found:
        return None
    prompt_of, teacher_of = ({name: index for index, name in enumerate(names)} for names in (prompt_ids, teachers))
    return Scores(
        score_Nd=np.stack(scores),
        prompt_N=np.array([prompt_of[one.prompt_id] for one in found], np.int64),
        repeat_N=np.array([one.repeat for one in found], np.int64),
        teacher_N=np.array([-1 if one.teacher is None else teacher_of[one.teacher] for one in found], np.int64),
        is_correct_N=np.array([sample.is_correct for sample in samples], np.bool_),
        reward_N=np.array([sample.reward for sample in samples], np.float64),
        length_N=np.array([sample.num_response_tokens for sample in samples], np.int64),
        log_ratio_N=ratios,
        prompt_ids=tuple(prompt_ids),
        teachers=tuple(teachers),
        step=step,
    )


def _log_ratios(prober: Prober, samples: Sequence[Sample]) -> dict[str, NDArray[np.float64]]:
    """Return Σ_t log π − log π_ref, by reference: π_old, and the policy's own if it keeps one."""
    ratios = {"old": np.zeros(len(samples))}
    if prober.policy.keeps_reference:
        own, reference = prober.policy.logprobs(samples), prober.policy.reference_logprobs(samples)
        totals = [float((a.astype(np.float64) - b).sum()) for a, b in zip(own, reference, strict=True)]
        ratios[prober.objective.reference.mode] = np.array(totals, np.float64)
    return ratios


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
    return analyse(scores, setting, cfg.alpha_at(scores.step), target=prober.cfg.target_teacher, seed=prober.cfg.seed)


def _joined(parts: Sequence[Path], path: Path) -> Scores:
    """Put the replicas' files together in one at ``path``, and remove them."""
    scores = join([load(part) for part in parts])
    save(scores, path)
    for part in parts:
        part.unlink()
    return scores


def _cost(scores: Scores, clock: Sequence[float]) -> dict[str, float]:
    """Return what the probe took; ``clock`` has the times at its start and after each of its three parts."""
    seconds = [after - before for before, after in itertools.pairwise(clock)]
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
