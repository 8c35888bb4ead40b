"""GSM8K: data, teachers, tokenizers; and the configs of the other examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prepare import HERE, prepare, prompt_row, read_gsm8k

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.grading.exact import verify_exact
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.hf.read import HFReader

EXAMPLES = HERE.parent
PUBLISHED = {
    "rollout.group_size": 8,
    "rollout.max_new_tokens": 8192,
    "optimizer.lr": 1e-6,
    "objective.alpha": 0.5,
    "objective.gamma": 1.0,
    "objective.beta_gal": 1.0,
    "eval.temperature": 0.6,
}


def test_teachers_come_from_solution_and_annotations() -> None:
    row = {"question": "q", "answer": "Half is 48/2 = <<48/2=24>>24.\nBoth: $<<48+24=1,072>>1,072\n#### 1,072"}
    made = prompt_row(row, "train-0")
    assert made["answer"] == "1072"
    assert made["traces"] == {
        "solutions": "Half is 48/2 = 24.\nBoth: $1,072\n#### 1072",
        "calculations": "48/2=24; 48+24=1,072\n#### 1072",
    }


def test_a_solution_without_annotations_has_one_teacher() -> None:
    assert prompt_row({"question": "q", "answer": "Five.\n#### 5"}, "0")["traces"] == {"solutions": "Five.\n#### 5"}


@pytest.mark.parametrize(
    ("line", "rule"), [('{"question": "q"}', "must have a question"), ('{"question": "q", "answer": "5"}', "####")]
)
def test_a_row_that_is_not_gsm8k_is_named(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"question": "q", "answer": "#### 5"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: .*{rule}"):
        read_gsm8k(path)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_prepared_folder_is_complete_and_its_tokenizer_gives_back_every_text(tmp_path: Path, kind: str) -> None:
    prepare(HERE / "data", kind, tmp_path)
    model = tmp_path / "model"
    HFReader(model).check_complete(load_architecture(model))
    tokenizer = load_tokenizer(model)
    assert (model / "tokenizer.model").exists() == (kind == "sentencepiece")
    config = load_config(EXAMPLES / "gsm8k_tiny" / "dypo.yaml")
    assert tokenizer.vocab_size <= load_architecture(model).vocab_size
    for line in (tmp_path / "data" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert len(tokenizer.render(row["prompt"], True)) <= config.data.max_prompt_tokens
        for text in row["traces"].values():
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert len(ids) < config.data.max_trace_tokens
            assert verify_exact(text, row["answer"])


def test_a_second_preparation_leaves_no_tokenizer_of_the_other_kind(tmp_path: Path) -> None:
    prepare(HERE / "data", "bpe", tmp_path)
    prepare(HERE / "data", "sentencepiece", tmp_path)
    assert not (tmp_path / "model" / "tokenizer.json").exists()


def test_shipped_sample_is_small_and_has_its_licence() -> None:
    assert sum(file.stat().st_size for file in (HERE / "data").iterdir()) < 200_000
    assert "MIT License" in (HERE / "data" / "LICENSE").read_text()


@pytest.mark.parametrize(("key", "value"), PUBLISHED.items())
def test_paper_config_has_the_published_value(key: str, value: float) -> None:
    section, field = key.split(".")
    config = load_config(EXAMPLES / "qwen2_5_math_7b" / "dypo.yaml")
    assert getattr(getattr(config, section), field) == value
    assert config.objective.name == "dypo"
