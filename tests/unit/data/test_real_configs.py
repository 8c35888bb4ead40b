"""The tokenizer's reader on the config.json of published models."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests
from megatron_dypo.data.tokenizer.files import read_folder
from megatron_dypo.data.tokenizer.open import check_vocabulary, load_tokenizer
from tests.support.chat_families import FAMILIES, write_family

MODELS = Path(tests.__file__).parent / "unit" / "models_real"
EOS = {
    "llama2_7b": 2,
    "llama3_1_8b": 128001,
    "llama3_2_3b": 128001,
    "mistral_7b_instruct_v0_2": 2,
    "qwen2_5_7b": 151643,
    "qwen2_5_14b": 151643,
    "qwen3_4b": 151645,
    "qwen3_4b_thinking_2507": 151645,
    "qwen3_8b": 151645,
    "qwen3_14b": 151645,
    "qwen3_30b_a3b": 151645,
}


def test_every_model_is_listed() -> None:
    assert {path.parent.name for path in MODELS.glob("*/config.json")} == set(EOS)


@pytest.mark.parametrize(("name", "eos"), EOS.items())
def test_the_stop_id_of_a_published_model_is_read(name: str, eos: int) -> None:
    assert dict(read_folder(MODELS / name).stop_ids) == {eos: "config.json"}


def test_a_tokenizer_beside_the_config_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "t", FAMILIES["qwen3"])
    (folder / "config.json").write_text((MODELS / "qwen3_8b" / "config.json").read_text())
    with pytest.raises(
        ValueError, match=r"/config\.json: eos_token_id=151645: the vocabulary of tokenizer\.json has 261"
    ):
        load_tokenizer(folder)


def test_published_vocabularies_are_padded() -> None:
    class Qwen3:
        """A tokenizer with the number of ids of Qwen3's tokenizer.json."""

        vocab_size = 151669

    check_vocabulary(Qwen3(), 151936, "config.json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocab_size=151646"):
        check_vocabulary(Qwen3(), 151646, "config.json")  # type: ignore[arg-type]
