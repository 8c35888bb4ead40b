"""A probe of drawn trajectories on a model of a given shape, and updates from them, for ``probe.py``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import overhead_steps

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.probe import ProbeConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.training import BatchingConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.ranks import MeshRanks
from megatron_dypo.metrics.probe_files import FOLDER
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.planning.probe import host_bytes
from megatron_dypo.probe.scores import Scores
from megatron_dypo.types import GradedGroup, Prompt, Rollout, Sample, Tier, Verdict

REPEATS, GROUP_SIZE, TEACHERS = 2, 3, ("first", "second")
PER_PROMPT = REPEATS * GROUP_SIZE + len(TEACHERS)
MICROBATCH_TOKENS = 512
"""Of the pass for log π_ref: few enough for 16 trajectories to fill a microbatch of either shape."""


def import_all() -> None:
    """Import what a probe imports, so that imports do not count."""
    from megatron_dypo.loop import megatron_policy  # noqa: F401
    from megatron_dypo.mcore import optimizer, scores  # noqa: F401
    from megatron_dypo.probe import result  # noqa: F401


class Parts:
    """A model with its optimizer and reference, and the trajectories of a probe."""

    def __init__(
        self, shape: Any, count: int, size: int, parallel: ParallelConfig, layout: MeshRank, folder: Path
    ) -> None:
        from megatron_dypo.loop.megatron_policy import MegatronPolicy
        from megatron_dypo.loop.probe import Prober
        from megatron_dypo.loop.replica import Follower
        from megatron_dypo.loop.servers import NoServers
        from megatron_dypo.mcore.reference import ReferencePolicy

        self.bench, self.groups = overhead_steps.Bench(shape, parallel, layout), draw_groups(shape, count)
        prompts, rollouts = len(self.groups), REPEATS * GROUP_SIZE
        self.score_bytes = 4 * size * prompts * PER_PROMPT
        self.planned_bytes = host_bytes(prompts, rollouts, len(TEACHERS), size, is_joined=False)
        config = Config(
            model=ModelConfig(hf_path="none", dtype="float32"),
            data=DataConfig(prompts=("none",), max_prompt_tokens=512, max_trace_tokens=512),
            rollout=RolloutConfig(group_size=GROUP_SIZE, max_new_tokens=512),
            batching=BatchingConfig(tokens_per_microbatch=MICROBATCH_TOKENS),
            objective=overhead_steps.OBJECTIVE,
            probe=ProbeConfig(repeats=REPEATS, dimension=size),
        )
        timings = Timings()
        self._prober = Prober(
            policy=MegatronPolicy(
                config=config,
                layout=layout,
                arch=self.bench.arch,
                chunks=self.bench.chunks,
                optimizer=self.bench.optimizer,
                objective=build_objective(config.objective),
                reference=ReferencePolicy(self.bench.chunks),
                timings=timings,
            ),
            replica=Follower(),
            servers=NoServers(),
            ranks=MeshRanks(layout=layout),
            cfg=config.probe,
            objective=config.objective,
            group_size=GROUP_SIZE,
            run_dir=folder,
            offloads_servers=False,
            timings=timings,
        )

    def probe(self) -> None:
        """Do all that a probe does after its rollouts."""
        from megatron_dypo.loop.probe import measure

        measure(self._prober, self.groups, 0, rollout_seconds=0.0)

    def cost(self) -> dict[str, float]:
        """Return the seconds of the parts of the last probe."""
        result = json.loads((self._prober.run_dir / FOLDER / "step_000000.json").read_text())
        cost: dict[str, float] = result["cost"]
        return cost

    def scores(self, groups: Sequence[GradedGroup]) -> Scores:
        """Return the scores of the groups, and keep them nowhere."""
        from megatron_dypo.loop.probe_scores import score_groups

        prober = self._prober
        found = score_groups(
            groups,
            0,
            policy=prober.policy,
            ranks=prober.ranks,
            cfg=prober.cfg,
            group_size=GROUP_SIZE,
            reference=prober.objective.reference.mode,
        )
        assert found is not None, "the only rank is the leader"
        return found

    def weighted(self) -> list[Sample]:
        """Return the trajectories with token weights, for updates."""
        from megatron_dypo.loop.probe_scores import list_trajectories

        groups: dict[tuple[str, int, str | None], list[Sample]] = {}
        for one in (one for group in self.groups for one in list_trajectories(group, GROUP_SIZE, 0)):
            logp = one.sample.rollout_logp
            sample = replace(one.sample, old_logp=logp, ref_logp=None if logp is None else logp + np.float32(0.1))
            groups.setdefault((one.prompt_id, one.repeat, one.teacher), []).append(sample)
        return overhead_steps.token_weights(list(groups.values()))


def draw_groups(shape: Any, count: int) -> list[GradedGroup]:
    """Return prompts with ``count`` rollouts and traces together, in which every other rollout is right.

    Every other prompt has the same tokens, so that the longest sequence does not depend on the count.
    """
    return [_draw_group(shape, order) for order in range(count // PER_PROMPT)]


def _draw_group(shape: Any, order: int) -> GradedGroup:
    rng = np.random.default_rng(order % 2)
    num_prompt_tokens = max(1, round(shape.prompt_share * shape.length))

    def tokens(length: int) -> Any:
        return rng.integers(3, shape.vocab, length).astype(np.int32)

    def response() -> Any:
        return tokens(max(4, int(rng.lognormal(np.log(shape.length - num_prompt_tokens), 0.3))))

    drawn = [response() for _ in range(REPEATS * GROUP_SIZE)]
    return GradedGroup(
        prompt=Prompt(
            prompt_id=str(order),
            visit=0,
            order=order,
            tokens=tokens(num_prompt_tokens),
            text="",
            answer="",
            source="",
            traces={teacher: response() for teacher in TEACHERS},
        ),
        rollouts=tuple(
            Rollout(
                tokens=one,
                logp=rng.normal(-np.log(shape.vocab), 0.1, len(one)).astype(np.float32),
                text="",
                finish="stop",
                policy_version=0,
            )
            for one in drawn
        ),
        verdicts=tuple(
            Verdict(is_correct=number % 2 == 0, reward=float(number % 2 == 0)) for number in range(len(drawn))
        ),
        tier=Tier.MID,
    )
