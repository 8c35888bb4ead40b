"""The data as the policy's tokenizer encodes it: stop tokens, the first prompt, texts that encoding changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_dypo.check.report import FirstPrompt, RoundTrip
from megatron_dypo.config.tree import Config
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.prompts import PromptStream, epoch_order
from megatron_dypo.data.tokenizer.open import Tokenizer

_SAMPLED_ROWS = 200
_AROUND = 20
"""Characters shown around the first difference."""
_DRAWS = 16


def stops(tokenizer: Tokenizer) -> tuple[tuple[int, str], ...]:
    """Return (id, text) of every token that ends a response. The first one ends traces."""
    return tuple((token_id, tokenizer.show([token_id])) for token_id in tokenizer.eos_ids)


def first_prompt(config: Config, dataset: PromptDataset, tokenizer: Tokenizer) -> FirstPrompt | None:
    """Return the first prompt of the run that is not too long, or None."""
    # Its traces do not matter here, and may not be judged yet.
    data = replace(config.data, drop_wrong_traces=False, teachers=None)
    stream = PromptStream(dataset, tokenizer, data, config.run.seed)
    for start in range(0, len(stream), _DRAWS):
        prompts, _ = stream.take(start, min(_DRAWS, len(stream) - start))
        if prompts:
            ids = prompts[0].tokens.tolist()
            return FirstPrompt(prompt_id=prompts[0].prompt_id, text=tokenizer.show(ids), ids=tuple(ids))
    return None


def round_trip(dataset: PromptDataset, tokenizer: Tokenizer, *, seed: int) -> RoundTrip:
    """Encode and decode prompts and traces of up to 200 rows; count the texts that change."""
    num_texts = num_changed = 0
    example = None
    for number in sorted(epoch_order(seed, len(dataset), 0)[:_SAMPLED_ROWS].tolist()):
        for what, text in _texts(dataset, number):
            num_texts += 1
            decoded = tokenizer.show(tokenizer.encode(text))
            if decoded != text:
                num_changed += 1
                example = example or f"{what}: {_difference(text, decoded)}"
    return RoundTrip(num_texts=num_texts, num_changed=num_changed, example=example)


def _texts(dataset: PromptDataset, number: int) -> Iterator[tuple[str, str]]:
    row = dataset[number]
    messages = [row.prompt] if isinstance(row.prompt, str) else [message["content"] for message in row.prompt]
    for message in messages:
        yield f"the prompt {row.prompt_id}", message
    for teacher, trace in row.traces.items():
        yield f"the trace of {teacher} in {row.prompt_id}", trace


def _difference(text: str, decoded: str) -> str:
    pairs = zip(text, decoded, strict=False)
    at = next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(text), len(decoded)))
    start, stop = max(at - _AROUND, 0), at + _AROUND
    return f"{text[start:stop]!r} becomes {decoded[start:stop]!r} at character {at}"
