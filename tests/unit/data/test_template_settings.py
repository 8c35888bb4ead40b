"""BOS, arguments of the template, stop ids and the size of the vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dypo.data.tokenizer.open import Tokenizer, check_vocabulary, load_tokenizer
from tests.support.chat_families import FAMILIES, write_family


def _load(tmp_path: Path, name: str, **config: object) -> Tokenizer:
    family = FAMILIES[name]
    return load_tokenizer(write_family(tmp_path / name, family, **config), chat_template_args=family.arguments)


def _token(tokenizer: Tokenizer, text: str) -> int:
    (token_id,) = tokenizer.encode(text)
    return token_id


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral", "r1_distill"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_a_plain_prompt_that_begins_with_bos_has_one(tmp_path: Path, name: str, add_bos: bool) -> None:
    folder = write_family(tmp_path / "t", FAMILIES[name], add_bos_token=add_bos)
    tokenizer = load_tokenizer(folder, chat_template=False)
    bos = _token(tokenizer, FAMILIES[name].bos_token or "")
    assert tokenizer.render(f"{FAMILIES[name].bos_token}hi", False) == [bos, *tokenizer.encode("hi")]
    assert tokenizer.render("hi", False) == [bos] * add_bos + tokenizer.encode("hi")


def test_a_template_that_writes_bos_before_a_text_that_has_it_gives_one(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = write_family(tmp_path / "t", FAMILIES["mistral"], chat_template=template, add_bos_token=True)
    tokenizer = load_tokenizer(folder)
    bos = _token(tokenizer, "<s>")
    assert tokenizer.render("<s>hi", True) == [bos, *tokenizer.encode("hi")]
    assert tokenizer.render("hi", True) == [bos, *tokenizer.encode("hi")]


def test_arguments_reach_the_template(tmp_path: Path) -> None:
    with_thinking, without = _load(tmp_path, "qwen3"), _load(tmp_path, "qwen3_without_thinking")
    opened = without.encode("<think>\n\n</think>\n\n")
    assert without.render("hi", True) == with_thinking.render("hi", True) + opened
    tools = [{"type": "function", "function": {"name": "add"}}]
    template = "{{ messages[0].content }}{% if tools %}{{ tools[0].function.name }}{% endif %}"
    folder = write_family(tmp_path / "tools", FAMILIES["qwen3"], chat_template=template)
    tokenizer = load_tokenizer(folder, chat_template_args={"tools": tools})
    assert tokenizer.decode(tokenizer.render("hi", True)) == "hiadd"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"thinking": False},
            r"chat_template_args\.thinking=False: the template of .*json never reads it.* enable_thinking",
        ),
        ({"messages": []}, r"chat_template_args\.messages=\[\]: is not yours to give"),
        ({"add_generation_prompt": False}, "is not yours to give"),
    ],
)
def test_an_argument_that_the_template_never_reads_is_refused(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    folder = write_family(tmp_path / "t", FAMILIES["qwen3"])
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder, chat_template_args=arguments)


def test_arguments_without_a_template_are_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "t", FAMILIES["qwen3"])
    with pytest.raises(ValueError, match=r"data\.chat_template is false"):
        load_tokenizer(folder, chat_template=False, chat_template_args={"enable_thinking": True})
    plain = write_family(tmp_path / "plain", FAMILIES["qwen3"], chat_template=None)
    with pytest.raises(ValueError, match="plain has none"):
        load_tokenizer(plain, chat_template_args={"enable_thinking": True})


def test_stop_token_ids_are_added_once_and_must_be_in_the_vocabulary(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "t", FAMILIES["qwen2_5_math"])
    known = load_tokenizer(folder)
    tokenizer = load_tokenizer(folder, stop_token_ids=(5, known.eos_id))
    assert tokenizer.eos_ids == (*known.eos_ids, 5)
    assert load_tokenizer(folder, stop_token_ids=(0,)).eos_ids == (*known.eos_ids, 0), "0 is an id like any other"
    for token_id in (known.vocab_size, -1, 1 << 40):
        with pytest.raises(ValueError, match=rf"rollout\.stop_token_ids=\[{token_id}\]: {token_id} is not in"):
            load_tokenizer(folder, stop_token_ids=(token_id,))


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(tmp_path: Path) -> None:
    tokenizer = _load(tmp_path, "qwen3")
    check_vocabulary(tokenizer, tokenizer.vocab_size, "config.json")
    check_vocabulary(tokenizer, tokenizer.vocab_size + 128, "config.json")
    with pytest.raises(ValueError, match=r"m/config\.json: vocab_size=260: the tokenizer has ids up to 260"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1, "m/config.json")


def test_special_tokens_map_fills_what_tokenizer_config_leaves_out(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "t", FAMILIES["mistral"], eos_token=None, chat_template=None)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "bos_token": "<unk>"})
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == _token(tokenizer, "</s>")
    folder = write_family(tmp_path / "t", FAMILIES["mistral"], add_bos_token=True, chat_template=None)
    assert load_tokenizer(folder).render("hi", False)[0] == _token(tokenizer, "<s>")
