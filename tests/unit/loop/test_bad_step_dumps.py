"""Dumps of bad microbatches: whole, bounded, read back as they were; and the words for places that are not finite."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from megatron_dypo.batching.wire import dump_samples
from megatron_dypo.launch.replay_target import replay_target
from megatron_dypo.loop.bad_steps import dump as dumps
from megatron_dypo.loop.bad_steps.dump import Dump, DumpedMicrobatch, find_dump, read_dump, read_microbatch, write_dump
from megatron_dypo.loop.bad_steps.places import Place, bad_inputs, bad_logprobs, shown
from megatron_dypo.objective.streams import STREAMS
from megatron_dypo.types import Sample
from tests.support.objective_cases import random_groups


def samples() -> list[Sample]:
    return [sample for group in random_groups(5, num_hard=1, num_mid=3, group_size=4, vocab=50) for sample in group]


def written(
    folder: Path, microbatches: list[list[Sample]], *, weights: Path = Path("/hf"), weights_step: int = 10
) -> Dump:
    described = [
        DumpedMicrobatch(
            file=f"microbatch_{index:05d}.safetensors",
            number=index,
            prompts=[f"p{sample.order}" for sample in members],
            members=[sample.member for sample in members],
        )
        for index, members in enumerate(microbatches)
    ]
    given = Dump(
        step=12, replica=3, problem="nan", weights=str(weights), weights_step=weights_step, microbatches=described
    )
    return write_dump(folder, given, microbatches, "run: {}\n")


def test_a_dump_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    folder, all_of_them = tmp_path / "step_000012" / "replica_00003", samples()
    said = written(folder, [all_of_them[:5], all_of_them[5:]])
    assert find_dump(tmp_path / "step_000012") == find_dump(folder) == folder
    found = read_dump(folder)
    assert found == said
    again = [sample for one in found.microbatches for sample in read_microbatch(folder, one)]
    assert dump_samples(again) == dump_samples(all_of_them)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "dump.json",
        "microbatch_00000.safetensors",
        "microbatch_00001.safetensors",
    ]


def test_a_dump_holds_a_bounded_number_of_microbatches_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = [samples() for _ in range(dumps.MAX_MICROBATCHES + 3)]
    said = written(tmp_path / "a", many)
    assert (len(said.microbatches), said.left_out) == (dumps.MAX_MICROBATCHES, 3)
    monkeypatch.setattr(dumps, "MAX_BYTES", int(2.5 * len(dump_samples(many[0]))))
    said = written(tmp_path / "b", many)
    assert (len(said.microbatches), said.left_out) == (2, len(many) - 2)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) == 2


def test_a_dump_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be created"):
        written(tmp_path / "file" / "replica_00000", [samples()])
    written(tmp_path / "b", [samples()])
    written(tmp_path / "b", [samples()[:2]])  # a resumed run that comes to the same step
    assert len(read_microbatch(tmp_path / "b", read_dump(tmp_path / "b").microbatches[0])) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "file"]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "is no dump of a step"),
        ("[]", "is no dump of a step"),
        ('{"format": 1, "microbatches": []}', "is no dump of a step"),
    ],
)
def test_a_damaged_description_is_refused_with_its_file(tmp_path: Path, content: str, rule: str) -> None:
    (tmp_path / "dump.json").write_text(content)
    with pytest.raises(ValueError, match=rf"dump\.json: {rule}"):
        read_dump(tmp_path)


def test_other_formats_paths_out_of_the_folder_and_damaged_samples_are_refused(tmp_path: Path) -> None:
    said = written(tmp_path / "a", [samples()])
    path = tmp_path / "a" / "dump.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(ValueError, match="format=2: must be 1"):
        read_dump(tmp_path / "a")
    record["microbatches"][0]["file"] = "../../secret"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="must be a name in the dump's folder"):
        read_dump(tmp_path / "a")
    file = tmp_path / "a" / said.microbatches[0].file
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"microbatch_00000\.safetensors: is damaged"):
        read_microbatch(tmp_path / "a", said.microbatches[0])


def test_a_path_without_a_dump_or_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be RUN/bad_steps/step_N"):
        replay_target(tmp_path)
    written(tmp_path / "a", [samples()], weights=tmp_path / "hf", weights_step=0)
    for weights in (None, tmp_path / "hf"):
        with pytest.raises(ValueError, match="/hf: is no folder: name a checkpoint or an HF folder with --weights"):
            replay_target(tmp_path / "a", weights=weights)


def test_a_checkpoint_that_was_removed_since_the_dump_is_named_with_the_ways_to_go_on(tmp_path: Path) -> None:
    removed, left = tmp_path / "step_000010", tmp_path / "step_000012"
    left.mkdir()
    written(tmp_path / "a", [samples()], weights=removed)
    with pytest.raises(
        ValueError, match="step_000010: the dump names this checkpoint of step 10, which was removed"
    ) as said:
        replay_target(tmp_path / "a")
    for words in ("checkpoint.keep ", "checkpoint.keep_every", "--weights", "`megatron-dypo checkpoints RUN`"):
        assert words in str(said.value)
    assert replay_target(tmp_path / "a", weights=left).weights == left


def test_the_first_token_that_is_not_finite_is_named_for_each_prompt() -> None:
    some = [sample for sample in samples() if sample.old_logp is not None and sample.num_response_tokens > 2]
    logprobs = [np.zeros(sample.num_response_tokens, np.float32) for sample in some]
    logprobs[1][2:] = math.inf
    assert bad_logprobs(some, logprobs) == [Place(order=some[1].order, member=some[1].member, token=2)]
    old_logp = present_logp(some[0])
    old_logp[1] = math.nan
    spoilt = [dataclasses.replace(some[0], old_logp=old_logp), *some[1:]]
    assert bad_inputs(some, STREAMS) == {}
    assert bad_inputs(spoilt, STREAMS) == {"old_logp": [Place(order=some[0].order, member=some[0].member, token=1)]}


def test_log_probs_of_forced_tokens_that_no_server_sampled_may_be_missing() -> None:
    sample = next(sample for sample in samples() if sample.old_logp is not None and sample.num_response_tokens > 2)
    logp = np.zeros(sample.num_response_tokens, np.float32)
    logp[:2] = math.nan
    forced = dataclasses.replace(sample, rollout_logp=logp, num_forced_tokens=2)
    assert bad_inputs([forced], STREAMS) == {}
    assert "rollout_logp" in bad_inputs([dataclasses.replace(forced, num_forced_tokens=1)], STREAMS)


def test_places_are_shown_for_the_first_prompts_and_counted_for_the_rest() -> None:
    places = [Place(order=order, member=member, token=order) for order in range(5) for member in range(2)]
    text = shown(places, {order: f"p{order}" for order in range(5)})
    assert text == (
        "p0 (member 0, token 0 of the response), p1 (member 0, token 1 of the response), "
        "p2 (member 0, token 2 of the response) and 2 more"
    )


def present_logp(sample: Sample) -> np.ndarray:
    assert sample.old_logp is not None
    return np.asarray(sample.old_logp).copy()
