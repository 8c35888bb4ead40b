"""Contamination: prompts of an evaluation set that are also in the training files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from megatron_dypo.check.report import Overlap
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.rows import PromptRow
from megatron_dypo.metrics.progress import progress

_SHOWN = 3


def find_overlap(name: str, train: PromptDataset, held_out: PromptDataset, *, show_progress: bool) -> Overlap:
    """Count the rows of ``held_out`` whose prompt is also in ``train``, ignoring case and white space."""
    wanted: dict[bytes, list[str]] = {}
    for row in _rows(held_out):
        wanted.setdefault(_digest(row), []).append(row.prompt_id)
    shared: dict[bytes, str] = {}
    with progress(len(train), f"comparing prompts with {name}", "prompts", enabled=show_progress) as bar:
        for row in _rows(train):
            digest = _digest(row)
            if digest in wanted:
                shared.setdefault(digest, row.prompt_id)
            bar.update(1)
    pairs = [
        f"{prompt_id} (is {shared[digest]})" for digest, ids in wanted.items() for prompt_id in ids if digest in shared
    ]
    return Overlap(name=name, num_rows=len(held_out), num_shared=len(pairs), examples=tuple(pairs[:_SHOWN]))


def _rows(dataset: PromptDataset) -> Iterator[PromptRow]:
    return (dataset[number] for number in range(len(dataset)))


def _digest(row: PromptRow) -> bytes:
    """Hash the question: the text of a prompt, or its messages of the user. System messages are left out."""
    if isinstance(row.prompt, str):
        texts = [row.prompt]
    else:
        texts = [message["content"] for message in row.prompt if message["role"] == "user"] or [
            message["content"] for message in row.prompt
        ]
    plain = " ".join(" ".join(texts).split()).casefold()
    return hashlib.blake2b(plain.encode(), digest_size=16).digest()
