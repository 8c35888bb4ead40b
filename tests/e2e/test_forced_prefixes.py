"""Rollouts that go on from a teacher's tokens, on a real SGLang: their tokens, log-probs, verdicts and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from megatron_dypo.batching.queues import Group
from megatron_dypo.metrics.samples import read_samples
from megatron_dypo.types import Sample
from tests.support.e2e.commands import steps_of, train
from tests.support.e2e.parity_task import write_task
from tests.support.e2e.waiting import Oracle, Row, groups_in, response, row_of, rows_of, trainer_state
from tests.support.present import present

pytestmark = pytest.mark.slow

MAX_GAP = 1e-4
"""Largest difference of log-probs and entropies of SGLang, the trainer and transformers, in fp32."""
LOW, HIGH = 0.2, 0.9
TRACES = {"odd": " ".join(f"t{i}" for i in range(31, 40)), "even": " ".join(f"t{i}" for i in range(50, 64))}
CASES: dict[str, dict[str, Any]] = {
    "prefix_rft": {},
    "prefix_rft-stream": {"rollout": {"oversample": 1.5}, "parallel": {"num_processes": 2}},
    "trapo": {"rollout": {"group_size": 8}, "parallel": {"pipeline": 2}},
}
OPTIONS = {"prefix_rft": {"low": LOW, "high": HIGH}, "trapo": {}}


@dataclass(frozen=True, kw_only=True)
class ForcedRun:
    """A run of two steps on one rollout batch, and the groups that its second step learns from."""

    objective: str
    records: dict[int, dict[str, float]]
    rows: dict[tuple[int, ...], Row]
    groups: Sequence[Group]
    samples: dict[str, Any]
    """Rows of ``samples/`` by prompt."""
    oracle: Oracle
    """The model that sampled: the one that the run began with."""


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ForcedRun:
    """Make a run; its checkpoint of the first step holds the batch's other groups, with all their log-probs."""
    folder, name = tmp_path_factory.mktemp("forced"), request.param.partition("-")[0]
    own = CASES[request.param]
    config = write_task(
        folder,
        traces=TRACES,
        objective={"name": name, "options": OPTIONS[name]},
        batching={"prompts_per_update": 4, "updates_per_batch": 2},
        rollout={"max_new_tokens": 24, **own.get("rollout", {})},
        parallel=own.get("parallel", {}),
    )
    assert "please report this" not in train(config)
    checkpoint = folder / "run" / "checkpoints" / "step_000001"
    orders = trainer_state(checkpoint)["batch"]["orders"]
    return ForcedRun(
        objective=name,
        records=steps_of(folder / "run"),
        rows=rows_of(folder),
        groups=[group for group in groups_in(checkpoint) if group[0].order in orders],
        samples={row["prompt_id"]: row for row in read_samples(folder / "run", [1])},
        oracle=Oracle(folder / "model"),
    )


def forced(run: ForcedRun) -> list[tuple[Row, Sample]]:
    """Return the rollouts with a teacher's tokens that wait in the checkpoint, each with its row."""
    return [(row_of(s, run.rows), s) for group in run.groups for s in group if s.num_forced_tokens]


def lengths(group: Group, row: Row) -> list[set[int]]:
    """Return for each member the lengths that its prefix may have, by the rule of its objective."""
    sizes = {len(trace) for trace in row.traces}
    if len(group) == 4:
        return [{0}] * 3 + [{n for size in sizes for n in range(int(LOW * size), int(HIGH * size) + 1)}]
    found, rewards = list[set[int]](), [sample.reward for sample in group]
    for count, share, below in ((4, 0.0, -1.0), (2, 0.2, 0.5), (1, 0.5, 0.7), (1, 1.0, 0.9)):
        mean = sum(rewards[: len(found)]) / max(len(found), 1)
        found += [{int(share * size) for size in sizes} if mean < below else {0}] * count
    return found


def test_prefixes_are_beginnings_of_a_trace_as_long_as_the_objective_says(run: ForcedRun) -> None:
    assert len(run.groups) == 4
    for group in run.groups:
        row = row_of(group[0], run.rows)
        for sample, allowed in zip(group, lengths(group, row), strict=True):
            prefix = response(sample)[: sample.num_forced_tokens]
            assert len(prefix) in allowed
            assert any(prefix == trace[: len(prefix)] for trace in row.traces)
        teachers = {response(s)[0] for s in group if s.num_forced_tokens}
        assert len(teachers) <= 1, "all prefixes of a group are of one trace"
    assert forced(run)


def test_the_policy_goes_on_behind_the_prefix(run: ForcedRun) -> None:
    for row, sample in forced(run):
        own = response(sample)[sample.num_forced_tokens :]
        is_whole = response(sample) in row.traces and not own
        assert is_whole or own, "the policy samples at least one token"
        assert sample.num_response_tokens <= 24
    sampled = [tuple(response(s)[s.num_forced_tokens :]) for _, s in forced(run)]
    assert len({own for own in sampled if own}) > 1


def test_log_probs_of_server_trainer_and_transformers_agree_behind_a_prefix(run: ForcedRun) -> None:
    for group in run.groups:
        for sample in group:
            logp_R, entropy_R = run.oracle.score(sample.tokens, sample.num_prompt_tokens)
            given, n = sample.rollout_logp, sample.num_forced_tokens
            assert given is not None
            assert np.isnan(given[:n]).all(), "the server did not sample these"
            np.testing.assert_allclose(given[n:], logp_R[n:], rtol=0, atol=MAX_GAP)
            np.testing.assert_allclose(present(sample.old_logp), logp_R, rtol=0, atol=MAX_GAP)
            if run.objective == "prefix_rft" and n:
                np.testing.assert_allclose(present(sample.old_entropy), entropy_R, rtol=0, atol=MAX_GAP)


def test_the_verdict_is_on_the_whole_response(run: ForcedRun) -> None:
    for row, sample in forced(run):
        shown = run.samples[row.prompt_id]["rollouts"][sample.member]
        words = [f"t{token}" for token in response(sample)[: sample.num_forced_tokens] if token > 2]
        assert shown["text"].split()[: len(words)] == words
        assert shown["num_tokens"] == sample.num_response_tokens
        assert sample.is_correct == shown["is_correct"] == (response(sample)[0] % 2 == row.answer)


def test_metrics_are_those_of_the_rollouts_that_the_step_learned_from(run: ForcedRun) -> None:
    record, behind = run.records[2], [sample for _, sample in forced(run)]
    members = sum(len(group) for group in run.groups)
    shares = [sample.num_forced_tokens / sample.num_response_tokens for sample in behind]
    assert record[f"{run.objective}/forced_ratio"] == pytest.approx(len(behind) / members)
    assert record[f"{run.objective}/forced_reward"] == pytest.approx(np.mean([s.reward for s in behind]))
    assert record[f"{run.objective}/forced_share"] == pytest.approx(np.mean(shares))
    gaps = [
        np.nanmax(abs(present(s.old_logp) - present(s.rollout_logp)), initial=0.0)
        for group in run.groups
        for s in group
    ]
    assert record["train/train_rollout_logprob_abs_diff_max"] == pytest.approx(max(gaps), abs=1e-7)
    for step in (1, 2):
        assert run.records[step]["train/grad_norm"] > 0
        assert run.records[step]["train/num_prompts"] == 4
