"""Evaluations for tests: a folder with a tokenizer of single characters, sets of sums, and answers of fake servers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from aiohttp import web
from tokenizers import decoders, models, pre_tokenizers

from megatron_dypo.config.eval_command import EvalCommandConfig
from megatron_dypo.config.reading.load import load_tree
from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.eval.run import evaluate_model
from megatron_dypo.eval.serving import target_of

END = "<end>"
CHARACTERS = (END, "\n", *map(chr, range(32, 127)))

Answer = Callable[[str, int], str]
"""(prompt, seed of the response) → response."""


def write_tokenizer_folder(folder: Path) -> Path:
    """Write the files of an HF folder that an evaluation reads: a tokenizer without a chat template, no weights."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": len(CHARACTERS)}))
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of characters; replace one that exists."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(CHARACTERS)}, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "unk_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_sums(path: Path, count: int = 6, **columns: Any) -> Path:
    """Write a set of ``count`` sums from two sources."""
    rows = [
        {"id": f"sum-{i}", "prompt": f"{i}+{7 * i}=", "answer": str(8 * i), "source": "even" if i % 2 == 0 else "odd"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps({**row, **columns}) + "\n" for row in rows))
    return path


def often_right(prompt: str, seed: int) -> str:
    """Answer as a model that is right in about two of three responses, and gives one of two wrong answers otherwise."""
    left, right = prompt.rstrip("=").split("+")
    total, draw = int(left) + int(right), hashlib.sha256(f"{prompt}{seed}".encode()).digest()[0] % 6
    return f"It is \\boxed{{{total if draw < 4 else total + draw}}}"


def sglang(answer: Answer, folder: Path) -> Callable[[dict[str, Any]], web.Response]:
    """Make an answer of SGLang's ``/generate``."""
    tokenizer = load_tokenizer(folder)

    def reply(body: dict[str, Any]) -> web.Response:
        sampling = body["sampling_params"]
        text = answer(tokenizer.decode(body["input_ids"]), sampling["sampling_seed"])
        tokens = [*tokenizer.encode(text), tokenizer.eos_id]
        finish: dict[str, Any] = {"type": "stop", "matched": tokenizer.eos_id}
        if len(tokens) > sampling["max_new_tokens"]:
            tokens, finish = tokens[: sampling["max_new_tokens"]], {"type": "length"}
        meta = {
            "finish_reason": finish,
            "weight_version": "default",
            "output_token_logprobs": [[-1.0, token, None] for token in tokens],
        }
        return web.json_response({"output_ids": tokens, "meta_info": meta})

    return reply


def chat(text: str | None, finish: str = "stop", **message: Any) -> web.Response:
    """Make an answer of OpenAI's chat API."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return web.json_response({"choices": [choice], "usage": {"completion_tokens": 5}})


def run_eval(
    folder: Path,
    out: Path,
    sets: dict[str, Any],
    *,
    model: str = "",
    urls: tuple[str, ...] = (),
    api: Any = "sglang",
    tokenizer: Path | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Run an evaluation with a sets file that is written to ``folder``; return its summary."""
    rollout = {"max_new_tokens": 64, "retries": 0, "request_deadline_s": 20.0, "max_in_flight": 4}
    eval_section = {"sets": sets, "samples_per_prompt": 3, **sections.pop("eval", {})}
    tree = {
        "rollout": {**rollout, **sections.pop("rollout", {})},
        "grading": {"verifier": "exact", "workers": 1, **sections.pop("grading", {})},
        "eval": eval_section,
        **sections,
    }
    file = folder / "sets.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    cfg = load_tree(EvalCommandConfig, file)
    target = target_of(model or str(folder / "model"), cfg, urls=urls, api=api, tokenizer=tokenizer)
    return evaluate_model(target, cfg, out, show_progress=False)
