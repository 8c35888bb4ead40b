"""Shuffling the options of a multiple-choice prompt, and adapting the answer's label."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dypo.data.tokenizer.chat import Message
from megatron_dypo.grading.choice import gold_label

_LABELS = ("ABCDEFGHIJ", "123456789")
_LABELLED = re.compile(r"^[ \t]*\(?([A-J1-9])[).:][ \t]+(?=\S)", re.MULTILINE)
"""The label of an option at the start of its line, up to the option's text."""
_REFERS = re.compile(
    r"\b(?:all|none|both|neither|either|any|some|two|more than one) of (?:the|these|those|them)\b"
    r"|\b(?:above|below)\b|\b(?:[Bb]oth|[Ee]ither|[Nn]either)\s+\(?[A-J]\)?(?![\w'])"
    r"|(?<![\w'])\(?[A-J]\)?,?\s+(?:and|or|&)\s+\(?[A-J]\)?(?![\w'])"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a text, between ``start`` and the end of the last one."""

    labels: str
    """``ABCD``: one for each."""
    spans: tuple[tuple[int, int], ...]
    """Start and end of each option's text, without its label."""


@dataclass(frozen=True, kw_only=True)
class Shuffled:
    """A prompt with shuffled options."""

    prompt: str | list[Message]
    answer: str
    labels: str
    """Labels of the prompt, in their order."""
    order: tuple[int, ...]
    """Place in the prompt → place of that option in the file."""

    def label_in_file(self, label: str) -> str:
        """Return the label in the file of the option that has ``label`` here. An unknown label is returned
        unchanged."""
        place = self.labels.find(label)
        return label if place < 0 else self.labels[self.order[place]]


def shuffled(
    prompt: str | list[Message], answer: Any, texts: Any, *, seed: int, prompt_id: str, sample: int
) -> Shuffled:
    """Put the options of a prompt into the order of one sample.

    Options that refer to others ("none of the above", "A and C") keep their order.

    Args:
        prompt: a text, or messages, of which the user's last has the options.
        answer: the label of the right option.
        texts: the options' texts where the row has them (its column ``options``); None: each option is a line.
        seed: of the evaluation; with ``prompt_id`` and ``sample`` it decides the order.

    Raises:
        ValueError: no options can be found, or none has the answer's label.
    """
    place = _place_of_options(prompt)
    text = prompt if isinstance(prompt, str) else str(prompt[place]["content"])
    options = find_options(text, texts)
    label = gold_label(answer if isinstance(answer, str) else repr(answer))
    if label not in options.labels:
        raise ValueError(f"answer={answer!r}: no option has this label: the prompt's are {', '.join(options.labels)}")
    order = _order(options, text, json.dumps([seed, prompt_id, sample]))
    parts, end = [], 0
    for (start, stop), index in zip(options.spans, order, strict=True):
        first, last = options.spans[index]
        parts += [text[end:start], text[first:last]]
        end = stop
    whole = "".join([*parts, text[end:]])
    return Shuffled(
        prompt=whole if isinstance(prompt, str) else _with_content(prompt, place, whole),
        answer=options.labels[order.index(options.labels.index(label))],
        labels=options.labels,
        order=order,
    )


def _place_of_options(prompt: str | list[Message]) -> int:
    if isinstance(prompt, str):
        return 0
    users = [index for index, message in enumerate(prompt) if message.get("role") == "user"]
    if not users:
        raise ValueError("no message of a user, which would have the options")
    return users[-1]


def _with_content(messages: Sequence[Message], place: int, text: str) -> list[Message]:
    return [{**one, "content": text} if index == place else one for index, one in enumerate(messages)]


def _order(options: Options, text: str, key: str) -> tuple[int, ...]:
    places = range(len(options.labels))
    if any(_REFERS.search(text[start:stop]) for start, stop in options.spans):
        return tuple(places)
    # Sort by hashes, since shuffles of Python and NumPy may change with their versions.
    return tuple(sorted(places, key=lambda index: hashlib.sha256(f"{key}:{index}".encode()).digest()))


def find_options(text: str, texts: Any = None) -> Options:
    """Return the options of a prompt: the last lines that are labelled A, B, C … or 1, 2, 3 … in order.

    An option is the rest of its line. ``texts`` (a list) says what follows each label where options are longer.

    Raises:
        ValueError: there are fewer than two, or the text of one is not what ``texts`` says.
    """
    found = _last_run(text)
    if len(found) < 2:
        raise ValueError("shuffle_options: no options found: each is to be a line that begins with A), B) … in order")
    labels = "".join(match[1] for match in found)
    starts = [match.end() for match in found]
    if texts is not None:
        return Options(labels=labels, spans=_given_spans(text, labels, starts, texts))
    ends = [_end_of_line(text, start) for start in starts]
    for end, following in zip(ends, found[1:], strict=False):
        if text[end : following.start()].strip():
            raise ValueError(
                "shuffle_options: an option has several lines: give the options' texts in a column `options`"
            )
    return Options(labels=labels, spans=tuple(zip(starts, ends, strict=True)))


def _last_run(text: str) -> list[re.Match[str]]:
    """Return the labels of the last A, B, C … of the text."""
    for alphabet in _LABELS:
        runs: list[list[re.Match[str]]] = []
        for match in _LABELLED.finditer(text):
            if match[1] == alphabet[0]:
                runs.append([match])
            elif runs and len(runs[-1]) < len(alphabet) and match[1] == alphabet[len(runs[-1])]:
                runs[-1].append(match)
        long = [run for run in runs if len(run) > 1]
        if long:
            return long[-1]
    return []


def _given_spans(text: str, labels: str, starts: Sequence[int], texts: Any) -> tuple[tuple[int, int], ...]:
    if not isinstance(texts, list) or len(texts) != len(labels) or not all(isinstance(one, str) for one in texts):
        raise ValueError(f"options={texts!r:.200}: must be a list of {len(labels)} texts, those of {', '.join(labels)}")
    for label, start, one in zip(labels, starts, texts, strict=True):
        if not text.startswith(one.strip(), start):
            raise ValueError(f"options={texts!r:.200}: the prompt has another text behind {label}")
    return tuple((start, start + len(one.strip())) for start, one in zip(starts, texts, strict=True))


def _end_of_line(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text[: end if end >= 0 else len(text)].rstrip())
