"""An open evaluation set: its rows, and the prompt of each response to sample."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dypo.config.data import DataConfig, DataFieldsConfig
from megatron_dypo.config.evaluation import EvalConfig, SetSettings
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.rows import PromptRow
from megatron_dypo.data.tokenising import render_prompt
from megatron_dypo.data.tokenizer.chat import Message
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.eval.options import Shuffled, shuffled
from megatron_dypo.types import Prompt, Tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalPrompt(Prompt):
    """The prompt of one response of an evaluation.

    ``order`` numbers the responses of the set, item by item; ``visit`` is the response's number among the item's.
    """

    set_name: str
    seed: int
    """Seed of the response."""
    plain: str | list[Message]
    """The prompt before the chat template, for endpoints that apply their own template."""
    options: Shuffled | None = None
    """The order of its options, if they are shuffled."""


@dataclass(frozen=True, kw_only=True)
class EvalItem:
    """One row of a set."""

    number: int
    """Place in the set."""
    row: PromptRow
    verifier: str | None
    """The verifier that the row names, else that of the set. None: it follows from the source."""


def held_out_data(data: DataConfig, settings: SetSettings) -> DataConfig:
    """Return how the rows of a set are read: as ``data`` says, without teachers."""
    data = replace(data, teachers=None, drop_wrong_traces=False)
    if settings.shuffle_options:
        data = replace(data, keep_row=True)  # for the column `options`
    return data if settings.format is None else replace(data, format=settings.format, fields=DataFieldsConfig())


class EvalSet:
    """The rows of one evaluation set.

    Without a tokenizer prompts have no tokens: an endpoint renders them.

    Raises:
        ValueError: the file cannot be read or a row breaks a rule; or every prompt is too long.
    """

    def __init__(
        self,
        name: str,
        cfg: EvalConfig,
        data: DataConfig,
        tokenizer: Tokenizer | None,
        *,
        seed: int,
        cache_dir: Path | None = None,
        show_progress: bool = False,
    ) -> None:
        self.name, self.settings = name, cfg.settings(name)
        self._data, self._tokenizer, self._seed = held_out_data(data, self.settings), tokenizer, seed
        try:
            self.dataset = PromptDataset(
                [self.settings.path],
                data=self._data,
                tokenizer=tokenizer,
                cache_dir=cache_dir,
                show_progress=show_progress,
                held_out=True,
            )
        except ValueError as error:
            raise ValueError(f"eval.sets.{name}: {error}") from error

    def __len__(self) -> int:
        """Items that are evaluated."""
        limit = self.settings.max_prompts
        return len(self.dataset) if limit is None else min(limit, len(self.dataset))

    @property
    def keeps_row(self) -> bool:
        """Whether verifiers get the rows' other columns."""
        return self._data.keep_row

    @property
    def columns(self) -> dict[str, Any]:
        """Field → the column that it is read from."""
        columns = columns_of(self._data.format, self._data.fields)
        return {
            "prompt": columns.prompt,
            "answer": columns.answer,
            "source": columns.source,
            "id": columns.id,
            "verifier": columns.verifier,
        }

    def close(self) -> None:
        self.dataset.close()

    def items(self, replica: int = 0, replicas: int = 1) -> Iterator[EvalItem]:
        """Yield the items of one of several replicas that share the set, in the order of the file."""
        for number in range(replica, len(self), replicas):
            row = self.dataset[number]
            yield EvalItem(number=number, row=row, verifier=row.verifier or self.settings.verifier)

    def check_options(self) -> None:
        """Raise ValueError where options are to be shuffled and a row has none that can be found."""
        for item in self.items() if self.settings.shuffle_options else ():
            with self._naming(item):
                self._variant(item.row, 0)

    def prompts(self, item: EvalItem) -> list[EvalPrompt]:
        """Return the prompts of an item's responses; [] where one is longer than ``data.max_prompt_tokens``.

        Raises:
            ValueError: its options cannot be found, or the chat template refuses it.
        """
        count, row = self.settings.samples_per_prompt, item.row
        variants: list[Shuffled | None]
        with self._naming(item):
            if self.settings.shuffle_options:
                orders = [self._variant(row, sample) for sample in range(count)]
                variants, tokens = [*orders], [self._tokens(one.prompt) for one in orders]
            else:
                variants, tokens = [None] * count, [self._tokens(row.prompt)] * count
        if max(map(len, tokens)) > self._data.max_prompt_tokens:
            return []
        return [self._prompt(item, sample, variants[sample], tokens[sample]) for sample in range(count)]

    @contextlib.contextmanager
    def _naming(self, item: EvalItem) -> Iterator[None]:
        """Add the names of set and prompt to a ValueError."""
        try:
            yield
        except ValueError as error:
            place = f"eval.sets.{self.name}: {self.settings.path}: prompt {item.row.prompt_id}"
            raise ValueError(f"{place}: {error}") from error

    def _variant(self, row: PromptRow, sample: int) -> Shuffled:
        texts = row.row.get("options")
        return shuffled(row.prompt, row.answer, texts, seed=self._seed, prompt_id=row.prompt_id, sample=sample)

    def _tokens(self, prompt: str | list[Message]) -> Tokens:
        if self._tokenizer is None:
            return np.empty(0, np.int32)
        return render_prompt(prompt, self._tokenizer, self._data)

    def _prompt(self, item: EvalItem, sample: int, options: Shuffled | None, tokens: Tokens) -> EvalPrompt:
        row = item.row
        plain = row.prompt if options is None else options.prompt
        return EvalPrompt(
            prompt_id=row.prompt_id,
            visit=sample,
            order=item.number * self.settings.samples_per_prompt + sample,
            tokens=tokens,
            text=self._shown(plain, tokens),
            answer=row.answer if options is None else options.answer,
            source=row.source,
            verifier=item.verifier,
            row=row.row,
            set_name=self.name,
            seed=response_seed(self._seed, row.prompt_id, sample),
            plain=plain,
            options=options,
        )

    def _shown(self, plain: str | list[Message], tokens: Tokens) -> str:
        if self._tokenizer is not None:
            return self._tokenizer.decode(tokens.tolist())
        return plain_text(plain)


def plain_text(prompt: str | list[Message]) -> str:
    """Return a prompt as text for people: of messages, the contents."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def response_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Return the seed of one response: the same in every evaluation, different for each response."""
    key = json.dumps([seed, prompt_id, sample]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") >> 1


def open_sets(
    cfg: EvalConfig,
    data: DataConfig,
    tokenizer: Tokenizer | None,
    stack: contextlib.ExitStack,
    *,
    seed: int,
    cache_dir: Path | None = None,
    show_progress: bool = False,
) -> dict[str, EvalSet]:
    """Open every evaluation set by name; they are closed with ``stack``."""
    opened = {}
    for name in cfg.sets:
        one = EvalSet(name, cfg, data, tokenizer, seed=seed, cache_dir=cache_dir, show_progress=show_progress)
        opened[name] = stack.enter_context(contextlib.closing(one))
    return opened
