"""A trace as a target ends with one stop token, and does not repeat the beginning that the prompt has already."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from megatron_dypo.data.tokenising import end_trace, require_target
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from tests.support.tiny_tokenizers import TEMPLATE, train_bpe, variant

# In Qwen3-Thinking's and R1-Distill's templates the header of the answer opens the thinking.
THINKING = TEMPLATE.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%")
NO_THINKING = TEMPLATE.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n\n</think>\n\n{%")
STOPS = ("<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def folder(bpe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = variant(bpe_folder, tmp_path_factory.mktemp("targets"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def _render(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.render("What is 1 + 1?", True)


@pytest.mark.parametrize("text", ["The answer is 3", "3 \n", "3\n\n"])
@pytest.mark.parametrize(
    "tail",
    [
        "",
        *STOPS,
        *(f"{stop}\n" for stop in STOPS),
        *("".join(pair) for pair in itertools.product(STOPS, STOPS)),
        *("\n".join(pair) for pair in itertools.product(STOPS, STOPS)),
        "<|im_end|>\n<|endoftext|>\n\n",
        "<|im_end|> <|im_end|>\n<|endoftext|> \n",
    ],
)
def test_whatever_stop_tokens_end_a_trace_the_target_ends_with_one(tokenizer: Tokenizer, text: str, tail: str) -> None:
    assert end_trace(text + tail, tokenizer).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]


def test_other_special_tokens_at_the_end_of_a_trace_stay(tokenizer: Tokenizer) -> None:
    ids = end_trace("3<|im_start|><|im_end|>\n", tokenizer).tolist()
    assert ids == [*tokenizer.encode("3<|im_start|>"), tokenizer.eos_id]


def test_a_stop_token_inside_a_trace_is_refused(tokenizer: Tokenizer) -> None:
    target = end_trace("3<|im_end|>\n<|im_start|>user\nmore<|im_end|>", tokenizer)
    with pytest.raises(ValueError, match="goes on after a stop token"):
        require_target(target, tokenizer)
    require_target(end_trace("3", tokenizer), tokenizer)


@pytest.mark.parametrize(
    ("trace", "rest"),
    [
        ("<think>\nOne.\n</think>\nTwo", "One.\n</think>\nTwo"),
        ("<think>One.</think>Two", "One.</think>Two"),
        ("<think>\n\nOne.</think>", "\nOne.</think>"),
        ("\n<think>\nOne.</think>", "One.</think>"),
        ("<think>\n\n</think>\n\nTwo", "\n</think>\n\nTwo"),
        ("One.\n</think>\nTwo", "One.\n</think>\nTwo"),
        ("<thinking>\nOne.", "<thinking>\nOne."),
        ("\nOne.", "\nOne."),
        ("assistant\nOne.", "assistant\nOne."),
    ],
)
def test_a_tag_that_the_prompt_ends_with_comes_once(folder: Path, tmp_path: Path, trace: str, rest: str) -> None:
    tokenizer = load_tokenizer(variant(folder, tmp_path / "t", chat_template=THINKING))
    prompt = _render(tokenizer)
    assert tokenizer.decode(prompt).endswith("<think>\n")
    assert end_trace(trace, tokenizer, prompt).tolist() == [*tokenizer.encode(rest), tokenizer.eos_id]
    whole = tokenizer.decode([*prompt, *end_trace(trace, tokenizer, prompt).tolist()])
    assert whole.count("<think>") == 1


def test_a_special_token_that_the_prompt_ends_with_comes_once(tmp_path: Path) -> None:
    # Like Magistral's [THINK], this token has no text when decoded.
    template = TEMPLATE.replace("<|im_start|>assistant\n{%", "<|im_start|>assistant\n<|bos|>\n{%")
    tokenizer = load_tokenizer(train_bpe(tmp_path / "t", chat_template=template))
    prompt = _render(tokenizer)
    ids = end_trace("<|bos|>\nOne.", tokenizer, prompt).tolist()
    assert ids == [*tokenizer.encode("One."), tokenizer.eos_id]
    # If the prompt does not end like that, the trace is unchanged.
    plain = tokenizer.encode("What is 1 + 1?")
    assert end_trace("<|bos|>\nOne.", tokenizer, plain).tolist() == [
        *tokenizer.encode("<|bos|>\nOne."),
        tokenizer.eos_id,
    ]


@pytest.mark.parametrize(
    ("trace", "rest"),
    [
        ("<think>\n\n</think>\n\nTwo", "Two"),
        ("<think>\n\n</think>\nTwo", "\nTwo"),
        ("Two", "Two"),
        ("<think>\nOne.\n</think>\nTwo", "<think>\nOne.\n</think>\nTwo"),
    ],
)
def test_tags_that_close_what_they_open_come_once(folder: Path, tmp_path: Path, trace: str, rest: str) -> None:
    tokenizer = load_tokenizer(variant(folder, tmp_path / "t", chat_template=NO_THINKING))
    ids = end_trace(trace, tokenizer, _render(tokenizer)).tolist()
    assert ids == [*tokenizer.encode(rest), tokenizer.eos_id]


def test_a_template_that_opens_nothing_leaves_the_trace_its_tag(tokenizer: Tokenizer) -> None:
    text = "<think>\nOne.\n</think>\nTwo"
    assert end_trace(text, tokenizer, _render(tokenizer)).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]


def test_a_sentencepiece_trace_loses_a_repeated_tag(sentencepiece_folder: Path, tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}{{ '<think>\n' }}"
    tokenizer = load_tokenizer(variant(sentencepiece_folder, tmp_path / "t", chat_template=template))
    prompt = tokenizer.render("What is 1 + 1?", True)
    ids = end_trace("<think>\nOne.</think>", tokenizer, prompt).tolist()
    assert ids == end_trace("One.</think>", tokenizer, prompt).tolist()
