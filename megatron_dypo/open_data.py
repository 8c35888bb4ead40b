"""The data of a run on a replica's leader: prompt files, evaluation sets, and whether they are those of before a resume."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dypo.batching.exchange import gather_objects
from megatron_dypo.config.tree import Config
from megatron_dypo.data.fingerprints import compare_fingerprints
from megatron_dypo.data.prompts import PromptDataset, PromptStream, open_prompts
from megatron_dypo.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from megatron_dypo.parallel.layout import Layout

log = logging.getLogger("megatron_dypo")


def open_tokenizer(config: Config, vocab_size: int) -> Tokenizer:
    """Load the policy's tokenizer as the config wants it used.

    Raises:
        ValueError: a broken file, or ids that the model's embedding of ``vocab_size`` rows lacks.
    """
    folder = Path(config.model.hf_path)
    tokenizer = load_tokenizer(
        folder,
        chat_template=config.data.chat_template,
        chat_template_args=config.data.chat_template_args,
        stop_token_ids=config.rollout.stop_token_ids,
    )
    check_vocabulary(tokenizer, vocab_size, folder / "config.json")
    return tokenizer


def open_dataset(config: Config, layout: Layout, tokenizer: Tokenizer) -> PromptDataset:
    """Open and check the prompt files; the first leader does the work, and the others read its result.

    Raises:
        ValueError: bad rows, or every prompt is too long.
    """
    with _first_leader_first(layout):
        return open_prompts(
            config.data.prompts,
            config.data,
            tokenizer,
            cache_dir=Path(config.run.dir),
            show_progress=layout.is_global_leader,
        )


def open_held_out(config: Config, layout: Layout, tokenizer: Tokenizer) -> dict[str, PromptStream]:
    """Open the evaluation sets by name; their traces, if they have any, are not read."""
    data = replace(config.data, teachers=None)
    streams = {}
    with _first_leader_first(layout):
        for name, path in config.eval.sets.items():
            dataset = open_prompts([path], data, tokenizer, cache_dir=Path(config.run.dir), held_out=True)
            streams[name] = PromptStream(dataset, tokenizer, data, config.run.seed)
    return streams


@contextlib.contextmanager
def _first_leader_first(layout: Layout) -> Iterator[None]:
    """Run the block on the first replica's leader, and then on the others."""
    assert layout.leaders_group is not None, "leaders open data"
    if not layout.is_global_leader:
        gather_objects(None, layout.leaders_group)
    yield
    if layout.is_global_leader:
        gather_objects(None, layout.leaders_group)


def data_identity(config: Config, stream: PromptStream) -> dict[str, Any]:
    """What gives a position of the run its row: a resumed run must find the same."""
    return {"files": stream.fingerprint(), "shuffle": config.data.shuffle, "seed": config.run.seed}


def require_same_data(stored: Mapping[str, Any], current: Mapping[str, Any], allow_changed: Sequence[str]) -> None:
    """Hold the data of a checkpoint against that of this run.

    Raises:
        ValueError: they differ, and ``run.allow_changed`` does not name ``data``.
    """
    changes = compare_fingerprints(stored["files"], current["files"])
    for key in ("shuffle", "seed"):
        if stored[key] != current[key]:
            changes.append(f"{key}: {stored[key]!r} → {current[key]!r}")
    if not changes:
        return
    words = f"not the data of the run that is resumed, so that its positions mean other rows: {'; '.join(changes)}"
    if "data" not in allow_changed:
        raise ValueError(f"{words}. Restore the data, choose another run.dir, or set run.allow_changed=[data]")
    log.warning("%s (allowed by run.allow_changed)", words)
