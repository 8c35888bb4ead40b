"""Bad tokenizer files: each is named with the field, the value and the rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dypo.data.tokenizer.open import load_tokenizer
from tests.support.tiny_tokenizers import variant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": "<|nope|>"}, r"eos_token='<\|nope\|>': is not in the vocabulary"),
        ({"eos_token": None, "chat_template": None}, "neither eos_token"),
        ({"eos_token": 3}, "eos_token=3: must be a string"),
        ({"add_bos_token": "yes"}, "add_bos_token='yes': must be true or false"),
        ({"legacy": 1}, "legacy=1: must be true or false"),
        ({"add_bos_token": True, "bos_token": None}, "needs a bos_token"),
        ({"chat_template": "{% if %}"}, "not valid jinja2"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, "must be named `default`"),
        (
            {"chat_template": ["x"]},
            r"tokenizer_config.json: chat_template=\['x'\]: each entry of a list must be an object",
        ),
        ({"chat_template": [{"name": "default"}]}, "a string `name` and a string `template`"),
        ({"chat_template": [{"name": ["default"], "template": ""}]}, "a string `name` and a string `template`"),
        ({"chat_template": {"default": "x"}}, "must be a string or a list of named templates"),
        ({"chat_template": 3}, "chat_template=3: must be a string or a list"),
        ({"eos_token": ["<|im_end|>"]}, "eos_token=.*must be a string or an object"),
        ({"bos_token": {"content": 3}}, "bos_token=.*must be a string or an object"),
        ({"bos_token": "<|nope|>"}, r"bos_token='<\|nope\|>': is not in the vocabulary"),
        ({"added_tokens_decoder": ["x"]}, r"added_tokens_decoder=\['x'\]: must be an object"),
        ({"added_tokens_decoder": {"x": {"content": "<|bos|>"}}}, r"added_tokens_decoder\.x=.*must be an object"),
        ({"added_tokens_decoder": {"0": "<|bos|>"}}, r"added_tokens_decoder\.0='<\|bos\|>': must be an object"),
        ({"added_tokens_decoder": {"0": {"content": 5}}}, r"added_tokens_decoder\.0=.*must be an object"),
        ({"added_tokens_decoder": {"7": {"content": "<|new|>"}}}, r"'<\|new\|>' with id 7: tokenizer.json has only"),
        ({"added_tokens_decoder": {"7": {"content": "<|bos|>"}}}, r"'<\|bos\|>' with id 7: has id 0 in tokenizer.json"),
    ],
)
def test_bad_configuration_is_named(bpe_folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(variant(bpe_folder, tmp_path / "t", **changes))


def test_bad_files_are_named(bpe_folder: Path, sentencepiece_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for name, rule in (("tokenizer.json", "is not JSON"), ("tokenizer.model", "is not a sentencepiece model")):
        (tmp_path / name).write_text("rubbish")
        with pytest.raises(ValueError, match=f"{name}: {rule}"):
            load_tokenizer(tmp_path / name)
    folder = variant(bpe_folder, tmp_path / "t")
    (folder / "generation_config.json").write_text('{"eos_token_id": 4000}')
    with pytest.raises(ValueError, match="4000"):
        load_tokenizer(folder)
    folder = variant(sentencepiece_folder, tmp_path / "s")
    (folder / "added_tokens.json").write_text('{"<|im_start|>": 300}')
    with pytest.raises(ValueError, match=r"im_start.*only 300 tokens"):
        load_tokenizer(folder)


DEEP = "[" * 100_000 + "]" * 100_000
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7031645\n"


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"[]", "must hold a JSON object, holds a list"),
        (b'"text"', "must hold a JSON object, holds a str"),
        (b"", "is not JSON"),
        (b'{"eos_token": ', "is not JSON"),
        (b'{"a": "\xff\xfe"}', "is not UTF-8: invalid start byte at byte 7"),
        (DEEP.encode(), "is not JSON: "),
        (b'{"eos_token_id": ' + b"9" * 5000 + b"}", "is not JSON: "),
        (b'{"a": {"eos_token": 1, "eos_token": 2}}', "is not JSON: the key 'eos_token' stands twice"),
        (b'{"bos_token": "\\ud83d"}', r"holds a lone surrogate, '\\ud83d'"),
        (LFS.encode(), "is a git-lfs pointer: run `git lfs pull`"),
    ],
)
def test_a_file_that_holds_another_thing_is_named(
    bpe_folder: Path, tmp_path: Path, name: str, content: bytes, rule: str
) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name}: {rule}"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_link_to_nothing_is_not_an_absent_file(bpe_folder: Path, tmp_path: Path, name: str) -> None:
    """A hub's cache has such links if its blobs were deleted."""
    folder = variant(bpe_folder, tmp_path / "t")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/gone")
    with pytest.raises(ValueError, match=rf"/{name}: is not a file: a link to nothing"):
        load_tokenizer(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"/{name}: is not a file"):
        load_tokenizer(folder)


