"""Verdicts of ``megatron-dypo eval`` and of lm-evaluation-harness on the same prompts, and why two of them differ."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import Any

from megatron_dypo.eval.records import read_records, records_path
from megatron_dypo.grading.answers.extract import marked_answer

FLEXIBLE, STRICT = FILTERS = ("flexible-extract", "strict-match")
_NUMBER = re.compile(r"-?\d+(?:\.\d+|/[1-9]\d*)?")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One response and what a grader says about it."""

    response: str
    answer: str | None
    """The answer that the grader reads; None: it finds none."""
    correct: bool
    truncated: bool = False
    """Whether the response hit the length limit; the harness does not record it."""


def our_verdicts(out: Path) -> dict[str, Judged]:
    """Return item → what ``megatron-dypo eval`` recorded."""
    return {
        record.item: Judged(
            response=record.response,
            answer=record.answer,
            correct=bool(record.correct),
            truncated=record.truncated,
        )
        for record in read_records(records_path(out / "ours", "gsm8k"))
    }


def harness_verdicts(out: Path) -> dict[str, dict[str, Judged]]:
    """Return filter → item → what the harness recorded. Raises ValueError if it sent another prompt."""
    (path,) = (out / "lm_eval").rglob("samples_*.jsonl")
    found: dict[str, dict[str, Judged]] = {name: {} for name in FILTERS}
    for row in rows_of(path):
        doc, sent = row["doc"], row["arguments"]["gen_args_0"]["arg_0"]
        if sent != doc["prompt"]:
            raise ValueError(f"{path}: item {doc['id']}: sent {sent!r} instead of the prompt")
        ((response,),), (answer,) = row["resps"], row["filtered_resps"]
        answer = None if answer == "[invalid]" else answer
        found[row["filter"]][str(doc["id"])] = Judged(response=response, answer=answer, correct=row["exact_match"] == 1)
    return found


def golds(out: Path) -> dict[str, str]:
    """Return item → the number after ``####`` in its row of the prompt file."""
    return {row["id"]: row["answer"].rpartition("#### ")[2] for row in rows_of(out / "prompts.jsonl")}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def compare(
    ours: Mapping[str, Judged], theirs: Mapping[str, Mapping[str, Judged]], gold: Mapping[str, str]
) -> dict[str, Any]:
    """Print every difference of responses, verdicts and answers, and a table, and return the counts.

    Raises ValueError if a side lacks an item.
    """
    if any(set(side) != set(gold) for side in (ours, *theirs.values())):
        raise ValueError(f"{len(gold)} items: a response is missing: {len(ours)} of ours, {len(theirs[FLEXIBLE])}")
    same = {item for item in gold if ours[item].response == theirs[FLEXIBLE][item].response}
    for item in gold:
        if item not in same:
            print(f"item {item}: other responses: {first_difference(ours[item], theirs[FLEXIBLE][item])}")
    result: dict[str, Any] = {"items": len(gold), "same_responses": len(same)}
    result["correct_ours"] = sum(one.correct for one in ours.values())
    result["truncated"] = sum(one.truncated for one in ours.values())
    result["correct_and_truncated"] = sum(one.correct and one.truncated for one in ours.values())
    for name, others in theirs.items():
        differ = [item for item in gold if ours[item].correct != others[item].correct]
        read = [item for item in gold if not same_answer(ours[item].answer, others[item].answer)]
        for item in gold:
            if item in {*differ, *read}:
                print(f"item {item}: gold {gold[item]}: {difference(ours[item], others[item], name)}")
        result[f"same_answers_{name}"] = len(gold) - len(read)
        result[f"correct_{name}"] = sum(other.correct for other in others.values())
        result[f"same_verdicts_{name}"] = len(gold) - len(differ)
        result[f"reasons_{name}"] = dict(Counter(reason(ours[item], others[item], name) for item in differ))
    for name, others in theirs.items():
        pairs = Counter((ours[item].correct, others[item].correct) for item in gold)
        print(
            f"{name:16}  both right {pairs[True, True]:3}, math alone {pairs[True, False]:3}, "
            f"the harness alone {pairs[False, True]:3}, both wrong {pairs[False, False]:3}"
        )
    return result


def first_difference(ours: Judged, theirs: Judged) -> str:
    """Show both responses from where they part."""
    pairs = zip(ours.response, theirs.response, strict=False)
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    mine, other = (one.response[start : start + 40] for one in (ours, theirs))
    return f"from character {start}: ours {mine!r}, theirs {other!r}"


def difference(ours: Judged, theirs: Judged, name: str) -> str:
    """Show two verdicts, with both answers, why these or the verdicts differ, and the end of our response."""
    end = "cut off after " if ours.truncated else "ends "
    return (
        f"math {'right' if ours.correct else 'wrong'} ({shown(ours)}), "
        f"{name} {'right' if theirs.correct else 'wrong'} ({shown(theirs)}): "
        f"{reason(ours, theirs, name)}; {end}{ours.response[-60:]!r}"
    )


def shown(one: Judged) -> str:
    return "no answer" if one.answer is None else repr(one.answer if len(one.answer) <= 40 else f"{one.answer[:40]}…")


def same_answer(ours: str | None, theirs: str | None) -> bool:
    """Return whether two graders read the same: the same text, the same number, or no answer."""
    if ours is None or theirs is None:
        return ours == theirs
    return ours == theirs or (number(ours) is not None and number(ours) == number(theirs))


def reason(ours: Judged, theirs: Judged, name: str) -> str:
    """Name the class of a difference between our verdict or answer and that of the harness's filter ``name``."""
    if ours.response != theirs.response:
        return "other responses"
    if theirs.answer is None:
        return "no #### and number for the harness" if name == STRICT else "no number for the harness"
    if ours.answer is None:
        return "ours takes no number that is a part of something larger"
    if number(theirs.answer) is None:
        return "the harness reads signs as a number"
    if number(theirs.answer) == number(ours.answer):
        return "the same number: the harness compares texts"
    if marked_answer(ours.response) is None:
        return "ours takes the answer that a sentence states, the harness the last number"
    if name == STRICT:
        return "ours takes the line of the last ####, the harness the number after the first"
    return "ours takes the whole marked answer, the harness the last number"


def number(answer: str) -> Fraction | None:
    """Return the number that an answer is, without ``$``, commas and a final full stop; None if it is none.

    Our records have ``37/2`` for 18.5.
    """
    bare = re.sub(r"[$,]|\.$", "", answer)
    return Fraction(bare) if _NUMBER.fullmatch(bare) else None
