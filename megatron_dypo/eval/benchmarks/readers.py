"""Read prompt, answer and options from records of published files: one function for each kind of record.

Each function raises :class:`BadRow` with field, value and rule.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dypo.data.rows import BadRow
from megatron_dypo.data.values import printable, shown
from megatron_dypo.eval.options import find_options
from megatron_dypo.grading.answers.extract import gold_text

_LETTERS = "ABCDEFGHIJ"
_INTEGER = re.compile(r"-?\d+(\.0+)?")
_AIME_MAX = 999
_GSM8K = re.compile(r"####\s*(-?[\d,]*\.?\d+)\s*\Z")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row of a benchmark."""

    prompt: str
    answer: str
    id: str | None = None
    """Id of the question in the file; None: the file has no ids."""
    options: tuple[str, ...] = ()
    """Texts of the options of multiple choice. With options, ``answer`` is a label."""


def _value(record: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """Return the name and value of the first field among ``names`` that the record has and that is not null."""
    for name in names:
        if record.get(name) is not None:
            return name, record[name]
    has = ", ".join(printable(str(key)) for key in record) or "no field"
    raise BadRow(f"{' or '.join(names)}: is missing (the row has {has:.200})")


def _text(record: Mapping[str, Any], *names: str) -> str:
    name, value = _value(record, *names)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{name}={shown(value)}: must be text that is not empty")
    return value.strip()


def _id(record: Mapping[str, Any], *names: str) -> str | None:
    value = next((record[name] for name in names if record.get(name) not in (None, "")), None)
    return None if value is None else str(value)


def _whole_number(record: Mapping[str, Any]) -> str:
    """Return the answer (27, 27.0, "27", "27.0" or ["27.0"]) as an integer; without one, the solution's box."""
    if record.get("answer") is None and record.get("solution") is not None:
        name, value = "solution", gold_text(_text(record, "solution"))
    else:
        name, value = _value(record, "answer")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if isinstance(value, float) and (not math.isfinite(value) or not value.is_integer()):
        text = ""
    if not _INTEGER.fullmatch(text):
        raise BadRow(f"{name}={shown(value)}: must be an integer")
    return str(int(text.partition(".")[0]))


def read_aime(record: Mapping[str, Any]) -> Question:
    """Read a problem of AIME, whose answer is an integer from 0 to 999."""
    answer = _whole_number(record)
    if not 0 <= int(answer) <= _AIME_MAX:
        raise BadRow(f"answer={answer}: an answer of AIME is from 0 to {_AIME_MAX}")
    return Question(prompt=_text(record, "problem", "question"), answer=answer, id=_id(record, "id", "unique_id"))


def read_amc(record: Mapping[str, Any]) -> Question:
    """Read a problem of AMC 12 without its options. The answer is an integer."""
    return Question(
        prompt=_text(record, "problem", "question"), answer=_whole_number(record), id=_id(record, "id", "unique_id")
    )


def read_math(record: Mapping[str, Any]) -> Question:
    """Read a problem of MATH. The answer is in the column ``answer``."""
    return Question(
        prompt=_text(record, "problem", "question"), answer=_text(record, "answer"), id=_id(record, "unique_id", "id")
    )


def read_minerva(record: Mapping[str, Any]) -> Question:
    """Read a problem of Minerva's set. The answer is in the column ``answer``, or boxed in the solution."""
    prompt, own_id = _text(record, "problem", "question"), _id(record, "idx", "id")
    if record.get("answer") is not None:
        return Question(prompt=prompt, answer=_text(record, "answer"), id=own_id)
    solution = _text(record, "solution")
    if "\\boxed" not in solution:
        raise BadRow(f"solution={shown(solution)}: must have the answer in a \\boxed{{}}")
    answer = gold_text(solution).strip()
    if not answer:
        raise BadRow(f"solution={shown(solution)}: its \\boxed{{}} is empty")
    return Question(prompt=prompt, answer=answer, id=own_id)


def read_olympiad(record: Mapping[str, Any]) -> Question:
    """Read an open problem of OlympiadBench without pictures. Several answers become a list."""
    for name, value in record.items():
        if name.startswith("image_") and value is not None:
            raise BadRow(f"{name}={shown(value)}: has a picture: the set is of texts alone (OE_TO_maths_en_COMP)")
    name, value = _value(record, "final_answer", "answer")
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, str) and one.strip(" $\n") for one in values):
        raise BadRow(f"{name}={shown(value)}: must be texts that are not empty")
    answer = ", ".join(one.strip().strip("$").strip() for one in values)
    prompt, context = _text(record, "question", "problem"), record.get("context")
    whole = f"{context.strip()}\n\n{prompt}" if isinstance(context, str) and context.strip() else prompt
    return Question(prompt=whole, answer=answer, id=_id(record, "id"))


