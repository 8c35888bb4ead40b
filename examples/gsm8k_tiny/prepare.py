"""Make the inputs of dypo.yaml from GSM8K: prompt data with two teachers, and a small model with its own tokenizer.

A row of GSM8K has a ``question`` and an ``answer``. The answer is a solution that annotates its calculations,
``<<48/2=24>>``, and ends with ``#### 72``. The teachers are:

* ``solutions``: the solution of the data set, without the annotations;
* ``calculations``: only the annotations, ``48/2=24; 48+24=72``, then the answer. Rows without annotations have only the
  teacher ``solutions``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from train_tokenizer import TRAINERS

from megatron_dypo.models.random_model import write_random_model

HERE = Path(__file__).parent
ANNOTATION = re.compile(r"<<(.*?)>>")
ANSWER_MARK = "#### "

VOCABULARY_SIZE = 1024
# Ids 0, 1, 2 are the tokenizers' <pad>, <s> and </s>.
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "vocab_size": VOCABULARY_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


class TokenizerKind(str, Enum):
    """The library that trains the tokenizer."""

    bpe = "bpe"
    sentencepiece = "sentencepiece"


def read_gsm8k(path: Path) -> list[dict[str, str]]:
    """Read the rows of a GSM8K file. Raises ValueError with the file and line of a bad row."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; --data needs train.jsonl and test.jsonl of GSM8K")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        if not {"question", "answer"} <= row.keys() or ANSWER_MARK not in row["answer"]:
            raise ValueError(
                f"{path}:{number}: must have a question, and an answer that ends with '{ANSWER_MARK}<number>'"
            )
        rows.append(row)
    return rows


def prompt_row(row: dict[str, str], row_id: str) -> dict[str, object]:
    """Return a row of prompt data for a row of GSM8K."""
    solution, _, answer = row["answer"].rpartition(ANSWER_MARK)
    answer = answer.strip().replace(",", "")
    ending = f"{ANSWER_MARK}{answer}"
    traces = {"solutions": ANNOTATION.sub("", solution) + ending}
    if calculations := ANNOTATION.findall(solution):
        traces["calculations"] = f"{'; '.join(calculations)}\n{ending}"
    return {"id": row_id, "prompt": row["question"], "answer": answer, "source": "gsm8k", "traces": traces}


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def prepare(data: Path, tokenizer: str, out: Path, seed: int = 1) -> None:
    """Write ``out/data/{train,test}.jsonl`` and the model folder ``out/model``."""
    texts: list[str] = []
    for split in ("train", "test"):
        source = data / f"{split}.jsonl"
        rows = [prompt_row(row, f"{split}-{index}") for index, row in enumerate(read_gsm8k(source))]
        write_rows(out / "data" / f"{split}.jsonl", rows)
        if split == "train":
            texts = [text for row in rows for text in (row["prompt"], *row["traces"].values())]  # type: ignore[attr-defined]
    model = out / "model"
    model.mkdir(parents=True, exist_ok=True)
    TRAINERS[tokenizer](texts, model, VOCABULARY_SIZE)
    count = write_random_model(model, HF_CONFIG, seed)
    print(f"{out / 'data'}: prompts with two teachers\n{model}: {count:,} parameters, {tokenizer} tokenizer")


def main(
    data: Annotated[Path, typer.Option(help="Folder with train.jsonl and test.jsonl of GSM8K.")] = HERE / "data",
    tokenizer: Annotated[TokenizerKind, typer.Option(help="Library that trains the tokenizer.")] = TokenizerKind.bpe,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/gsm8k_tiny/input"),
) -> None:
    """Make the data and the model of examples/gsm8k_tiny/dypo.yaml."""
    prepare(data, tokenizer.value, out)


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
