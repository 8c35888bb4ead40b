"""Bad tokenizer files: each is named with the field, the value and the rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dypo.data.tokenizers import load_tokenizer
from tests.unit.data.conftest import variant


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token": "<|nope|>"}, r"eos_token='<\|nope\|>': is not in the vocabulary"),
        ({"eos_token": None, "chat_template": None}, "neither eos_token"),
        ({"eos_token": 3}, "eos_token=3: must be a string"),
        ({"add_bos_token": "yes"}, "add_bos_token='yes': must be true or false"),
        ({"add_bos_token": True, "bos_token": None}, "needs a bos_token"),
        ({"chat_template": "{% if %}"}, "not valid jinja2"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, "must be named `default`"),
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