def _model(content: dict) -> None:
    content["model"] = {"type": "BPE"}


def _version(content: dict) -> None:
    content["version"] = "9.0"


def _schema(content: dict) -> None:
    content.clear()
    content.update({"word_index": {"a": 1}, "model": {"name": "keras"}})


def _merges(content: dict) -> None:
    content["model"]["merges"].append(["no such", "tokens"])


def _added(content: dict) -> None:
    content["added_tokens"] = [{"id": 5}]


def _negative(content: dict) -> None:
    content["model"]["vocab"]["a"] = -1


def _scalar(content: dict) -> None:
    content["model"] = 3


@pytest.mark.parametrize("change", [_model, _version, _schema, _merges, _added, _negative, _scalar])
def test_a_tokenizer_json_of_another_schema_is_named(
    bpe_folder: Path, tmp_path: Path, change: Callable[[dict], None]
) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"/tokenizer\.json: (is not a tokenizer of tokenizers|has no object `model`)"):
        load_tokenizer(folder)


def test_an_added_token_that_would_be_numbered_anew_is_named(bpe_folder: Path, tmp_path: Path) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": 7000, "content": "<|hole|>"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"'<\|hole\|>' has id 7000, but is loaded as 353"):
        load_tokenizer(folder)


def test_a_tokenizer_json_that_makes_the_library_panic_is_named(bpe_folder: Path, tmp_path: Path) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Prepend", "prepend": ""}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"/tokenizer\.json: the tokenizers library cannot run this tokenizer"):
        load_tokenizer(folder).encode("What")


@pytest.mark.parametrize("value", ["x", [1, "x"], True, [-1], 1.5, {"id": 1}, [[2]], 1 << 40])
def test_a_stop_id_that_is_none_is_named(bpe_folder: Path, tmp_path: Path, value: object) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"/config\.json: eos_token_id=.*must be a token id or a list of token ids"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_stop_id_outside_the_vocabulary_names_its_file(
    bpe_folder: Path, sentencepiece_folder: Path, tmp_path: Path, kind: str
) -> None:
    folder = variant({"bpe": bpe_folder, "sentencepiece": sentencepiece_folder}[kind], tmp_path / "t")
    (folder / "config.json").write_text('{"eos_token_id": [2, 4000]}')
    with pytest.raises(ValueError, match=r"/config\.json: eos_token_id=4000: the vocabulary of tokenizer"):
        load_tokenizer(folder)


def test_bad_utf8_in_a_template_file_is_named(bpe_folder: Path, tmp_path: Path) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja: is not UTF-8: invalid start byte at byte 14"):
        load_tokenizer(folder)


def test_an_added_token_that_a_sentencepiece_model_numbers_otherwise_is_named(
    sentencepiece_folder: Path, tmp_path: Path
) -> None:
    folder = variant(sentencepiece_folder, tmp_path / "s", added_tokens_decoder={"5": {"content": "<s>"}})
    with pytest.raises(ValueError, match=r"added token '<s>' with id 5: has id 1 in tokenizer\.model"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_text_that_is_no_unicode_is_refused(bpe_folder: Path, sentencepiece_folder: Path, kind: str) -> None:
    tokenizer = load_tokenizer({"bpe": bpe_folder, "sentencepiece": sentencepiece_folder}[kind])
    for call in (
        tokenizer.encode,
        lambda text: tokenizer.render(text, True),
        lambda text: tokenizer.render(text, False),
    ):
        with pytest.raises(ValueError, match="has a lone surrogate at character"):
            call("What is \ud83d?")


def test_a_git_lfs_pointer_in_place_of_a_sentencepiece_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text(LFS)
    with pytest.raises(ValueError, match=r"tokenizer\.model: is a git-lfs pointer"):
        load_tokenizer(tmp_path)


def test_the_end_of_text_that_a_folder_names_comes_before_the_sentencepiece_model_s_own(
    sentencepiece_folder: Path, tmp_path: Path
) -> None:
    own = load_tokenizer(sentencepiece_folder)
    named = load_tokenizer(variant(sentencepiece_folder, tmp_path / "s", eos_token="<s>"))
    assert (named.eos_id, own.eos_id) == (1, 2), "<s> and </s>"
