"""Shuffled options: the right option stays right, and the rest of the prompt does not change."""

from __future__ import annotations

import pytest

from megatron_dypo.data.tokenizer.chat import Message
from megatron_dypo.eval.options import Shuffled, find_options, shuffled

QUESTION = "Which is a gas?\n\nA) iron\nB) neon\nC) salt\nD) wood\n\nAnswer with a letter."


def one(
    prompt: object = QUESTION, answer: object = "B", texts: object = None, sample: int = 0, seed: int = 1
) -> object:
    return shuffled(prompt, answer, texts, seed=seed, prompt_id="q", sample=sample)  # type: ignore[arg-type]


def text_of(made: Shuffled) -> str:
    assert isinstance(made.prompt, str)
    return made.prompt


def options_of(prompt: str) -> dict[str, str]:
    found = find_options(prompt)
    return {label: prompt[start:end] for label, (start, end) in zip(found.labels, found.spans, strict=True)}


def test_the_answer_s_label_follows_its_option() -> None:
    answers = set()
    for sample in range(40):
        made = shuffled(QUESTION, "B", None, seed=1, prompt_id="q", sample=sample)
        options = options_of(text_of(made))
        assert options[made.answer] == "neon"
        assert sorted(options.values()) == ["iron", "neon", "salt", "wood"]
        assert made.label_in_file(made.answer) == "B"
        file = options_of(QUESTION)
        assert all(file[made.label_in_file(label)] == text for label, text in options.items())
        answers.add(made.answer)
    assert answers == set("ABCD"), "each place is taken by the right option at some time"


def test_only_the_texts_of_options_change() -> None:
    made = shuffled(QUESTION, "B", None, seed=1, prompt_id="q", sample=3)
    before, after = QUESTION.splitlines(), text_of(made).splitlines()
    assert [line for line in before if line[1:2] != ")"] == [line for line in after if line[1:2] != ")"]
    assert [line[:3] for line in after[2:6]] == ["A) ", "B) ", "C) ", "D) "]


def test_the_order_follows_from_seed_prompt_and_sample_alone() -> None:
    orders = [shuffled(QUESTION, "B", None, seed=1, prompt_id="q", sample=2).order for _ in range(2)]
    assert orders[0] == orders[1] == (0, 2, 3, 1), "and stays what it was in earlier versions"
    others = {
        shuffled(QUESTION, "B", None, seed=s, prompt_id=p, sample=n).order for s in (1, 2) for p in "qr" for n in (0, 1)
    }
    assert len(others) > 3


@pytest.mark.parametrize("style", ["{}) {}", "{}. {}", "({}) {}", "{}: {}"])
def test_labels_may_be_written_in_several_ways(style: str) -> None:
    for alphabet in ("ABC", "123"):
        lines = [style.format(label, text) for label, text in zip(alphabet, ("x", "y z", "(w)"), strict=True)]
        assert options_of("1) not one.\nQ?\n" + "\n".join(lines)) == dict(
            zip(alphabet, ("x", "y z", "(w)"), strict=True)
        )


def test_the_last_user_s_message_has_the_options() -> None:
    messages: list[Message] = [
        {"role": "system", "content": "A) be brief\nB) be kind"},
        {"role": "user", "content": QUESTION},
    ]
    made = shuffled(messages, "B", None, seed=1, prompt_id="q", sample=1)
    assert isinstance(made.prompt, list)
    system, user = made.prompt
    assert system == messages[0]
    assert isinstance(user, dict)
    assert options_of(user["content"])[made.answer] == "neon"
    assert messages[1]["content"] == QUESTION


@pytest.mark.parametrize(
    "last", ["None of the above", "all of these", "Both A and C", "A and C", "both (B) and (D)", "neither A nor B"]
)
def test_options_that_refer_to_others_keep_their_order(last: str) -> None:
    prompt = QUESTION.replace("wood", last)
    for sample in range(5):
        made = shuffled(prompt, "B", None, seed=1, prompt_id="q", sample=sample)
        assert (made.prompt, made.answer) == (prompt, "B")


def test_options_of_several_lines_need_their_texts() -> None:
    prompt = "Q\nA) x = 1\n   y = 2\nB) z\nSay a letter."
    with pytest.raises(ValueError, match="an option has several lines: give the options' texts in a column `options`"):
        one(prompt)
    for sample in range(8):
        made = shuffled(prompt, "A", ["x = 1\n   y = 2", "z"], seed=1, prompt_id="q", sample=sample)
        assert made.prompt in (prompt, "Q\nA) z\nB) x = 1\n   y = 2\nSay a letter.")
        assert made.answer == ("A" if made.prompt == prompt else "B")


@pytest.mark.parametrize(
    ("prompt", "answer", "texts", "rule"),
    [
        ("What is 1+1?", "B", None, "no options found"),
        ("A) only one", "A", None, "no options found"),
        (QUESTION, "E", None, "answer='E': no option has this label: the prompt's are A, B, C, D"),
        (QUESTION, "42", None, "answer='42': must be one letter"),
        (QUESTION, "B", ["iron", "neon"], "must be a list of 4 texts, those of A, B, C, D"),
        (QUESTION, "B", ["iron", "argon", "salt", "wood"], "the prompt has another text behind B"),
        ([{"role": "system", "content": QUESTION}], "B", None, "no message of a user"),
    ],
)
def test_a_prompt_that_cannot_be_shuffled_says_why(prompt: object, answer: str, texts: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        one(prompt, answer, texts)
