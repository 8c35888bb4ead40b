"""Render a prompt and a trace by each family of chat templates, as text.

``python -m tests.golden.render_chats`` writes ``chat_families.txt`` again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tokenizers import Tokenizer

from megatron_dypo.data.prompts import end_trace
from megatron_dypo.data.tokenizer.open import load_tokenizer
from tests.support.chat_families import FAMILIES, write_family

FOLDER = Path(__file__).parent
GOLDEN = FOLDER / "chat_families.txt"
CHATS = {
    "user": [{"role": "user", "content": " What is 1 + 2? "}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 2?"}],
    "turns": [
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And 3 + 4?"},
    ],
}
TRACE = "<think>\nOne and two.</think>\n\\boxed{3}"


def render(name: str) -> list[str]:
    """Return the lines of one family; each value is written as a Python string."""
    family = FAMILIES[name]
    with tempfile.TemporaryDirectory() as folder:
        write_family(Path(folder), family)
        tokenizer = load_tokenizer(folder, chat_template_args=family.arguments)
        backend = Tokenizer.from_file(f"{folder}/tokenizer.json")
        lines = [f"== {name}"]
        for label, chat in CHATS.items():
            try:
                text = repr(backend.decode(tokenizer.render(chat, True), skip_special_tokens=False))
            except ValueError as error:
                text = f"refused: {str(error).rpartition(': the chat template ')[2]}"
            lines.append(f"{label}: {text}")
        lines.append(f"a turn ends with: {backend.id_to_token(tokenizer.eos_id)}")
        lines.append(f"stops: {' '.join(str(backend.id_to_token(i)) for i in tokenizer.eos_ids)}")
        lines.append(f"the prompt opens: {tokenizer.generation_suffix!r}")
        trace = end_trace(TRACE, tokenizer, tokenizer.render(CHATS["user"], True))
        lines.append(f"target of a trace: {backend.decode(trace.tolist(), skip_special_tokens=False)!r}")
    return lines


def render_all() -> str:
    return "\n\n".join("\n".join(render(name)) for name in FAMILIES) + "\n"


if __name__ == "__main__":
    GOLDEN.write_text(render_all(), encoding="utf-8")
