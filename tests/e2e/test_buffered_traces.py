"""The buffer of ``relift`` on a real SGLang: which traces enter it, when they get their update, and after a resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_dypo.metrics.samples import read_samples
from megatron_dypo.types import SampleKind, Treatment
from tests.support.e2e.commands import steps_of, train
from tests.support.e2e.parity_task import write_task
from tests.support.e2e.waiting import Row, groups_in, response, row_of, rows_of, trainer_state

pytestmark = pytest.mark.slow

SIZE = 6
"""Traces of an update on the buffer: as many as the 16 rows have whose answer, 2, no response has."""


@dataclass(frozen=True, kw_only=True)
class BufferRun:
    """A run that stopped after its second step, and went on to its fourth."""

    folder: Path
    rows: dict[tuple[int, ...], Row]
    records: dict[int, dict[str, float]]
    output: str
    """Of the second start."""

    def checkpoint(self, step: int) -> Path:
        return self.folder / "checkpoints" / f"step_{step:06d}"

    def hard(self, *steps: int) -> set[str]:
        """Return the ids of the Hard prompts that were collected for these steps."""
        return {row["prompt_id"] for row in read_samples(self.folder, steps) if row["tier"] == "hard"}

    def buffered(self, step: int) -> dict[int, str]:
        """Return order → prompt of the buffered traces in the checkpoint of a step."""
        groups = [group for group in groups_in(self.checkpoint(step)) if group[0].is_buffered]
        return {group[0].order: row_of(group[0], self.rows).prompt_id for group in groups}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> BufferRun:
    folder = tmp_path_factory.mktemp("buffer")
    config = write_task(
        folder,
        num_prompts=16,
        answers=(0, 1, 2),
        objective={"name": "relift", "options": {"buffer_size": SIZE, "buffer_keeps": 100}},
        rollout={"group_size": 8},
        checkpoint={"keep": 0},
    )
    train(config, "run.steps=2", "parallel.num_processes=2")
    output = train(config, "run.steps=4")
    return BufferRun(folder=folder / "run", rows=rows_of(folder), records=steps_of(folder / "run"), output=output)


def test_a_trace_of_each_hard_prompt_enters_the_buffer_and_no_other(run: BufferRun) -> None:
    never = {row.prompt_id for row in run.rows.values() if row.answer == 2}
    assert len(never) == SIZE
    assert never <= run.hard(1, 2)
    assert set(run.buffered(1).values()) == run.hard(1)
    assert set(run.buffered(2).values()) == run.hard(1, 2)
    assert 0 < len(run.buffered(1)) < SIZE
    assert run.records[1]["queue/buffer"] == len(run.buffered(1))


def test_a_checkpoint_holds_the_buffered_traces_whole(run: BufferRun) -> None:
    for (sample,) in (group for group in groups_in(run.checkpoint(2)) if group[0].is_buffered):
        assert response(sample) in row_of(sample, run.rows).traces
        assert (sample.kind, sample.treatment) == (SampleKind.TRACE, Treatment.DISTILL)


def test_the_newest_traces_get_the_update_after_the_batch_that_finds_enough_of_them(run: BufferRun) -> None:
    assert sorted(run.records) == [1, 2, 3, 4]
    orders = sorted(run.buffered(2))
    assert trainer_state(run.checkpoint(1))["batch"]["buffered_orders"] == []
    assert trainer_state(run.checkpoint(2))["batch"]["buffered_orders"] == orders[-SIZE:]
    own, others = run.records[3], [run.records[step] for step in (1, 2, 4)]
    assert own["train/num_prompts"] == own["train/num_sequences"] == SIZE
    assert own["gate/offline_share_prompts"] == 1.0
    assert own["train/sft_nll"] > 0
    assert own["train/entropy_bonus"] < 0, "that update alone has an entropy bonus"
    assert own["train/grad_norm"] > 0
    assert "rollout/num_rollouts" not in own
    for record in others:
        assert record["gate/offline_share_prompts"] == 0.0
        assert (record["train/num_prompts"], record["train/num_sequences"]) == (8, 64)
        assert "train/entropy_bonus" not in record
        assert record["rollout/policy_version"] == {1: 0, 2: 1, 4: 3}[int(record["step"])]


def test_a_run_that_resumes_between_makes_that_update_first(run: BufferRun) -> None:
    assert "2 of 4 steps are done" in run.output
    assert "please report this" not in run.output
    left = sorted(run.buffered(2))[:-SIZE]
    assert sorted(run.buffered(3)) == left
    assert set(run.buffered(4).values()) == {run.buffered(2)[order] for order in left} | run.hard(4)
    ledger = [run.records[step]["ledger/trained_rl"] for step in (1, 2, 3, 4)]
    assert ledger == [8, 16, 16, 24], "a trace of the buffer is no draw"
