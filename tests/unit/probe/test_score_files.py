"""Files of scores: what is written is read, and whatever breaks a rule is named."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_dypo.probe.scores import FORMAT, join, load, save
from tests.support.probe_cases import Population, draw_rollouts, take, to_scores

ARRAYS = ("score_Nd", "prompt_N", "repeat_N", "teacher_N", "is_correct_N", "reward_N", "length_N")


def example(prompts=3):
    rng = np.random.default_rng(0)
    drawn = draw_rollouts(rng, Population(), prompts=prompts, repeats=2, group_size=4)
    return to_scores(drawn, traces=rng.standard_normal((prompts, 2, 6)))


def assert_equal(first, second):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), strict=True)
    assert first.log_ratio_N.keys() == second.log_ratio_N.keys()
    for name, ratio in first.log_ratio_N.items():
        np.testing.assert_array_equal(ratio, second.log_ratio_N[name], strict=True)
    assert (first.prompt_ids, first.teachers, first.step) == (second.prompt_ids, second.teachers, second.step)


def rewrite(path, **changes):
    """Write the file's arrays again: changed, or left out where the change is None."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    arrays = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(path, **arrays)


def rewrite_notes(path, **changes):
    with np.load(path) as file:
        notes = json.loads(file["notes"].tobytes())
    rewrite(path, notes=np.frombuffer(json.dumps(notes | changes).encode(), np.uint8))


def rows(scores):
    return sorted(map(tuple, np.column_stack([scores.score_Nd, scores.prompt_N, scores.repeat_N, scores.teacher_N])))


def test_what_is_saved_is_loaded(tmp_path):
    scores = replace(example(), prompt_ids=("a\0", "b\nc", "ü"))
    save(scores, tmp_path / "scores.npz")
    assert_equal(load(tmp_path / "scores.npz"), scores)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_parts_of_replicas_join_to_the_whole():
    whole = example()
    shuffled = np.random.default_rng(1).permutation(len(whole.prompt_N))
    parts = [take(whole, np.sort(shuffled[:10])), take(whole, np.sort(shuffled[10:])), take(whole, shuffled[:0])]
    joined = join(parts)
    assert rows(joined) == rows(whole)
    assert (np.diff(joined.prompt_N) >= 0).all()


def test_parts_of_whole_prompts_join_to_the_same_arrays_in_any_order():
    whole = example(4)
    parts = [take(whole, np.flatnonzero(whole.prompt_N % 2 == rest)) for rest in (0, 1)]
    assert_equal(join(parts), join(parts[::-1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 4}, "step: differs"),
        ({"prompt_ids": ("a", "b", "c")}, "prompt_ids: differs"),
        ({"teachers": ("x", "y")}, "teachers: differs"),
    ],
)
def test_parts_that_differ_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        join([example(), replace(example(), **change)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score_Nd": None}, r"missing \['score_Nd'\]"),
        ({"extra": np.zeros(3)}, r"unknown \['extra'\]"),
        ({"log_ratio_1": None}, r"missing \['log_ratio_1'\]"),
        ({"notes": None}, "missing 'notes'"),
        ({"score_Nd": np.zeros((30, 6))}, "score_Nd of type float64: must be float32"),
        ({"prompt_N": np.zeros(30, np.int32)}, "prompt_N of type int32: must be int64"),
        ({"length_N": np.zeros(29, np.int64)}, r"length_N of shape \(29,\): must be \(30,\)"),
        ({"reward_N": np.full(30, np.nan)}, r"reward_N\[0\]=nan: must be finite"),
        ({"prompt_N": np.full(30, 3)}, r"prompt_N\[0\]=3: must be in 0..2"),
        ({"teacher_N": np.full(30, 2)}, r"teacher_N\[0\]=2: must be in -1..1"),
        ({"teacher_N": np.full(30, 1)}, r"teacher_N\[0\]=1, repeat_N\[0\]=0: exactly one must be −1"),
        ({"length_N": np.full(30, -1)}, r"length_N\[0\]=-1: must be at least 0"),
        ({"log_ratio_0": np.ones(30)}, r"log_ratio_N\['old'\]: must be zero"),
        ({"notes": np.frombuffer(b"{", np.uint8)}, "notes: must be JSON"),
        ({"reward_N": np.array([None] * 30)}, "cannot be read"),
    ],
)
def test_a_broken_file_is_refused_with_file_field_value_and_rule(changes, words, tmp_path):
    path = tmp_path / "scores.npz"
    save(example(), path)
    assert len(load(path).prompt_N) == 30
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=words) as raised:
        load(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": FORMAT + 1}, f"format={FORMAT + 1}: must be {FORMAT}"),
        ({"more": 1}, "must have the keys"),
        ({"step": "3"}, "step='3': must be of type int"),
        ({"step": -1}, "step=-1: must be an integer from 0"),
        ({"prompt_ids": ["a", "a", "b"]}, "must not have one twice"),
        ({"prompt_ids": [1, 2, 3]}, "must be texts"),
        ({"references": ["frozen", "other"]}, "must contain 'old'"),
    ],
)
def test_broken_notes_are_refused(changes, words, tmp_path):
    path = tmp_path / "scores.npz"
    save(example(), path)
    rewrite_notes(path, **changes)
    with pytest.raises(ValueError, match=words) as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "scores.npz"
    save(example(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        load(path)
