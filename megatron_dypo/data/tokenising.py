"""From rows to token ids: the prompt with its template, and a trace as a target."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.rows import PromptRow
from megatron_dypo.data.tokenizer.chat import Message
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.types import Prompt, Tokens

_TAG = r"(?:<[^<>\s]+>|◁[^◁▷\s]+▷|\[/?[A-Z_]+\])"
_LEADING_TAGS = re.compile(rf"\s*({_TAG}(?:\s*{_TAG})*)")
_SPACES_AFTER_TAG = ("\n", "\n\n", "", " ")


def render_prompt(prompt: str | Sequence[Message], tokenizer: Tokenizer, data: DataConfig) -> Tokens:
    """Return the [L] token ids of a prompt, with the header of the answer. Raises ValueError if there is no text."""
    ids = tokenizer.render(prompt, data.chat_template)
    if not tokenizer.decode(ids[-256:]).strip() and not tokenizer.decode(ids).strip():
        raise ValueError("renders to nothing but special tokens and white space")
    return np.asarray(ids, dtype=np.int32)


def make_prompt(
    row: PromptRow, tokens: Tokens, tokenizer: Tokenizer, *, visit: int, order: int, traces: Mapping[str, Tokens]
) -> Prompt:
    """Make the prompt of a draw of ``row``, whose [L] token ids are ``tokens``."""
    return Prompt(
        prompt_id=row.prompt_id,
        visit=visit,
        order=order,
        tokens=tokens,
        text=tokenizer.decode(tokens.tolist()),
        answer=row.answer,
        source=row.source,
        traces=traces,
        verifier=row.verifier,
        row=row.row,
    )


def end_trace(text: str, tokenizer: Tokenizer, prompt: Sequence[int] | Tokens = ()) -> Tokens:
    """Return a teacher's trace as a target: [R] token ids that end with ``eos_id`` once, however the text ended.

    Stop tokens at the end, and white space after them, are replaced. If the ``prompt`` [L] ends with the tag with which
    the trace begins (``<think>``, if a template opens the thinking), the tag is removed from the trace.
    """
    ids = tokenizer.encode(text[_repeated(text, tokenizer, prompt) :])
    return np.asarray([*ids[: _end(ids, tokenizer)], tokenizer.eos_id], dtype=np.int32)


def require_target(target: Tokens, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a target of :func:`end_trace` is empty or goes on after a stop token."""
    if len(target) == 1:
        raise ValueError("has nothing but stop tokens and what the prompt ends with")
    inner = np.flatnonzero(np.isin(target[:-1], tokenizer.eos_ids))
    if len(inner):
        raise ValueError(
            f"goes on after a stop token (id {target[inner[0]]} is token {inner[0]} of {len(target)}): no rollout can"
        )


def _end(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """Return the end of the text, before its last stop tokens and the white space between them."""
    end = index = len(ids)
    while index:
        index -= 1
        if ids[index] in tokenizer.eos_ids:
            end = index
        elif tokenizer.decode([ids[index]]).strip():
            break
    return end


def _repeated(text: str, tokenizer: Tokenizer, prompt: Sequence[int] | Tokens) -> int:
    """Return how many characters at the start of a trace are already at the end of the prompt."""
    found = _LEADING_TAGS.match(text)
    if found is None or len(prompt) == 0:
        return 0
    tail = [int(token) for token in prompt[-64:]]
    # Tags may be special tokens, which have no text, or plain text, whose ids depend on the text before them.
    tail_text = tokenizer.decode(tail)
    for tag in reversed(list(re.finditer(_TAG, found.group(1)))):
        tags = found.group(1)[: tag.end()]
        for spaces in _SPACES_AFTER_TAG:
            ids = tokenizer.encode(tags + spaces)
            if tail_text.endswith(tags + spaces) or (ids and tail[-len(ids) :] == ids):
                end = found.start(1) + tag.end()
                return end + (len(spaces) if text.startswith(spaces, end) else 0)
    return 0
