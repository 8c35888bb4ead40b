"""Rows: the fields that are sent to a verifier, and the verifier that a row chooses."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.reading.load import dump_config, load_config, parse_config
from megatron_dypo.grading.naming import row_verifier_problem, unused_sources, verifier_of
from megatron_dypo.grading.pairs import Pair
from megatron_dypo.grading.verify import Verifier, grade
from megatron_dypo.types import Prompt, Rollout, RolloutGroup, Verdict

HERE = "tests.support.grading.verifiers"


def _verdict(function: str, pair: Pair, **changes: Any) -> Verdict:
    with Verifier(GradingConfig(verifier=f"{HERE}:{function}", workers=1, **changes)) as verifier:
        (verdict,) = verifier.verify([pair])
    return verdict


def test_a_verifier_may_take_the_whole_row_and_an_object_as_the_answer() -> None:
    row = {"tests": [{"in": 1, "out": 2}], "level": 3}
    answer = {"response": "r", "prompt": "p", "source": "s", "id": "7", "row": row}
    nothing = np.zeros(0, np.int32)
    prompt = Prompt(
        prompt_id="7", visit=0, order=0, tokens=nothing, text="p", answer=answer, source="s", row=MappingProxyType(row)
    )
    rollout = Rollout(tokens=nothing, logp=nothing.astype(np.float32), text="r", finish="stop", policy_version=0)
    with Verifier(GradingConfig(verifier=f"{HERE}:whole_row", workers=1)) as verifier:
        (group,) = grade([RolloutGroup(prompt=prompt, rollouts=(rollout,))], verifier, True, show_progress=False)
    assert group.verdicts == (Verdict(is_correct=True, reward=1.0),)


def test_a_function_written_for_verl_works_as_it_is() -> None:
    right = Pair(response="4", answer="4", source="test", row={"extra_info": {"split": "test"}})
    wrong = Pair(response="5", answer="4", source="test", row={"extra_info": {"split": "test"}})
    assert _verdict("verl_score", right) == Verdict(is_correct=True, reward=1.0)
    assert _verdict("verl_score", wrong) == Verdict(is_correct=False, reward=-1.0)


def test_the_rows_own_verifier_wins_over_its_sources_and_that_over_the_configs() -> None:
    cfg = GradingConfig(
        verifier=f"{HERE}:obedient",
        by_source={"letters": "choice", "words": "exact"},
        row_verifiers=(f"{HERE}:source_only",),
        workers=2,
    )
    pairs = [
        Pair(response="raw", answer="raw", source="other"),
        Pair(response="The answer is (B).", answer="B", source="letters"),
        Pair(response="the answer is: Paris.", answer="paris", source="words"),
        Pair(response="words", answer="no", source="words", verifier=f"{HERE}:source_only"),
        Pair(response="\\boxed{1/2}", answer="0.5", source="words", verifier="math"),  # not imported at the start
        Pair(response="The answer is (B).", answer="B", source="other"),
    ] * 3
    with Verifier(cfg) as verifier:
        verdicts = verifier.verify(pairs)
    assert [verdict.is_correct for verdict in verdicts] == [True] * 5 + [False] + ([True] * 5 + [False]) * 2
    assert all(verdict.error is None for verdict in verdicts)


def test_a_row_cannot_name_code_that_the_config_does_not_name() -> None:
    cfg = GradingConfig(verifier="exact", workers=1)
    pairs = [Pair(response="true", answer="", verifier="os:system"), Pair(response="a", answer="a", verifier="exact")]
    with Verifier(cfg) as verifier:
        refused, judged = verifier.verify(pairs)
    assert refused.error == row_verifier_problem(cfg, "os:system")
    assert "a row may name math, exact, choice; add others to grading.row_verifiers" in (refused.error or "")
    assert judged == Verdict(is_correct=True, reward=1.0)
    with pytest.raises(ValueError, match="verifier='os:system': a row may name"):
        Verifier(cfg, ["os:system"])
    assert verifier_of(cfg, own="choice", source="") == "choice"


@pytest.mark.parametrize(
    ("grading", "key"),
    [
        ({"by_source": {"gsm8k": "no.such:f"}}, "grading.by_source.gsm8k='no.such:f': cannot import no.such"),
        ({"row_verifiers": ["no.such:f"]}, r"grading.row_verifiers\[0\]='no.such:f': cannot import no.such"),
        (
            {"verifier": "no.such:f", "by_source": {"a": "no.such:f"}},
            "grading.verifier, grading.by_source.a='no.such:f': cannot import",
        ),
    ],
)
def test_every_verifier_that_is_named_is_imported_at_start(grading: dict[str, Any], key: str) -> None:
    config = parse_config(
        {"model": {"hf_path": "m"}, "data": {"prompts": ["p.jsonl"]}, "grading": grading}, where="c.yaml"
    )
    with pytest.raises(ValueError, match=key), Verifier(config.grading):
        pass


@pytest.mark.parametrize(
    ("grading", "message"),
    [
        ({"verifier": "maths"}, "grading.verifier='maths': must be one of math, exact, choice or an import path"),
        ({"verifier": "pkg.module:"}, "grading.verifier='pkg.module:'"),
        ({"verifier": ":f"}, "grading.verifier=':f'"),
        ({"verifier": "a b:f"}, "grading.verifier='a b:f'"),
        ({"verifier": "a:f\n"}, "grading.verifier"),
        ({"by_source": {"gsm8k": "regex"}}, "grading.by_source.gsm8k='regex': must be one of"),
        ({"row_verifiers": ["x"]}, r"grading.row_verifiers\[0\]='x'"),
        ({"by_source": {"gsm8k": 3}}, "grading.by_source.gsm8k=3"),
        ({"batch_size": 0}, "grading.batch_size=0: must be positive"),
        ({"deadline_s": float("inf")}, r"grading.deadline_s=inf: must be at most 86400 \(a day\)"),
        ({"deadline_s": float("nan")}, "grading.deadline_s=nan"),
    ],
)
def test_a_value_that_names_no_verifier_is_refused_by_the_config(grading: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"model": {"hf_path": "m"}, "data": {"prompts": ["p.jsonl"]}, "grading": grading}, where="c.yaml")


@pytest.mark.parametrize("verifier", ["exact", "choice", "math"])
def test_a_built_in_verifier_refuses_an_object_as_the_answer(verifier: str) -> None:
    with Verifier(GradingConfig(verifier=verifier, workers=1)) as running:
        verdicts = running.verify([(str(answer), answer) for answer in ({"a": 1}, ["1"], None, True)])
    for verdict in verdicts:
        assert "a built-in verifier compares text; objects need a verifier of your own" in (verdict.error or "")


def test_a_number_as_the_answer_is_its_text() -> None:
    with Verifier(GradingConfig(verifier="exact", workers=1)) as running:
        verdicts = running.verify([("answer: 42", 42), ("answer: 0.5", 0.5)])
    assert [verdict.is_correct for verdict in verdicts] == [True, True]


def test_a_source_that_no_row_has_is_named() -> None:
    cfg = GradingConfig(by_source={"gsm8k": "exact", "arc": "choice"})
    (line,) = unused_sources(cfg, {"gms8k", "arc"})
    assert line == "grading.by_source.gsm8k: no row has this source; the data's sources are arc, gms8k"
    assert unused_sources(cfg, ["arc", "gsm8k"]) == []


def test_verifiers_by_source_survive_the_yaml_of_a_resolved_config() -> None:
    tree = {"model": {"hf_path": "m"}, "data": {"prompts": ["p.jsonl"]}}
    tree["grading"] = {"by_source": {"gsm8k": "exact", "aime 24": "math"}, "row_verifiers": ["a.b:c"]}
    config = parse_config(tree, where="c.yaml")
    assert parse_config(yaml.safe_load(dump_config(config)), where="c.yaml").grading == config.grading


def test_an_override_sets_the_verifier_of_one_source(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: {hf_path: m}\ndata: {prompts: [p.jsonl]}\ngrading: {by_source: {a: exact}}\n"
    )
    grading = load_config(tmp_path / "c.yaml", ["grading.by_source.arc=choice", "grading.by_source.a=math"]).grading
    assert grading.by_source == {"a": "math", "arc": "choice"}
