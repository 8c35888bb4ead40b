"""A JSON file of another program is read, or one line names it and its error."""

import json

import pytest

from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.hf.json_file import MAX_DEPTH, read_json_object

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 663\n"
LONG = "1" + "0" * 5000

BAD = {
    "empty": (b"", "not JSON: Expecting value"),
    "half": (b'{"model_type": "llama", ', "not JSON: "),
    "NUL": (b'{"model_type": "llama"}\0', "not JSON: Extra data"),
    "list": (b"[1, 2]", r"must hold a JSON object at the top, got \[1, 2\]"),
    "text": (b'"llama"', "must hold a JSON object at the top, got 'llama'"),
    "null": (b"null", "must hold a JSON object at the top, got None"),
    "bytes": (b'{"model_type": "\xff"}', r"not UTF-8: byte 16 is b'\\xff'"),
    "byte order mark": (b"\xef\xbb\xbf{}", "not JSON: Unexpected UTF-8 BOM"),
    "git-lfs pointer": (LFS, "a git-lfs pointer, not the file itself: run `git lfs pull`"),
    "long integer": (f'{{"vocab_size": {LONG}}}'.encode(), "vocab_size: an integer of 5001 digits"),
    "long integer inside": (f'{{"a": {{"b": [0, -{LONG}]}}}}'.encode(), r"a\.b\[1\]: an integer of 5001 digits"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "must not be nested deeper than 100 levels"),
    "rather deep": (b'{"a": ' + b'{"b": ' * 150 + b"1" + b"}" * 151, r"a\.b\..*: must not be nested deeper than 100"),
    "repeated field": (b'{"vocab_size": 5, "vocab_size": 6}', "vocab_size: is given twice, as 5 and as 6"),
}


@pytest.mark.parametrize("name", BAD)
def test_whatever_is_wrong_is_one_line_that_names_the_file(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json: {message}") as caught:
        load_architecture(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config.json: no such file; model.hf_path must be an HF model folder"):
        load_architecture(tmp_path)
    with pytest.raises(ValueError, match=r"config.json: cannot be read: Is a directory"):
        read_json_object(tmp_path / "config.json")


def test_what_is_well_is_read(tmp_path):
    value = {"a": [1, {"b": None}], "c": 1e-6, "d": "ü", "e": True, "f": -(10**4000)}
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    assert read_json_object(path) == value
    path.write_text('{"a": 1, "a": 1}')
    assert read_json_object(path) == {"a": 1}
    nested = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    path.write_text(f'{{"a": {nested}}}')
    assert read_json_object(path)["a"] == json.loads(nested)
