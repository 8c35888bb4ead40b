"""benchmarks/lm_eval_verdicts.py finds each difference between our verdicts and the harness's, and its reason."""

import json
import re
from pathlib import Path

import pytest

from megatron_dypo.eval.records import Record, RecordFile
from megatron_dypo.grading.math import verify_math
from megatron_dypo.grading.stated import stated_answer

ROOT = Path(__file__).parents[2]
FILTERS = {
    "strict-match": (r"#### (\-?[0-9\.\,]+)", 0),
    "flexible-extract": (r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
}
"""Filter of the harness's task gsm8k → its pattern, and which match it takes."""
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
"""Texts that the harness removes before it compares, in this order."""

NO_MARK, NO_NUMBER = "no #### and number for the harness", "no number for the harness"
TEXTS, SIGNS = "the same number: the harness compares texts", "the harness reads signs as a number"
FIRST = "ours takes the line of the last ####, the harness the number after the first"
MARKED = "ours takes the whole marked answer, the harness the last number"
STATED = "ours takes the answer that a sentence states, the harness the last number"
PART = "ours takes no number that is a part of something larger"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def by_ours(response, gold, truncated=False):
    from lm_eval_verdicts import Judged

    right = verify_math(response, gold)
    return Judged(
        response=response, answer=stated_answer("math", response, gold), correct=right, truncated=truncated
    )  # fmt: skip


def by_harness(response, gold, name):
    from lm_eval_verdicts import Judged

    pattern, which = FILTERS[name]
    matches = [next(filter(None, match.groups())) for match in re.finditer(pattern, response)]
    answer = matches[which] if matches else None
    bare = answer
    for ignored in IGNORED:
        bare = None if bare is None else re.sub(ignored, "", bare)
    return Judged(response=response, answer=answer, correct=bare == gold)


@pytest.mark.parametrize(
    ("name", "response", "gold", "right", "reason"),
    [
        ("strict-match", "The answer is 7.", "7", "ours", NO_MARK),
        ("strict-match", "#### $18", "18", "ours", NO_MARK),
        ("strict-match", "#### 12.0", "12", "ours", TEXTS),
        ("strict-match", "#### 4\n#### 5", "5", "ours", FIRST),
        ("strict-match", "#### 4\n#### 5", "4", "harness", FIRST),
        ("flexible-extract", "\\boxed{x}, 4 times", "x", "ours", MARKED),
        ("flexible-extract", "#### 18\nor 3 a day", "18", "ours", MARKED),
        ("flexible-extract", "The answer is 5. It took 2 steps", "5", "ours", STATED),
        ("flexible-extract", "He has 5 + 3", "3", "harness", PART),
        ("flexible-extract", "The answer is 5. And so on ...", "5", "ours", SIGNS),
        ("flexible-extract", "It is 12.0", "12", "ours", TEXTS),
        ("flexible-extract", "It is $18.50", "18.5", "ours", TEXTS),
        ("flexible-extract", "The answer is seven", "seven", "ours", NO_NUMBER),
    ],
)
def test_two_verdicts_on_one_response_differ_for_the_reason_that_is_named(name, response, gold, right, reason):
    import lm_eval_verdicts as verdicts

    mine, other = by_ours(response, gold), by_harness(response, gold, name)
    assert (mine.correct, other.correct) == (right == "ours", right == "harness")
    assert verdicts.reason(mine, other, name) == reason


def test_verdicts_on_two_responses_differ_because_of_the_responses():
    from lm_eval_verdicts import reason

    assert reason(by_ours("7", "7"), by_harness("8", "7", "flexible-extract"), "flexible-extract") == "other responses"


def test_every_pair_of_verdicts_or_answers_that_differs_is_printed_and_no_other(capsys):
    from lm_eval_verdicts import compare

    golds = {"0": "12", "1": "7", "2": "1", "3": "9"}
    responses = {"0": "so 12.0", "1": "so 7", "2": "two", "3": "#### 5\nnot 6"}
    ours = {item: by_ours(response, golds[item], truncated=item == "1") for item, response in responses.items()}
    ours["2"] = by_ours("one", "1")
    theirs = {
        name: {item: by_harness(response, golds[item], name) for item, response in responses.items()}
        for name in FILTERS
    }  # fmt: skip
    assert compare(ours, theirs, golds) == {
        "items": 4,
        "same_responses": 3,
        "correct_ours": 2,
        "truncated": 1,
        "correct_and_truncated": 1,
        "correct_strict-match": 0,
        "same_verdicts_strict-match": 2,
        "same_answers_strict-match": 2,
        "reasons_strict-match": {NO_MARK: 2},
        "correct_flexible-extract": 1,
        "same_verdicts_flexible-extract": 3,
        "same_answers_flexible-extract": 3,
        "reasons_flexible-extract": {TEXTS: 1},
    }
    assert capsys.readouterr().out.splitlines() == [
        "item 2: other responses: from character 0: ours 'one', theirs 'two'",
        f"item 0: gold 12: math right ('12'), strict-match wrong (no answer): {NO_MARK}; ends 'so 12.0'",
        f"item 1: gold 7: math right ('7'), strict-match wrong (no answer): {NO_MARK}; cut off after 'so 7'",
        f"item 0: gold 12: math right ('12'), flexible-extract wrong ('12.0'): {TEXTS}; ends 'so 12.0'",
        f"item 3: gold 9: math wrong ('5'), flexible-extract wrong ('6'): {MARKED}; ends '#### 5\\nnot 6'",
        "strict-match      both right   0, math alone   2, the harness alone   0, both wrong   2",
        "flexible-extract  both right   1, math alone   1, the harness alone   0, both wrong   2",
    ]


def test_a_missing_response_is_refused():
    from lm_eval_verdicts import compare

    theirs = {name: {"0": by_harness("7", "7", name)} for name in FILTERS}
    with pytest.raises(ValueError, match="1 items: a response is missing: 0 of ours, 1"):
        compare({}, theirs, {"0": "7"})


@pytest.fixture
def both_outputs(tmp_path):
    """A folder with one item and one response, as the two programs write them."""
    (tmp_path / "prompts.jsonl").write_text('{"id": "0", "prompt": "How many?", "answer": "2 + 5 = 7\\n#### 7"}\n')
    record = Record(
        set="gsm8k", item="0", sample=0, seed=1, source="", correct=True, truncated=True, num_tokens=1, response="7",
        answer="7",
    )  # fmt: skip
    (tmp_path / "ours").mkdir()
    with RecordFile(tmp_path / "ours", "gsm8k", {}) as file:
        file.append([record])
    rows = [
        {
            "doc": {"id": "0", "prompt": "How many?"},
            "arguments": {"gen_args_0": {"arg_0": "How many?"}},
            "resps": [["7"]],
            "filter": name,
            "filtered_resps": [answer],
            "exact_match": float(answer == "7"),
        }
        for name, answer in (("strict-match", "[invalid]"), ("flexible-extract", "7"))
    ]
    samples = tmp_path / "lm_eval" / "model" / "samples_gsm8k_rendered_2026.jsonl"
    samples.parent.mkdir(parents=True)
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_verdicts_are_those_that_both_programs_wrote(both_outputs):
    from lm_eval_verdicts import golds, harness_verdicts, our_verdicts

    assert golds(both_outputs) == {"0": "7"}
    assert our_verdicts(both_outputs) == {"0": by_ours("7", "7", truncated=True)}
    assert harness_verdicts(both_outputs) == {name: {"0": by_harness("7", "7", name)} for name in FILTERS}


def test_a_prompt_that_the_harness_changed_is_refused(both_outputs):
    from lm_eval_verdicts import harness_verdicts

    (samples,) = both_outputs.rglob("samples_*.jsonl")
    samples.write_text(samples.read_text().replace('"arg_0": "How many?"', '"arg_0": "How many? "'))
    with pytest.raises(ValueError, match="item 0: sent 'How many\\? ' instead of the prompt"):
        harness_verdicts(both_outputs)
