"""Impossible configs: each is refused with the file or override, the field, the value and the rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.config.evaluation import EvalConfig, EvalSetConfig
from megatron_dypo.config.reading.load import dump_config, load_config, parse_config
from megatron_dypo.config.tree import Config

MINIMAL: dict[str, dict[str, Any]] = {"model": {"hf_path": "m"}, "data": {"prompts": ["p.jsonl"]}}
TEXT = "model: {hf_path: m}\ndata: {prompts: [p.jsonl]}\n"


def problem_of(folder: Path, text: str | bytes, overrides: tuple[str, ...] = ()) -> str:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what the tests compare
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT + "run: {steps: 1}\nrun: {steps: 2}\n", "the key 'run' stands twice"),
        (TEXT + "run: {steps: 1, steps: 2}\n", "the key 'steps' stands twice"),
        (TEXT.encode() + b"run: {dir: \xff}\n", "byte 58 is not UTF-8"),
        (TEXT + "run: {seed: " + "9" * 5000 + "}\n", "an integer of 5000 digits"),
        ("[" * 5000, "nested too deeply"),
        (TEXT + "run: {dir: " + "[" * 60 + "]" * 60 + "}\n", "nested more than 50 deep"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "more than 20,000 values"),
        ("a: &a [*a]", "nested more than 50 deep"),
        (TEXT + "run: {seed: 010}\nx: y: z", "not YAML"),
        ("- 1", "must be a mapping of sections"),
        ("!!python/object/apply:os.system [ls]", "not YAML"),
    ],
)  # fmt: skip
def test_text_that_is_no_config_is_refused_with_the_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    problem = problem_of(tmp_path, text)
    assert str(tmp_path / "config.yaml") in problem
    assert message in problem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=.inf", "optimizer.lr=inf: must be a finite number"),
        ("optimizer.lr='inf'", "optimizer.lr=inf: must be a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr=nan: must be positive"),
        ("optimizer.weight_decay=.inf", "optimizer.weight_decay=inf: must be a finite number"),
        ("objective.kl_coef=.inf", "kl_coef=inf"),
        ("rollout.temperature=.inf", "temperature=inf"),
        ("rollout.oversample=.inf", "oversample=inf"),
        ("rollout.request_deadline_s=.inf", "request_deadline_s=inf"),
        ("refit.deadline_s=.inf", "refit.deadline_s=inf"),
        ("grading.deadline_s=1e400", "deadline_s=inf"),
        ("run.steps=100000000000000000000", "run.steps=1.000e+20: must be below 2^53"),
        ("run.seed=18446744073709551616", "seed=18446744073709551616: must be in [0, 2^31)"),
        ("run.seed=-1", "seed=-1: must be in [0, 2^31)"),
        ("run.dir=''", "dir='': is required"),
        ('run.dir="a\\0b"', "run.dir='a\\x00b': must not contain NUL"),
        ("run.seed=" + "9" * 5000, "an integer of 5000 digits"),
        ("eval.max_prompts=-3", "max_prompts=-3: must be positive"),
        ("optimizer.warmup_steps=500", "optimizer.warmup_steps=500: must not exceed run.steps=100"),
        ("objective.sft_steps=101", "objective.sft_steps=101: must not exceed run.steps=100"),
        ("objective.rl_only_steps=101", "objective.rl_only_steps=101: must not exceed run.steps=100"),
        ("optimizer.max_bad_steps=0", "max_bad_steps=0: must be positive"),
        ("refit.quantize=fp8_block", None),
        ("run..steps=1", "a part of the key is empty"),
        (".=1", "a part of the key is empty"),
        ("run.steps=1:30", "run.steps='1:30'"),
        ("run.steps=0b11", "run.steps='0b11'"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, override: str, message: str | None) -> None:
    if message is None:
        problem = problem_of(tmp_path, TEXT, (override, "refit.transport=disk"))
        assert "refit.refit." not in problem, "the section is named once"
        return
    assert message in problem_of(tmp_path, TEXT, (override,))


def test_numbers_are_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TEXT + "run: {seed: 010, steps: 1_000}\noptimizer: {lr: 1e-6, eps: 1.0E-5, weight_decay: +.5}\n")
    config = load_config(path)
    assert (config.run.seed, config.run.steps) == (10, 1000)
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.weight_decay) == (1e-6, 1e-5, 0.5)


def test_a_value_of_a_python_config_is_held_to_the_same_rules() -> None:
    config = parse_config(MINIMAL, where="here")
    with pytest.raises(ValueError, match=r"optimizer\.lr=inf: must be a finite number"):
        dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=float("inf")))


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def keys_of(section: type) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, kind in get_type_hints(section).items():
        nested = keys_of(kind) if dataclasses.is_dataclass(kind) else []  # type: ignore[arg-type]
        found += [(name, *rest) for rest in nested] or [(name,)]
    return found


KEYS = keys_of(Config)


def check_any(key: tuple[str, ...], value: Any) -> None:
    tree: dict[str, Any] = {name: dict(section) for name, section in MINIMAL.items()}
    node = tree
    for name in key[:-1]:
        node = node.setdefault(name, {})
    node[key[-1]] = value
    try:
        config = parse_config(tree, where="config.yaml")
    except ValueError as error:
        problem: str | None = str(error)
    else:
        problem = None
    if problem is not None:
        assert problem.startswith("config.yaml: "), problem
        return
    assert parse_config(yaml.safe_load(dump_config(config)), where="again") == config


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(KEYS), values)
def test_any_value_of_any_key_is_taken_or_refused_in_words(key: tuple[str, ...], value: Any) -> None:
    check_any(key, value)


@pytest.mark.slow
@settings(deadline=None, max_examples=20_000)
@given(st.sampled_from(KEYS), values)
def test_any_value_of_any_key_is_taken_or_refused_in_words_at_length(key: tuple[str, ...], value: Any) -> None:
    check_any(key, value)


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_any_text_is_a_config_or_refused_in_words(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"fuzz\.yaml"):
        load_config(path)


@pytest.mark.parametrize("key", ["optimizer.lr", "rollout.temperature", "run.steps", "optimizer.eps"])
def test_a_boolean_is_no_number(key: str, tmp_path: Path) -> None:
    assert f"{key}=true: must be a number" in problem_of(tmp_path, TEXT, (f"{key}=true",))


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("data.fields.traces=5", "data.fields.traces=5: "),
        ("data.teachers=5", "data.teachers=5: "),
        ("eval.sets={a: [x, y]}", "eval.sets.a=['x', 'y']: "),
        ("eval.sets=5", "eval.sets=5: "),
        ("parallel.num_processes=[1]", "parallel.num_processes=[1]: "),
    ],
)
def test_an_error_names_keys_of_the_file_alone(override: str, place: str, tmp_path: Path) -> None:
    problem = problem_of(tmp_path, TEXT, (override,))
    assert f"override {override!r}: {place}" in problem
    assert "tuple[" not in problem
    assert ".str=" not in problem


@pytest.mark.parametrize("name", ["", " ", ".", "..", "x" * 81])
def test_an_evaluation_set_has_a_name_that_is_a_folder_of_its_own(name: str) -> None:
    with pytest.raises(ValueError, match="metrics and a folder have this name"):
        EvalConfig(sets={name: EvalSetConfig(path="p.jsonl")})
    EvalConfig(sets={name: EvalSetConfig(path="p.jsonl") for name in ("a/b", "a b", "…")})
