"""The samples that a checkpoint of the parity task holds, and their log-probs by transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dypo.batching.queues import Group
from megatron_dypo.loop.resume import load_groups
from megatron_dypo.types import Floats, Sample, Tokens
from tests.support.hf_models import import_transformers

END = 2
"""Id of ``</s>``."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the task's prompt file, in token ids."""

    prompt_id: str
    answer: int
    traces: tuple[list[int], ...]
    """Each trace with ``</s>`` at its end."""


def rows_of(folder: Path) -> dict[tuple[int, ...], Row]:
    """Return the rows of a task's training data by the ids of their prompts: word ``t7`` is token 7."""
    rows = {}
    for line in (folder / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        traces = tuple([*ids_of(trace), END] for trace in row["traces"].values())
        key = tuple(ids_of(row["prompt"]))
        assert key not in rows, "two rows have one prompt"
        rows[key] = Row(prompt_id=row["id"], answer=int(row["answer"]), traces=traces)
    return rows


def ids_of(text: str) -> list[int]:
    """Return the ids of words: the one of ``t7`` is 7."""
    return [int(word.removeprefix("t")) for word in text.split()]


def row_of(sample: Sample, rows: dict[tuple[int, ...], Row]) -> Row:
    """Return the row that a sample's prompt is of."""
    return rows[tuple(sample.tokens[: sample.num_prompt_tokens].tolist())]


def response(sample: Sample) -> list[int]:
    """Return a sample's response tokens."""
    return [int(token) for token in sample.tokens[sample.num_prompt_tokens :]]


def groups_in(checkpoint: Path) -> list[Group]:
    """Return all groups of a checkpoint, oldest first; a trace of the buffer is a group of its own."""
    return load_groups([path.read_bytes() for path in sorted(checkpoint.glob("leader_*.bin"))])


def trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Return the loop's part of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text())["trainer"]
    return state


class Oracle:
    """The model of an HF folder in transformers, in float32."""

    def __init__(self, folder: Path) -> None:
        load = import_transformers().AutoModelForCausalLM.from_pretrained
        self._model = load(folder, dtype=torch.float32).eval()

    def score(self, tokens: Tokens, start: int) -> tuple[Floats, Floats]:
        """Return log π of the tokens from ``start`` on, and the entropy of π at each of them."""
        tokens_L = torch.as_tensor(tokens, dtype=torch.long)
        with torch.no_grad():
            logp_RV = self._model(tokens_L[None]).logits[0, start - 1 : -1].double().log_softmax(-1)
        logp_R = logp_RV.gather(1, tokens_L[start:, None])[:, 0]
        entropy_R = -(logp_RV.exp() * logp_RV).sum(-1)
        return logp_R.numpy().astype(np.float32), entropy_R.numpy().astype(np.float32)
