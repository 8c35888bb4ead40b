"""Tiny tokenizers, trained for the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_tokenizers import train_bpe, train_sentencepiece


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
    return train_sentencepiece(
        tmp_path_factory.mktemp("sentencepiece"), bos_token="<s>", eos_token="</s>", chat_template=template
    )
