"""The rollout stream of a leader, made of its draws, a client of its own and the verifier."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from megatron_dypo.config.tree import Config
from megatron_dypo.grading.verify import Verifier, grade
from megatron_dypo.loop.draws import Draws
from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.no_journal import NoJournal
from megatron_dypo.loop.requests import judge_rollouts, planner_of
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.objective.route import will_learn_from
from megatron_dypo.processes.stop_requests import STOP
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.rollout.stream import RolloutStream
from megatron_dypo.rollout.stream_sampler import StreamWork
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup


def open_stream(
    client: SGLangClient,
    draws: Draws,
    verifier: Verifier,
    objective: Objective,
    config: Config,
    *,
    current_step: Callable[[], int],
    trace_text: Callable[[Prompt], str | None] | None = None,
    journal: Journal | NoJournal | None = None,
) -> RolloutStream[GradedGroup]:
    """Return a stream that samples and grades this replica's draws once it is started.

    Args:
        client: a client that only the stream uses.
        current_step: returns the optimizer steps done; whether a group is useful may depend on it.
        trace_text: returns the trace that the verifier judges beside the rollouts of a prompt.
        journal: holds the groups that are finished.
    """
    logged = journal or NoJournal()
    cfg, batching, replicas = config.rollout, config.batching, draws.replicas

    fail_truncated = config.grading.fail_truncated
    judged = functools.partial(judge_rollouts, verifier=verifier, fail_truncated=fail_truncated)

    def graded(group: RolloutGroup) -> GradedGroup:
        return grade([group], verifier, fail_truncated, trace_text=trace_text, show_progress=False)[0]

    def finished(group: RolloutGroup) -> GradedGroup:
        logged.add(found := graded(group))
        return found

    def recalled(prompt: Prompt) -> GradedGroup | None:
        if not isinstance(found := logged.recall(prompt), RolloutGroup):
            return found
        logged.judge([whole := graded(found)])
        return whole

    def recall(prompt: Prompt) -> Callable[[], GradedGroup | None] | None:
        return functools.partial(recalled, prompt) if prompt.order in logged.found.entries else None

    # All that a collection may look at, and two batches in flight.
    max_unread = max(
        cfg.prompts_per_round * batching.max_collect_rounds, math.ceil(2 * cfg.oversample * batching.prompts_per_batch)
    )
    return RolloutStream(
        client,
        client.sampling(objective.num_rollouts(cfg.group_size)),
        StreamWork(
            claim=lambda count: draws.claim(count * replicas),
            load=draws.source.at,
            finish=finished,
            recall=recall,
            is_useful=lambda group: will_learn_from(group, objective, current_step()),
            planner=planner_of(objective, cfg.group_size, step=current_step, seed=config.run.seed, judge=judged),
        ),
        oversample=cfg.oversample,
        max_unread=math.ceil(max_unread / replicas),
        stop=STOP,
    )
