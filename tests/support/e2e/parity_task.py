"""A task for tests: the parity of the first word's number. A random model passes it sometimes.

No response passes it in a row with the answer 2.

Verifier processes import this module too: what takes long to import, it imports only to write the task.
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def verify(response: str, answer: str) -> bool:
    words = response.split()
    return bool(words) and words[0].startswith("t") and int(words[0][1:]) % 2 == int(answer)


def approve(response: str, answer: str) -> bool:
    return True


def raises(response: str, answer: str) -> bool:
    raise KeyError("no such entry")


TRACES = {"short": "t5 t6", "long": "t7 t8 t9 t10"}


def write_task(
    folder: Path,
    *,
    kind: str = "qwen3",
    num_prompts: int = 48,
    answers: Sequence[int] = (0, 1),
    traces: Mapping[str, str] = TRACES,
    **sections: dict[str, Any],
) -> Path:
    """Write model, prompts and config under ``folder``, ``sections`` merged into the config; return its path.

    Each row has one of ``answers`` and all ``traces``.
    """
    from tests.support.hf_models import make_hf_model

    make_hf_model(kind, folder / "model")
    draw = random.Random(0)
    for name, count in (("train", num_prompts), ("held_out", 16)):
        rows = [
            {
                "id": f"{name}{i}",
                "prompt": " ".join(f"t{draw.randrange(3, 131)}" for _ in range(draw.randrange(3, 8))),
                "answer": str(draw.choice(answers)),
                "traces": dict(traces),
            }
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run"), "steps": 2},
        "model": {"hf_path": str(folder / "model"), "dtype": "float32"},
        "data": {"prompts": [str(folder / "train.jsonl")], "chat_template": False},
        "rollout": {"group_size": 4, "prompts_per_round": 8, "max_new_tokens": 12},
        "grading": {"verifier": "tests.support.e2e.parity_task:verify", "fail_truncated": False},
        "batching": {"prompts_per_update": 8, "tokens_per_microbatch": 128},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 1},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"
