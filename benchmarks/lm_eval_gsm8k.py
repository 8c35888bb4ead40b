"""``megatron-dypo eval`` against lm-evaluation-harness: the same prompts, the same server, greedy.

    make setup-lm-eval setup-smollm2
    python benchmarks/lm_eval_gsm8k.py --model runs/smollm2/model --data gsm8k_test.jsonl --examples gsm8k_train.jsonl
    python benchmarks/lm_eval_gsm8k.py --model runs/smollm2/dypo/hf --additions

Starts one SGLang server with OpenAI's API, in float32 on the CPU. lm-evaluation-harness (``local-completions``, from
its own environment) and then ``megatron-dypo eval --api completions`` send it the same texts: a few solved questions as
turns of a chat and then the question, in the model's chat template. Both stop at the end of the turn or after
``--max-tokens``; our command sends no stop strings, so the harness gets none but that end.

The harness's own task ``gsm8k`` judges the answers by its two filters (``flexible-extract``: the last number;
``strict-match``: what follows the first ``####``), our command by its verifier ``math``, which here may also call a
truncated response right, as the harness does. Every pair of verdicts that differs is printed with both answers and the
reason. The additions are an easier set of the same form, for a model that has learned to add (``make smollm2``).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure as measuring
from lm_eval_verdicts import compare, golds, harness_verdicts, our_verdicts, rows_of

from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from megatron_dypo.eval.records import SUMMARY_FILE
from megatron_dypo.rollout.proxies import direct_hosts

ROOT = Path(__file__).resolve().parents[1]
HARNESS = ROOT / ".venv-lm-eval"
INSTRUCTION = "\nThink step by step. Write the final answer after ####."
SMOKE_ROWS = [{"question": "123+456=", "answer": "#### 579"}, {"question": "238+471=", "answer": "#### 709"}]
"""The quickstart's model has neither a chat template nor letters."""


def main() -> None:
    args = parsed_arguments()
    measuring.print_header()
    if not (args.out / "ours" / SUMMARY_FILE).is_file():
        sample(args)
    measuring.print_result(compare(our_verdicts(args.out), harness_verdicts(args.out), golds(args.out)))


def sample(args: argparse.Namespace) -> None:
    """Let both sample and judge, one after the other, from one server."""
    args.out.mkdir(parents=True)
    if args.smoke:
        args.model = write_smoke_model(args.out)
        args.max_tokens, args.concurrency = 8, 1
    eos = write_prompts(args)
    sys.path.insert(0, str(ROOT))  # for tests.support, which is not installed
    from tests.support.e2e.openai_server import openai_server

    with openai_server(args.model, args.out) as server:
        warm_up(args, server.url, server.api_key)
        ask_harness(args, server.url, server.api_key, eos)
        ask_ours(args, server.url, server.api_key)


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="HF folder of the model, with a chat template")
    parser.add_argument("--data", type=Path, help="GSM8K's test.jsonl")
    parser.add_argument("--examples", type=Path, help="GSM8K's train.jsonl; its first rows are shown solved")
    parser.add_argument("--additions", action="store_true", help="additions in words, instead of --data and --examples")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/lm_eval_gsm8k"),
        help="a new folder, or that of an earlier call that ended: its responses are compared again",
    )
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--shots", type=int, default=2, help="solved questions before each question")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time")
    parser.add_argument("--smoke", action="store_true", help="a random model, two additions: does it run?")
    args = parser.parse_args()
    if not harness_task_file():
        parser.error(f"{HARNESS.relative_to(ROOT)}: has no lm-evaluation-harness: run make setup-lm-eval first")
    if not args.smoke and args.model is None:
        parser.error("--model: needed without --smoke")
    if not (args.smoke or args.additions) and (args.data is None or args.examples is None):
        parser.error("--data and --examples: needed without --additions")
    args.out = args.out.absolute()  # the commands run in the repository, this program in any folder
    args.model = args.model and args.model.absolute()
    return args


