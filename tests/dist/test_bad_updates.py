"""Updates that are not finite: skipped, explained, and the end of the run when there are too many."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest

from tests.support.dist.multi_step import batch_of, config_of, make_run, put
from tests.support.dist.spawn import RankError, run_ranks
from tests.support.hf_models import make_hf_model

BAD = "decoder.layers.3.mlp.linear_fc2.weight"
"""A weight of the last layer: with two stages the second rank has it."""
SPOILT = (3, 0)
"""Draw and member of the sample whose last log-prob, of three, is spoilt."""


def rank_spoil(path: str, folder: str, axes: dict[str, Any], where: str) -> dict[str, Any]:
    """Make updates of a run with a NaN in one weight, from the start or later, or with infinite rewards."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.ending import RunEnded
    from megatron_dypo.loop.bad_steps.not_finite import require_finite_weights
    from megatron_dypo.mcore.checkpoints.checkpoint import find_latest
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from tests.support.loop_cases import make_step

    layout = start_megatron(ParallelConfig(**axes))
    config = config_of(path, folder, axes, "exact")
    policy_of_bad_steps: Literal["skip", "stop"] = "stop" if where == "logprob" else "skip"
    config = dataclasses.replace(
        config,
        checkpoint=dataclasses.replace(config.checkpoint, every=1),
        optimizer=dataclasses.replace(config.optimizer, on_bad_step=policy_of_bad_steps),
    )
    run, recorder, policy = make_run(config, layout)
    if where == "logprob":
        _spoil_logprob(policy)
    result: dict[str, Any] = {"start": None, "end": None}
    try:
        require_finite_weights(policy, "here")
    except RunEnded as end:
        result["start"] = str(end)
    try:
        for step in range(4):
            if run.progress.batch.is_used_up:
                put(run, _spoilt(batch_of(step // 2)) if where == "rewards" else batch_of(step // 2))
            if where == "weight later" and step == 1:
                _spoil_weight(policy.chunks)
            make_step(run)
    except RunEnded as end:
        result["end"] = (run.progress.step, end.cause.label, str(end))
    saved = find_latest(Path(folder) / "checkpoints")
    close(layout)
    return result | {"refitted": recorder.refitted, "saved": saved is not None, "metrics": recorder.metrics}


def rank_roll_back(
    path: str, folder: str, axes: dict[str, Any], spoilt: list[int], damaged: dict[int, str] | None = None
) -> dict[str, Any]:
    """Make updates of a run that goes back, with a NaN in one weight before each of the ``spoilt`` ones.

    Args:
        damaged: update → file of the newest checkpoint in which a bit flips before it.
    """
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.ending import RunEnded
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close
    from tests.support.loop_cases import make_step

    layout = start_megatron(ParallelConfig(**axes))
    config = config_of(path, folder, axes, "exact")
    config = dataclasses.replace(
        config,
        checkpoint=dataclasses.replace(config.checkpoint, every=2),
        optimizer=dataclasses.replace(config.optimizer, on_bad_step="roll_back"),
    )
    run, recorder, policy = make_run(config, layout)
    digests, updates, end = [policy.weights_digest()], [0], None
    try:
        for step in range(6):
            if run.progress.batch.is_used_up:
                put(run, batch_of(step // 2))
            if step + 1 in spoilt:
                _spoil_weight(policy.chunks)
            if layout.is_global_leader and damaged and step + 1 in damaged:
                flip_bit(Path(folder) / "checkpoints" / f"step_{step:06d}" / damaged[step + 1])
            make_step(run)
            digests.append(policy.weights_digest())
            updates.append(policy.optimizer.num_updates)
    except RunEnded as ended:
        end = (run.progress.step, ended.cause.label, str(ended))
    close(layout)
    name = "train/rolled_back_to"
    back = {step: found[name] for step, found in recorder.metrics.items() if name in found}
    return {"digests": digests, "updates": updates, "end": end, "refitted": recorder.refitted, "back": back}


def rank_replay(folder: str, step: int = 1, weights: Path | None = None) -> tuple[list[Any], list[str]]:
    """Replay the dump of a step of a run; return the findings, and what was first in each microbatch."""
    from megatron_dypo.launch.replay_target import replay_target
    from megatron_dypo.loop.bad_steps.replay import replay

    target = replay_target(Path(folder) / "bad_steps" / f"step_{step:06d}", weights=weights)
    config = target.config([])
    Path(config.run.dir).mkdir(exist_ok=True)
    found = replay(config, target.folder, target.dump, target.weights if target.is_checkpoint else None)
    return [dataclasses.asdict(one) for one in found], [one.first() for one in found]


def flip_bit(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def spoil_file(path: Path) -> None:
    """Put a NaN into one weight of an HF folder."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, file, metadata={"format": "pt"})


def _spoil_logprob(policy: Any) -> None:
    """Put a NaN into one log-prob of the updates' samples."""
    update = policy.update

    def spoilt(weighted: Any) -> Any:
        weighted = list(weighted)
        for index, sample in enumerate(weighted):
            if (sample.order, sample.member) == SPOILT:
                old_logp = sample.old_logp.copy()
                old_logp[2] = math.nan
                weighted[index] = dataclasses.replace(sample, old_logp=old_logp)
        return update(weighted)

    policy.update = spoilt


def _spoil_weight(chunks: Any) -> None:
    import torch

    from megatron_dypo.mcore.chunks import named_global_parameters

    for name, parameter in named_global_parameters(chunks):
        if name == BAD:
            with torch.no_grad():
                parameter[0, 0] = float("nan")


def _spoilt(groups: list[list[Any]]) -> list[list[Any]]:
    return [[dataclasses.replace(s, reward=math.inf if s.is_correct else 0.0) for s in group] for group in groups]


@pytest.mark.parametrize("axes", [{}, {"pipeline": 2}], ids=["one process", "two stages"])
def test_a_weight_that_is_not_finite_ends_the_run_on_all_ranks_by_its_name(
    tmp_path: Path, axes: dict[str, Any]
) -> None:
    path = make_hf_model("qwen2", tmp_path / "hf")
    spoil_file(path)
    run, ranks = str(tmp_path / "run"), axes.get("pipeline", 1)
    results = run_ranks(ranks, rank_spoil, str(path), run, axes, "weight")
    for result in results:
        assert f"weight {BAD} holds a value that is not finite" in result["start"]
        step, label, message = result["end"]
        assert (step, label) == (1, "not_finite")
        assert f"the first that is not finite: weight {BAD}" in message
        assert "log-probs are not finite for 4 of 4 prompts: p0 (member 0, token 0 of the response), p1 (" in message
        assert f"dumped for `megatron-dypo replay {run}/bad_steps/step_000001`" in message
        assert result["refitted"] == []
        assert not result["saved"]
    assert results[0]["metrics"][1]["train/skipped"] == 1.0
    if ranks == 1:
        return  # the replay of two stages shows the same
    for (finding,), (first,) in run_ranks(ranks, rank_replay, run):
        assert first == f"weight {BAD}"
        assert finding["weights"] == [BAD]
        assert "old_logp" in finding["inputs"], "the same weights computed it"
        assert finding["activation"].startswith("decoder.layers.3.mlp.linear_fc2 at token 0 of p")
        assert finding["logprobs"].startswith("p")
        assert finding["gradients"]


def test_a_log_prob_that_is_not_finite_is_named_and_its_microbatch_alone_is_dumped(tmp_path: Path) -> None:
    path, run = str(make_hf_model("qwen2", tmp_path / "hf")), tmp_path / "run"
    results = run_ranks(2, rank_spoil, path, str(run), {}, "logprob")
    place = "old_logp, which the loss reads, is not finite for p3 (member 0, token 2 of the response)"
    for result in results:
        step, label, message = result["end"]
        assert (step, label) == (1, "not_finite"), "optimizer.on_bad_step is stop"
        assert message.startswith("step 1: an update was skipped: the first that is not finite: gradient of ")
        assert "the log-probs of all 4 prompts of the update are finite; " + place in message
    (dumped,) = (run / "bad_steps" / "step_000001").iterdir()
    assert dumped.name.startswith("replica_"), "the other replica has no bad microbatch"
    (one,) = json.loads((dumped / "dump.json").read_text())["microbatches"]
    samples = list(zip(one["prompts"], one["members"], strict=True))
    assert ("p3", 0) in samples
    assert len(samples) < 10, "the update has ten samples, two of them traces"
    ((finding,), (first,)) = run_ranks(1, rank_replay, str(run))[0]
    assert first == "old_logp, which the loss reads, of p3 (member 0, token 2 of the response)"
    assert (finding["weights"], finding["activation"], finding["logprobs"]) == ([], "", "")
    assert "objective" in finding["sums"]
    assert "decoder.layers.3.mlp.linear_fc2.weight" in finding["gradients"]


def test_the_servers_get_no_weights_that_are_not_finite_at_the_end_of_a_batch(tmp_path: Path) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    (result,) = run_ranks(1, rank_spoil, path, str(tmp_path / "run"), {}, "weight later")
    step, label, message = result["end"]
    assert (step, label) == (2, "not_finite"), "a batch has two updates"
    assert f"weight {BAD}" in message
    assert result["refitted"] == []


def test_gradients_that_are_not_finite_end_the_run_after_as_many_updates_as_the_config_says(tmp_path: Path) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    (result,) = run_ranks(1, rank_spoil, path, str(tmp_path / "run"), {}, "rewards")
    assert result["start"] is None
    step, label, message = result["end"]
    assert (step, label) == (3, "not_finite"), "optimizer.max_bad_steps is 3"
    assert message.startswith("step 3: 3 updates in a row were skipped: the first that is not finite: gradient of ")
    assert "the log-probs of all 4 prompts of the update are finite" in message
    assert [result["metrics"][i]["train/skipped"] for i in (1, 2, 3)] == [1.0, 1.0, 1.0]
    assert not result["saved"], "no checkpoint while updates are skipped"


@pytest.mark.parametrize("axes", [{}, {"pipeline": 2}], ids=["one process", "two stages"])
def test_a_run_that_rolls_back_goes_on_with_the_checkpoints_weights_and_the_next_data(
    tmp_path: Path, axes: dict[str, Any]
) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    for result in run_ranks(axes.get("pipeline", 1), rank_roll_back, path, str(tmp_path / "run"), axes, [3]):
        digests, updates = result["digests"], result["updates"]
        assert result["end"] is None
        assert digests[3] == digests[2] != digests[1], "the weights of the checkpoint of step 2"
        assert len(set(digests)) == 6, "every other update changed them"
        assert updates == [0, 1, 2, 2, 3, 4, 5], "and the optimizer's state"
        assert result["refitted"] == [2, 3, 4, 6], "the servers get the weights at once, and at the end of each batch"
        assert result["back"] in ({3: 2.0}, {})


@pytest.mark.parametrize("file", ["mcore/__0_0.distcp", "mcore/.metadata", "trainer_state.json"])
@pytest.mark.parametrize("axes", [{}, {"pipeline": 2}], ids=["one process", "two stages"])
def test_a_run_rolls_back_to_the_newest_whole_checkpoint(tmp_path: Path, file: str, axes: dict[str, Any]) -> None:
    path, run = str(make_hf_model("qwen2", tmp_path / "hf")), tmp_path / "run"
    for result in run_ranks(axes.get("pipeline", 1), rank_roll_back, path, str(run), axes, [5], {5: file}):
        assert result["end"] is None
        assert result["digests"][5] == result["digests"][2] != result["digests"][4]
        assert result["back"] in ({5: 2.0}, {})
    assert (run / "checkpoints" / "step_000004.damaged" / file).is_file()
    assert (run / "checkpoints" / "step_000006").is_dir(), "it goes on and saves"


def test_a_dump_is_not_replayed_on_a_damaged_checkpoint(tmp_path: Path) -> None:
    path, run = str(make_hf_model("qwen2", tmp_path / "hf")), tmp_path / "run"
    run_ranks(1, rank_roll_back, path, str(run), {}, [3])
    weights = run / "checkpoints" / "step_000006"
    assert run_ranks(1, rank_replay, str(run), 3, weights)
    flip_bit(weights / "mcore" / "__0_0.distcp")
    with pytest.raises(RankError, match=r"step_000006/mcore/__0_0\.distcp: "):
        run_ranks(1, rank_replay, str(run), 3, weights)


def test_a_run_with_nothing_but_a_damaged_checkpoint_cannot_roll_back(tmp_path: Path) -> None:
    path, run = str(make_hf_model("qwen2", tmp_path / "hf")), tmp_path / "run"
    (result,) = run_ranks(1, rank_roll_back, path, str(run), {}, [3], {3: "mcore/__0_0.distcp"})
    assert result["end"][:2] == (3, "not_finite")
    assert "none of 1 checkpoints is whole: step_000002/mcore/__0_0.distcp: " in result["end"][2]
    assert (run / "checkpoints" / "step_000002").is_dir(), "nothing is renamed"


def test_a_run_rolls_back_to_one_checkpoint_only_so_often(tmp_path: Path) -> None:
    path, run = str(make_hf_model("qwen2", tmp_path / "hf")), tmp_path / "run"
    (result,) = run_ranks(1, rank_roll_back, path, str(run), {}, [3, 4, 5, 6])
    step, label, message = result["end"]
    assert (step, label) == (6, "not_finite")
    assert message.endswith("; this run went back to a checkpoint 3 times already"), "optimizer.max_rollbacks is 3"
    assert result["back"] == {3: 2.0, 4: 2.0, 5: 4.0}


def test_a_run_without_a_checkpoint_cannot_roll_back(tmp_path: Path) -> None:
    path = str(make_hf_model("qwen2", tmp_path / "hf"))
    (result,) = run_ranks(1, rank_roll_back, path, str(tmp_path / "run"), {}, [1])
    assert result["end"][:2] == (1, "not_finite")
    assert result["end"][2].endswith("; there is no checkpoint to go back to")
    assert result["refitted"] == []
