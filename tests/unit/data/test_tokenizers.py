"""Tokenizers against transformers, and the rules for specials, stops and templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import transformers

from megatron_dypo.data.prompts import end_trace
from megatron_dypo.data.tokenizer.open import load_tokenizer
from tests.support.tiny_tokenizers import TEMPLATE, train_sentencepiece, variant

CHATS = [
    [{"role": "user", "content": "What is 1 + 2?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "naïve 十\n\n?"}],
    [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "7"},
        {"role": "user", "content": "A text with <|im_end|> in it"},
    ],
]
TEXTS = ["What is 12 + 7?", "  leading space", "十 naïve\n", "x<|im_start|>y<|endoftext|>"]


def test_bpe_encodes_and_renders_as_transformers_does(bpe_folder: Path) -> None:
    ours, theirs = load_tokenizer(bpe_folder), transformers.AutoTokenizer.from_pretrained(bpe_folder)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ours.render(chat, True) == expected
    assert ours.eos_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("legacy", [False, True, None])
def test_sentencepiece_encodes_as_transformers_does(
    sentencepiece_folder: Path, tmp_path: Path, legacy: bool | None
) -> None:
    changes = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    folder = variant(sentencepiece_folder, tmp_path / "llama", **changes)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("What is 12 + 7?", "The answer is 十", "naïve thinking"):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    for text in ("<s>What is", "<s> What is 3?</s>", "What</s> is", "a</s><s> b", "<s>What</s>is"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    assert ours.render("What is 1?", False) == theirs.encode("What is 1?", add_special_tokens=True)


def test_template_tokens_become_special_ids(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    bos, start, end, _ = range(4)
    ids = tokenizer.render("What is 1 + 2?", True)
    assert ids[:2] == [bos, start]
    assert (ids.count(start), ids.count(end)) == (2, 1)
    assert tokenizer.decode(ids) == "user\nWhat is 1 + 2?\nassistant\n"


def test_sentencepiece_control_pieces_in_a_template_become_their_ids(sentencepiece_folder: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ids = tokenizer.render([{"role": "user", "content": "What is 1?"}], True)
    assert ids[:2] == [processor.bos_id(), processor.piece_to_id("[INST]")]
    assert ids[-1] == processor.piece_to_id("[/INST]")
    # One space was written after [INST]; the dummy prefix must not add another there.
    assert [processor.id_to_piece(i) for i in ids][2:-1] == [*processor.encode("What is 1?", out_type=str), "▁"]
    assert tokenizer.decode(ids).strip() == "What is 1?"


def test_the_unknown_piece_that_the_config_names_is_a_special_token(sentencepiece_folder: Path, tmp_path: Path) -> None:
    named = load_tokenizer(variant(sentencepiece_folder, tmp_path / "t", unk_token="<unk>"))
    assert named.encode("1<unk>2") == [*named.encode("1"), 0, *named.encode("[INST]2")[1:]]
    assert (named.decode(named.encode("1<unk>2")), named.show(named.encode("1<unk>2"))) == ("12", "1<unk>2")
    assert 0 not in load_tokenizer(sentencepiece_folder).encode("1<unk>2")


def test_a_string_is_one_user_message_only_under_a_template(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.render("hi", True) == tokenizer.render([{"role": "user", "content": "hi"}], True)
    assert tokenizer.render("hi", False) == tokenizer.encode("hi")
    plain = load_tokenizer(variant(bpe_folder, tmp_path / "plain", chat_template=None))
    assert plain.render("hi", True) == plain.encode("hi")


def test_messages_that_cannot_be_rendered_are_refused(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    with pytest.raises(ValueError, match="chat_template=false cannot render"):
        tokenizer.render(CHATS[0], False)
    with pytest.raises(ValueError, match=r"\['tool'\].*unknown role tool"):
        tokenizer.render([{"role": "tool", "content": "x"}], True)
    plain = load_tokenizer(variant(bpe_folder, tmp_path / "plain", chat_template=None))
    with pytest.raises(ValueError, match="has no chat template"):
        plain.render(CHATS[0], True)


@pytest.mark.parametrize("form", ["file", "list"])
def test_the_template_may_be_a_file_or_a_list(bpe_folder: Path, tmp_path: Path, form: str) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    folder = variant(bpe_folder, tmp_path / form, chat_template=named if form == "list" else "overruled by the file")
    if form == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(folder).render("hi", True) == load_tokenizer(bpe_folder).render("hi", True)


def test_a_template_may_use_what_transformers_offers(bpe_folder: Path, tmp_path: Path) -> None:
    template = (
        "{{ strftime_now('%Y') | length }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ eos_token }}"
    )
    folder = variant(bpe_folder, tmp_path / "t", chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "<é> & 'x'"}, {"role": "user", "content": "no"}]
    ids = load_tokenizer(folder).render(chat, True)
    assert ids == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert load_tokenizer(folder).decode(ids) == '4{"role": "user", "content": "<é> & \'x\'"}'


def test_a_template_cannot_reach_out_of_its_sandbox(bpe_folder: Path, tmp_path: Path) -> None:
    folder = variant(bpe_folder, tmp_path / "t", chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ValueError, match="SecurityError"):
        load_tokenizer(folder).render("hi", True)


@pytest.mark.parametrize("add_bos", [True, False])
def test_plain_prompts_get_bos_as_configured(bpe_folder: Path, tmp_path: Path, add_bos: bool) -> None:
    tokenizer = load_tokenizer(variant(bpe_folder, tmp_path / "t", add_bos_token=add_bos))
    assert tokenizer.render("hi", False) == [0] * add_bos + tokenizer.encode("hi")
    assert 0 not in tokenizer.encode("hi")


def test_bos_of_the_post_processor_is_kept(bpe_folder: Path, tmp_path: Path) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.render("hi", False) == theirs.encode("hi") == [0, *ours.encode("hi")]


def test_truncation_and_padding_of_the_file_are_not_obeyed(bpe_folder: Path, tmp_path: Path) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).encode(TEXTS[0]) == load_tokenizer(bpe_folder).encode(TEXTS[0])


def test_stop_ids_come_from_all_three_files(bpe_folder: Path, tmp_path: Path) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "config.json").write_text('{"eos_token_id": 1}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 2
    assert tokenizer.eos_ids == (2, 3, 1)


@pytest.mark.parametrize(
    "text",
    ["The answer is 3", "The answer is 3<|im_end|>", "The answer is 3<|im_end|>\n", "The answer is 3<|im_end|>" * 2],
)
def test_a_trace_ends_with_eos_exactly_once(bpe_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    ids = end_trace(text, tokenizer).tolist()
    assert ids[-1] == tokenizer.eos_id
    assert ids[-2] != tokenizer.eos_id
    assert tokenizer.decode(ids).startswith("The answer is 3")


def test_a_trace_that_ends_with_another_stop_token_gets_eos_instead(bpe_folder: Path, tmp_path: Path) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    tokenizer = load_tokenizer(folder)
    assert end_trace("3<|endoftext|>", tokenizer).tolist() == [*tokenizer.encode("3"), 2]


def test_white_space_at_the_end_of_a_trace_is_kept(bpe_folder: Path) -> None:
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.decode(end_trace("3 \n", tokenizer).tolist()) == "3 \n"


def test_sentencepiece_trace_ends_with_eos_exactly_once(sentencepiece_folder: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder)
    once = end_trace("The answer is 3", tokenizer).tolist()
    assert once == end_trace("The answer is 3</s>", tokenizer).tolist()
    assert once.count(tokenizer.eos_id) == 1


def test_decoding_skips_specials_and_ids_past_the_vocabulary(sentencepiece_folder: Path, tmp_path: Path) -> None:
    folder = variant(sentencepiece_folder, tmp_path / "t", eos_token="<turn>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([*tokenizer.encode("12<turn>"), 10_000]) == "12"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_saved_tokenizer_loads_the_same(
    bpe_folder: Path, sentencepiece_folder: Path, tmp_path: Path, kind: str
) -> None:
    tokenizer = load_tokenizer({"bpe": bpe_folder, "sentencepiece": sentencepiece_folder}[kind])
    tokenizer.save(tmp_path / "export")
    again = load_tokenizer(tmp_path / "export")
    assert again.render(CHATS[0], True) == tokenizer.render(CHATS[0], True)
    assert again.eos_ids == tokenizer.eos_ids
    again.save(tmp_path / "export")  # onto itself: nothing changes and nothing is lost
    assert load_tokenizer(tmp_path / "export").vocab_size == tokenizer.vocab_size


def test_a_model_folder_with_a_sentencepiece_model_alone_is_enough(tmp_path: Path) -> None:
    """Llama 2 and the first Mistral were released like this. Stop ids come from the model's own configuration."""
    folder = train_sentencepiece(tmp_path / "llama2")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": processor.eos_id()}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render("What is 1?", False) == [processor.bos_id(), *processor.encode("What is 1?")]
    assert tokenizer.decode(tokenizer.encode("What is 1?")) == "What is 1?"
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (processor.eos_id(), 300)
    tokenizer.save(tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").encode("3 + 4") == tokenizer.encode("3 + 4")


def test_a_bare_sentencepiece_file_needs_no_configuration(tmp_path: Path) -> None:
    folder = train_sentencepiece(tmp_path / "bare")
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.render("What is 1?", True) == [processor.bos_id(), *processor.encode("What is 1?")]
    assert tokenizer.eos_ids == (processor.eos_id(),)