def read_gsm8k(record: Mapping[str, Any]) -> Question:
    """Read a problem of GSM8K. The answer is the number after ``####``."""
    solution = _text(record, "answer")
    found = _GSM8K.search(solution)
    if found is None:
        raise BadRow(f"answer={shown(solution)}: must end with #### and a number")
    return Question(prompt=_text(record, "question"), answer=found[1].replace(",", ""))


def read_arc(record: Mapping[str, Any]) -> Question:
    """Read a question of ARC: columns ``choices`` and ``answerKey``, or verl's columns with options in the prompt."""
    if "reward_model" in record:
        return _read_verl_choice(record)
    name, choices = _value(record, "choices")
    labels, texts = (_texts(choices.get(key)) if isinstance(choices, dict) else () for key in ("label", "text"))
    if not labels or len(labels) != len(texts):
        raise BadRow(f"{name}={shown(choices)}: must be an object with lists `text` and `label` of one length")
    label = _text(record, "answerKey")
    return choice(_text(record, "question"), texts, labels, label, "answerKey", _id(record, "id"))


def read_gpqa(record: Mapping[str, Any]) -> Question:
    """Read a question of GPQA. A hash of the question decides the place of the right option."""
    question = _text(record, "Question")
    texts = [_text(record, "Correct Answer"), *(_text(record, f"Incorrect Answer {i}") for i in (1, 2, 3))]
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(f"{i}:{question}".encode()).digest())
    labels = _LETTERS[: len(texts)]
    label = labels[order.index(0)]
    return choice(question, [texts[i] for i in order], labels, label, "Correct Answer", _id(record, "Record ID"))


def choice(
    question: str, texts: Sequence[str], labels: Sequence[str], label: str, field: str, own_id: str | None
) -> Question:
    """Return a question of multiple choice. The options become lines ``A) …``, which can be shuffled later."""
    if label not in labels:
        raise BadRow(f"{field}={shown(label)}: must be one of the labels {', '.join(labels)}")
    options = [text.strip() for text in texts]
    lines = "\n".join(f"{one}) {text}" for one, text in zip(labels, options, strict=True))
    prompt = f"{question}\n\n{lines}"
    _require_options(prompt, options, labels)
    return Question(prompt=prompt, answer=label, id=own_id, options=tuple(options))


def _require_options(prompt: str, options: list[str], labels: Sequence[str]) -> None:
    try:
        found = find_options(prompt, options)
    except ValueError as error:
        raise BadRow(str(error)) from error
    if list(found.labels) != list(labels):
        raise BadRow(f"labels={shown(list(labels))}: must be A, B, C … or 1, 2, 3 … in order")


def _read_verl_choice(record: Mapping[str, Any]) -> Question:
    name, messages = _value(record, "prompt")
    of_user = [m.get("content") for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    if not isinstance(messages, list) or len(of_user) != 1 or not isinstance(of_user[0], str):
        raise BadRow(f"{name}={shown(messages)}: must be messages, one of them the user's")
    reward = record["reward_model"]
    label = reward.get("ground_truth") if isinstance(reward, dict) else None
    prompt = of_user[0].strip()
    try:
        found = find_options(prompt)
    except ValueError as error:
        raise BadRow(f"{name}={shown(prompt)}: {error}") from error
    if not isinstance(label, str) or label not in found.labels:
        raise BadRow(f"reward_model.ground_truth={shown(label)}: must be one of the labels {', '.join(found.labels)}")
    return Question(prompt=prompt, answer=label, options=tuple(prompt[start:end] for start, end in found.spans))


def _texts(value: object) -> tuple[str, ...]:
    """Return a list of texts that are not empty; () for anything else."""
    if not isinstance(value, list) or not all(isinstance(one, str) and one.strip() for one in value):
        return ()
    return tuple(value)
