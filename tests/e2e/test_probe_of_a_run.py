"""The probe with a real server: inside training, where α follows it, and as a command on the weights of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.gradient_projection import RandomProjection, WholeGradient
from megatron_dypo.probe.gradients import Setting
from megatron_dypo.probe.result import analyse
from megatron_dypo.probe.scores import Scores, load
from tests.support.e2e.commands import finished, start, steps_of, train
from tests.support.e2e.parity_task import write_task

PROMPTS, REPEATS, GROUP, SIZE = 8, 3, 4, 512
SECTIONS: dict[str, Any] = {
    "parallel": {"pipeline": 2},
    "objective": {"alpha": "auto"},
    "probe": {"every": 1, "prompts": PROMPTS, "repeats": REPEATS, "dimension": SIZE},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed")
    train(write_task(folder, **SECTIONS))
    return folder / "run"


def result_of(run: Path, step: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "probe" / f"step_{step:06d}.json").read_text())
    return result


def test_a_probe_in_training_keeps_its_scores_and_alpha_follows_it(run: Path) -> None:
    records = steps_of(run)
    for step in (1, 2):
        scores = load(run / "probe" / f"step_{step:06d}.npz")
        assert scores.score_Nd.shape == (PROMPTS * (REPEATS * GROUP + 2), SIZE), (
            "rollouts and two traces of each prompt"
        )
        norms = np.linalg.norm(scores.score_Nd, axis=1)
        assert norms.max() < 20 * np.median(norms), "nothing of the update before is left in a score"
        assert set(scores.log_ratio_N) == {"old", "frozen"}
        assert scores.teachers == ("long", "short")
        assert np.bincount(scores.repeat_N + 1).tolist() == [2 * PROMPTS, *[PROMPTS * GROUP] * REPEATS]
        assert result_of(run, step)["step"] == step
        assert result_of(run, step)["cost"]["trajectories"] == len(scores.length_N)
        assert 0.1 <= records[step]["probe/alpha"] <= 0.9
        assert records[step]["timing_s/probe"] > 0
    assert not list((run / "probe").glob("*.replica_*"))
    assert (run / "probe" / "step_000001.npz").read_bytes() != (run / "probe" / "step_000002.npz").read_bytes()
    state = json.loads((run / "checkpoints" / "step_000002" / "trainer_state.json").read_text())
    assert state["trainer"]["moments"] is not None


@pytest.mark.slow
def test_the_command_measures_the_weights_that_a_run_began_with(run: Path) -> None:
    output = finished(start("probe", run, "probe.prompts=4", "--initial", cwd=run.parent))
    assert result_of(run, 0)["step"] == 0
    ratios = load(run / "probe" / "step_000000.npz").log_ratio_N["frozen"]
    assert np.abs(ratios).max() < 1e-4, "the initial weights are the reference"
    assert "Assumptions of the paper" in output
    assert sorted(steps_of(run)) == [1, 2], "a probe writes no metrics of the run"


@pytest.mark.slow
def test_whole_gradients_of_a_checkpoint_are_those_that_were_projected_in_training(run: Path) -> None:
    before = (run / "probe" / "step_000001.json").read_bytes()
    in_training = load(run / "probe" / "step_000001.npz")
    options = ("probe.prompts=4", "probe.dimension=0")
    finished(start("probe", run / "checkpoints" / "step_000001", *options, cwd=run.parent))
    assert (run / "probe" / "step_000001.json").read_bytes() != before
    exact = load(run / "probe" / "step_000001.npz")
    assert exact.prompt_ids == in_training.prompt_ids[:4]
    assert np.abs(exact.log_ratio_N["frozen"]).max() > 1e-4, "one step has moved the weights"
    projected = projected_by_tensor(exact, run.parent / "model")
    # The same traces under the same weights; the rollouts are others.
    ours, theirs = (one.score_Nd[(one.teacher_N >= 0) & (one.prompt_N < 4)] for one in (projected, in_training))
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    require_near(projected, result_of(run, 1))


def projected_by_tensor(scores: Scores, model: Path) -> Scores:
    """Project whole gradients, an HF tensor at a time, to the probe's dimension in training."""
    arch = load_architecture(model)
    whole, projection = WholeGradient(arch), RandomProjection(SIZE, 0)
    assert scores.score_Nd.shape[1] == whole.size
    total_ND = np.zeros((len(scores.score_Nd), 2 * SIZE))
    for row in family_rows(arch):
        for name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True):
            rows, columns = shape[0], shape[1] if len(shape) > 1 else 1
            entries, slots = (
                one.slots(name, torch.arange(rows), torch.arange(columns), columns).flatten().numpy()
                for one in (whole, projection)
            )
            for total_D, score_P in zip(total_ND, scores.score_Nd, strict=True):
                total_D += np.bincount(slots, score_P[entries], 2 * SIZE)
    return replace(scores, score_Nd=(total_ND[:, :SIZE] - total_ND[:, SIZE:]).astype(np.float32))


def require_near(projected: Scores, exact: dict[str, Any]) -> None:
    """Require the variances of a projection to be within four times its stated error of the exact ones."""
    assert exact["projection_error"] == 0
    found = analyse(projected, Setting(**exact["setting"]), exact["alpha"])
    for term in ("grpo", "gal"):
        ours, theirs = (one["moments"]["all"]["total"][term]["value"] for one in (found, exact))
        assert ours == pytest.approx(theirs, rel=4 * found["projection_error"], abs=1e-12), term


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: must be a run folder"),
        (["RUN/checkpoints/step_000009"], "step_000009: must be a run folder"),
        (["RUN", "run.dir=elsewhere"], "a probe writes to the folder of its run"),
        (["RUN", "probe.prompts=2"], "prompts=2: must be at least 3"),
        (["RUN/checkpoints/step_000001", "--initial"], "name the run folder"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(arguments: list[str], message: str, run: Path) -> None:
    given = [word.replace("RUN", str(run)) for word in arguments]
    output = finished(start("probe", *given, cwd=run.parent), status=65)
    assert message in output
    assert "Traceback" not in output
