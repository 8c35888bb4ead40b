"""Render a prompt and a trace by chat templates and tokenizers of published models, as text.

``python -m tests.golden.render_published`` writes ``published_chats.txt`` again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_dypo.data.prompts import end_trace
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from tests.golden.render_chats import CHATS, TRACE
from tests.support.published_families import PUBLISHED
from tests.support.published_folders import write_published

GOLDEN = Path(__file__).parent / "published_chats.txt"


def render(name: str, tokenizer: Tokenizer) -> str:
    """Return the section of one model; texts are written as Python strings."""
    lines = [f"== {name}"]
    for label, chat in CHATS.items():
        lines.append(f"{label}: {tokenizer.show(tokenizer.render(chat, True))!r}")
    prompt = tokenizer.render(CHATS["user"], True)
    target = end_trace(TRACE, tokenizer, prompt).tolist()
    lines += [
        f"stops: {' '.join(f'{tokenizer.show([stop])}={stop}' for stop in tokenizer.eos_ids)}",
        f"the prompt opens: {tokenizer.generation_suffix!r}",
        f"target of a trace: {tokenizer.show(target)!r}",
        f"ids of the prompt: {' '.join(map(str, prompt))}",
        f"ids of the target: {' '.join(map(str, target))}",
    ]
    return "\n".join(lines) + "\n"


def render_all() -> str:
    """Return all sections, with a blank line between two."""
    with tempfile.TemporaryDirectory() as folder:
        return "\n".join(
            render(name, load_tokenizer(write_published(Path(folder) / name, name), chat_template_args=model.arguments))
            for name, model in PUBLISHED.items()
        )


if __name__ == "__main__":
    GOLDEN.write_text(render_all(), encoding="utf-8")
