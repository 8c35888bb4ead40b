"""The chat templates that models were published with, as the package ``trl`` carries them, on a tiny tokenizer.

``test_published_tokenizers.py`` tests them with the models' own tokenizers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import transformers

from megatron_dypo.data.tokenizer.open import load_tokenizer
from tests.golden.render_chats import CHATS
from tests.support.chat_families import FAMILIES, Family, write_family
from tests.support.published_files import published_file

OURS = {
    "llama3.jinja": "llama3",
    "llama3_1.jinja": "llama3_1",
    "qwen3.jinja": "qwen3",
    "qwen3_instruct_2507.jinja": "qwen3",
    "deepseek_r1_distill.jinja": "r1_distill",
}
"""Published template → family of :mod:`tests.support.chat_families` with the same text for plain conversations."""
_MANY = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|eot_id|>", "<|end_of_text|>")
_GENERAL = Family(template="", special=(*_MANY, "<s>", "</s>"), bos_token="<s>", eos_token="</s>")
ENDS = {
    "gemma.jinja": "<end_of_turn>",
    "gptoss.jinja": "<|return|>",
    "llama3.jinja": "<|eot_id|>",
    "llama3_1.jinja": "<|eot_id|>",
    "llama3_2.jinja": "<|eot_id|>",
    "phi3.jinja": "<|end|>",
    "qwen2_5.jinja": "<|im_end|>",
    "qwen3.jinja": "<|im_end|>",
    "qwen3_instruct_2507.jinja": "<|im_end|>",
    "qwen3_5_think.jinja": "<|im_end|>",
    "qwen3_5_nothink.jinja": "<|im_end|>",
    "deepseek_r1_distill.jinja": "<｜end▁of▁sentence｜>",
}
OPENED = {
    "qwen3_5_think.jinja": "<think>\n",
    "qwen3_5_nothink.jinja": "<think>\n\n</think>\n\n",
    "deepseek_r1_distill.jinja": "<think>\n",
}


def _read(name: str) -> str:
    return published_file("trl", f"trl/chat_templates/{name}").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "end"), ENDS.items())
def test_a_published_template_tells_the_end_of_a_turn_and_what_the_prompt_opens(
    tmp_path: Path, name: str, end: str
) -> None:
    family = dataclasses.replace(_GENERAL, special=tuple(dict.fromkeys((*_GENERAL.special, end))))
    folder = write_family(tmp_path / "t", family, chat_template=_read(name))
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.eos_id] == tokenizer.encode(end)
    assert tokenizer.eos_ids[1:] == tuple(tokenizer.encode("</s>"))
    assert tokenizer.generation_suffix == OPENED.get(name, "")


@pytest.mark.parametrize(
    ("name", "chat"),
    # Gemma's template accepts no system message.
    [(name, chat) for name in ENDS for chat in CHATS if (name, chat) != ("gemma.jinja", "system")],
)
def test_a_published_template_gives_the_ids_that_transformers_gives(tmp_path: Path, name: str, chat: str) -> None:
    folder = write_family(tmp_path / "t", _GENERAL, chat_template=_read(name))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(
        CHATS[chat], tools=None, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert load_tokenizer(folder).render(CHATS[chat], True) == expected


@pytest.mark.parametrize(("name", "family"), OURS.items())
@pytest.mark.parametrize("chat", CHATS)
def test_our_template_in_the_manner_of_a_family_gives_the_published_text(
    tmp_path: Path, name: str, family: str, chat: str
) -> None:
    ours = FAMILIES[family]
    folders = [
        write_family(tmp_path / "ours", ours),
        write_family(tmp_path / "published", ours, chat_template=_read(name)),
    ]
    tokenizers = [load_tokenizer(folder, chat_template_args=ours.arguments) for folder in folders]
    mine, published = (tokenizer.render(CHATS[chat], True) for tokenizer in tokenizers)
    assert mine == published