def write_smoke_model(out: Path) -> Path:
    """Write the quickstart's random model."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from model import write_model

    write_model(out / "model", 1)
    return out / "model"


def write_prompts(args: argparse.Namespace) -> str:
    """Write the prompt file that both read, and return the text of the token that ends a turn."""
    tokenizer = load_tokenizer(args.model, chat_template=not args.smoke)
    if args.smoke:
        shots, rows = [], SMOKE_ROWS
    elif args.additions:
        rows = draw_additions(args.shots + args.items)
        shots, rows = rows[: args.shots], rows[args.shots :]
    else:
        shots, rows = first_rows(args.examples, args.shots), first_rows(args.data, args.items)
    texts = [row["question"] if args.smoke else rendered(row["question"], shots, tokenizer) for row in rows]
    prompts = [
        {"id": str(index), "prompt": text, "answer": row["answer"]}
        for index, (text, row) in enumerate(zip(texts, rows, strict=True))
    ]
    (args.out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    return tokenizer.show([tokenizer.eos_id])


def first_rows(path: Path, count: int) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    if len(rows) < count:
        raise ValueError(f"{path}: {len(rows)} rows: {count} are needed")
    return rows


def draw_additions(count: int) -> list[dict[str, str]]:
    """Return additions in words, in the form of GSM8K's rows: the solution ends with ``####`` and the sum."""
    sys.path.insert(0, str(ROOT / "examples" / "smollm2_135m"))
    from task import add_tens_and_ones, draw_questions

    (questions,) = draw_questions([count], random.Random(1))
    solutions = [add_tens_and_ones(question).partition(" The answer")[0] for question in questions]
    return [
        {"question": question.text, "answer": f"{solution}\n#### {question.answer}"}
        for question, solution in zip(questions, solutions, strict=True)
    ]


def rendered(question: str, shots: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> str:
    """Return the prompt as text, special tokens included, which the server turns back into tokens."""
    turns = [({"role": "user", "content": row["question"] + INSTRUCTION}, row["answer"]) for row in shots]
    messages = [message for asked, told in turns for message in (asked, {"role": "assistant", "content": told})]
    messages.append({"role": "user", "content": question + INSTRUCTION})
    return tokenizer.show(tokenizer.render(messages, True))


def harness_task_file() -> Path | None:
    """Return the file of the harness's own task ``gsm8k``; None if the harness is not installed."""
    return next(HARNESS.glob("lib/python*/site-packages/lm_eval/tasks/gsm8k/gsm8k.yaml"), None)


def harness_task(out: Path, max_tokens: int, eos: str) -> dict[str, Any]:
    """Return the harness's task ``gsm8k``, filters and comparison included, for the rendered prompts of ``out``."""
    return {
        "include": str(harness_task_file()),
        "tag": [],
        "task": "gsm8k_rendered",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(out / "prompts.jsonl")}},
        "training_split": None,
        "fewshot_split": None,
        "num_fewshot": 0,
        "doc_to_text": "{{prompt}}",
        "generation_kwargs": {"until": [eos], "do_sample": False, "temperature": 0.0, "max_gen_toks": max_tokens},
    }


def warm_up(args: argparse.Namespace, url: str, key: str) -> None:
    """Let the server compute the solved questions, with which every prompt begins, before many requests do at once."""
    body = {"model": str(args.model), "prompt": rows_of(args.out / "prompts.jsonl")[0]["prompt"], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=3600).close()


def ask_harness(args: argparse.Namespace, url: str, key: str, eos: str) -> None:
    """Let the harness sample and judge; it writes a line for each response and filter."""
    task = args.out / "gsm8k_rendered.yaml"  # JSON is YAML
    task.write_text(json.dumps(harness_task(args.out, args.max_tokens, eos), indent=2), encoding="utf-8")
    model = {"base_url": f"{url}/v1/completions", "model": args.model, "tokenizer_backend": "none", "eos_string": eos}
    model |= {"tokenized_requests": False, "num_concurrent": args.concurrency, "max_retries": 3, "timeout": 3600}
    offline = {"HF_HOME": str(args.out / "hf_home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run(
        *[str(HARNESS / "bin" / "lm-eval"), "run", "--model", "local-completions", "--tasks", str(task)],
        *["--model_args", ",".join(f"{name}={value}" for name, value in model.items()), "--batch_size", "1"],
        *["--output_path", str(args.out / "lm_eval"), "--log_samples"],
        environment={**os.environ, **direct_hosts(os.environ, ["127.0.0.1"]), **offline, "OPENAI_API_KEY": key},
    )


def ask_ours(args: argparse.Namespace, url: str, key: str) -> None:
    """Let ``megatron-dypo eval`` sample and judge the same prompts."""
    sets = {
        "rollout": {"max_new_tokens": args.max_tokens, "max_in_flight": args.concurrency},
        "grading": {"verifier": "math", "fail_truncated": False},
        "eval": {"temperature": 0, "sets": {"gsm8k": {"path": str(args.out / "prompts.jsonl")}}},
    }
    (args.out / "sets.yaml").write_text(json.dumps(sets), encoding="utf-8")
    run(
        *[sys.executable, "-m", "megatron_dypo.cli", "eval", str(args.model), "--sets", str(args.out / "sets.yaml")],
        *["--out", str(args.out / "ours"), "--api", "completions", "--url", url],
        environment={**os.environ, "DYPO_SGLANG_API_KEY": key},
    )


def run(*command: str, environment: Mapping[str, str]) -> None:
    print(f"$ {' '.join(command)}".replace(f"{ROOT}/", ""), flush=True)
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
