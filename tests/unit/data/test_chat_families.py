"""Families of chat templates: against transformers and the golden file; the laws of turns."""

from __future__ import annotations

from pathlib import Path

import jinja2
import pytest
import transformers

from megatron_dypo.data.prompts import end_trace
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from tests.golden.render_chats import CHATS, GOLDEN, render_all
from tests.support.chat_families import FAMILIES, write_family


def _load(tmp_path: Path, name: str, **config: object) -> Tokenizer:
    family = FAMILIES[name]
    return load_tokenizer(write_family(tmp_path / name, family, **config), chat_template_args=family.arguments)


def _token(tokenizer: Tokenizer, text: str) -> int:
    (token_id,) = tokenizer.encode(text)
    return token_id


def test_prompts_and_targets_of_the_families_are_those_of_the_golden_file() -> None:
    assert render_all() == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chat", CHATS)
def test_a_prompt_has_the_text_and_the_ids_of_transformers(tmp_path: Path, name: str, chat: str) -> None:
    ours = _load(tmp_path, name)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / name)
    options = {"tools": None, "add_generation_prompt": True, "tokenize": True, "return_dict": False}
    options |= FAMILIES[name].arguments
    if (name, chat) == ("mistral", "system"):
        for render in (
            lambda: ours.render(CHATS[chat], True),
            lambda: theirs.apply_chat_template(CHATS[chat], **options),
        ):
            with pytest.raises((ValueError, jinja2.TemplateError), match="only user and assistant"):
                render()
        return
    assert ours.render(CHATS[chat], True) == theirs.apply_chat_template(CHATS[chat], **options)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("llama2", "</s>"),
        ("llama3", "<|eot_id|>"),
        ("llama3_1", "<|eot_id|>"),
        ("mistral", "</s>"),
        ("qwen2_5_math", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("qwen3_thinking", "<|im_end|>"),
        ("r1_distill", "<｜end▁of▁sentence｜>"),
        ("harmony", "<|return|>"),
    ],
)
def test_the_end_of_a_turn_stops_sampling_and_ends_a_trace(tmp_path: Path, name: str, end: str) -> None:
    tokenizer = _load(tmp_path, name)
    assert tokenizer.eos_id == _token(tokenizer, end)
    assert tokenizer.eos_ids[0] == tokenizer.eos_id
    assert end_trace(f"3{end}", tokenizer).tolist() == [*tokenizer.encode("3"), tokenizer.eos_id]
    # eos_token and the ids of generation_config.json still stop.
    for text in (FAMILIES[name].eos_token, *FAMILIES[name].stops):
        assert _token(tokenizer, text) in tokenizer.eos_ids


def test_a_plain_prompt_ends_with_eos_token_and_not_with_the_end_of_a_turn(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "t", FAMILIES["qwen2_5_math"])
    tokenizer = load_tokenizer(folder, chat_template=False)
    assert tokenizer.eos_ids == (_token(tokenizer, "<|endoftext|>"),)
    assert tokenizer.generation_suffix == ""
    with pytest.raises(ValueError, match="was loaded without"):
        tokenizer.render("hi", True)


def test_a_broken_template_does_no_harm_where_none_is_used(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "t", FAMILIES["mistral"], chat_template="{{ 1 // 0 }}")
    assert load_tokenizer(folder, chat_template=False).render("hi", False)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: the chat template fails .*ZeroDivisionError"):
        load_tokenizer(folder)


def test_a_template_tells_the_end_where_eos_token_is_missing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_family(tmp_path / "t", FAMILIES["qwen3_thinking"], eos_token=None))
    assert tokenizer.eos_ids == (_token(tokenizer, "<|im_end|>"),)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        # The end of a turn is plain text; the vocabulary has no token for it.
        ("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}A:{% endif %}", True),
        # As in GLM, a turn has no end: the header of the next turn ends it.
        ("{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% endfor %}<|im_start|>", False),
        # A template that refuses an assistant's messages.
        (
            "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}"
            "{{ m.content }}<|im_end|>{% endfor %}",
            True,
        ),
    ],
)
def test_a_template_that_tells_no_end_leaves_it_to_eos_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str, said: bool
) -> None:
    tokenizer = load_tokenizer(write_family(tmp_path / "t", FAMILIES["qwen2_5_math"], chat_template=template))
    assert tokenizer.eos_id == _token(tokenizer, "<|endoftext|>")
    assert ("eos_token ends turns" in caplog.text) == said


def test_a_template_for_one_exchange_tells_its_end(tmp_path: Path) -> None:
    template = (
        "{% if messages | length > 2 %}{{ raise_exception('one exchange') }}{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role ~ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<think>\n{% endif %}"
    )
    tokenizer = load_tokenizer(write_family(tmp_path / "t", FAMILIES["qwen3"], eos_token=None, chat_template=template))
    assert tokenizer.eos_id == _token(tokenizer, "<|im_end|>")
    assert tokenizer.generation_suffix == "<think>\n"


def test_the_header_of_the_next_answer_is_no_end_of_a_turn(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"  # it ignores roles
    tokenizer = load_tokenizer(write_family(tmp_path / "t", FAMILIES["qwen2_5_math"], chat_template=template))
    assert tokenizer.eos_id == _token(tokenizer, "<|endoftext|>")


def test_a_marker_added_as_an_ordinary_token_ends_a_turn(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role ~ m.content }}</think>{% endfor %}{% if add_generation_prompt %}A{% endif %}"
    )
    tokenizer = load_tokenizer(write_family(tmp_path / "t", FAMILIES["qwen3"], chat_template=template))
    assert tokenizer.eos_id == _token(tokenizer, "</think>")


@pytest.mark.parametrize("name", ["qwen3_thinking", "r1_distill"])
@pytest.mark.parametrize("start", ["<think>\n", "<think>", "\n<think>\n", ""])
def test_the_beginning_of_a_trace_that_the_prompt_wrote_is_there_once(tmp_path: Path, name: str, start: str) -> None:
    tokenizer = _load(tmp_path, name)
    asked = tokenizer.render("What is 1 + 2?", True)
    ids = [*asked, *end_trace(f"{start}One <think> two.</think>3", tokenizer, asked).tolist()]
    prompt = tokenizer.encode("<think>\nOne <think> two.</think>3")
    assert ids[-len(prompt) - 1 : -1] == prompt
    assert ids.count(_token(tokenizer, "<think>")) == 2


@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2_5_math", "qwen3", "harmony"])
def test_a_trace_is_whole_where_the_prompt_opens_nothing(tmp_path: Path, name: str) -> None:
    tokenizer = _load(tmp_path, name)
    assert tokenizer.generation_suffix == ""
    asked = tokenizer.render("What is 1 + 2?", True)
    assert tokenizer.decode(end_trace("<think>\nOne", tokenizer, asked).tolist()).endswith("<think>\nOne")


def test_a_template_that_opens_thinking_in_every_turn_is_seen_through(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = load_tokenizer(write_family(tmp_path / "t", FAMILIES["qwen3"], chat_template=template))
    assert tokenizer.generation_suffix.strip() == "<think>"
