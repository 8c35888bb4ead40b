"""Sample a teacher: ask an SGLang server about each prompt of a JSONL file, and keep an answer that a verifier accepts.

    python -m sglang.launch_server --model-path MODEL --tp-size 8 --port 30000       # the teacher, on any machine
    python examples/teacher_traces.py train.jsonl with_traces.jsonl --url http://HOST:30000 --teacher qwen3-235b

Each row of the output is the row of the input with ``traces[TEACHER]`` added, if one of the attempts was right. Run
again after an interruption, the script goes on behind the last whole row. Run once per teacher, each on the output
before it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import typer

from megatron_dypo import GradingConfig, Verifier

CHUNK = 64
"""Rows between two writes."""
TRIES = 3
"""Attempts at one request before the script gives up."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Which server is asked, and how."""

    url: str
    attempts: int
    """Responses for each prompt; the first right one is kept."""
    temperature: float
    max_tokens: int
    concurrency: int
    key: str | None

    def body(self, prompt: str | list[dict[str, Any]]) -> dict[str, Any]:
        """Return the request for one prompt; the server renders it with the teacher's own chat template."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {
            "model": "default",
            "messages": messages,
            "n": self.attempts,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }


async def ask(prompts: Sequence[Any], sampling: Sampling) -> list[list[str]]:
    """Return the finished responses to each prompt, in the order of the prompts, without those cut at the limit.

    Raises:
        ValueError: the server refuses a request, or cannot be reached after several tries.
    """
    limit = asyncio.Semaphore(sampling.concurrency)
    headers = {"Authorization": f"Bearer {sampling.key}"} if sampling.key else {}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=3600)) as session:

        async def one(prompt: Any) -> list[str]:
            async with limit:
                answer = await _post(session, f"{sampling.url}/v1/chat/completions", sampling.body(prompt))
            return [choice["message"]["content"] for choice in answer["choices"] if choice["finish_reason"] == "stop"]

        return list(await asyncio.gather(*map(one, prompts)))


async def _post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
    for attempt in range(TRIES):
        try:
            async with session.post(url, json=body) as response:
                if response.status < 400:
                    return await response.json()
                if response.status < 500:
                    raise ValueError(f"{url}: status {response.status}: {await response.text()}")
                problem = f"status {response.status}"
        except aiohttp.ClientConnectionError as error:
            problem = str(error)
        await asyncio.sleep(2.0**attempt)
    raise ValueError(f"{url}: no answer after {TRIES} tries: {problem}")


def add_traces(rows: list[dict[str, Any]], teacher: str, sampling: Sampling, verifier: Verifier | None) -> None:
    """Give each row that lacks one a trace of the teacher: its first right response; without a verifier, its first."""
    waiting = [row for row in rows if teacher not in row.get("traces", {})]
    responses = asyncio.run(ask([row["prompt"] for row in waiting], sampling))
    pairs = [(text, row["answer"]) for row, texts in zip(waiting, responses, strict=True) for text in texts]
    verdicts = iter(verifier.verify(pairs) if verifier else [])
    for row, texts in zip(waiting, responses, strict=True):
        accepted = [text for text in texts if verifier is None or next(verdicts).is_correct]
        if accepted:
            row.setdefault("traces", {})[teacher] = accepted[0]


def unfinished_rows(source: Path, out: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of ``source`` that ``out`` does not hold yet. A last row that ``out`` holds in part is removed."""
    done = 0
    if out.exists():
        whole = out.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        out.write_bytes(whole)
        done = whole.count(b"\n")
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number >= done:
                yield json.loads(line)


def main(
    source: Annotated[Path, typer.Argument(help="JSONL file with the fields prompt and answer.")],
    out: Annotated[Path, typer.Argument(help="JSONL file to write, or to go on with.")],
    url: Annotated[str, typer.Option(help="The teacher's SGLang server, http://HOST:PORT.")],
    teacher: Annotated[str, typer.Option(help="Name of the teacher in `traces`.")],
    verifier: Annotated[str, typer.Option(help="As grading.verifier; 'none' keeps the first response.")] = "math",
    attempts: Annotated[int, typer.Option(min=1, help="Responses for each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 8192,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts in flight.")] = 64,
    key_env: Annotated[str, typer.Option(help="Environment variable with the API key.")] = "DYPO_SGLANG_API_KEY",
) -> None:
    """Add a teacher's traces to a prompt file."""
    sampling = Sampling(
        url=url.rstrip("/"),
        attempts=attempts,
        temperature=temperature,
        max_tokens=max_tokens,
        concurrency=concurrency,
        key=os.environ.get(key_env),
    )
    rows, num_rows, num_traces = unfinished_rows(source, out), 0, 0
    with out.open("a", encoding="utf-8") as file, Verifier(GradingConfig(verifier=_judge(verifier))) as judge:
        while chunk := [row for _, row in zip(range(CHUNK), rows, strict=False)]:
            add_traces(chunk, teacher, sampling, None if verifier == "none" else judge)
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chunk)
            file.flush()
            num_rows += len(chunk)
            num_traces += sum(teacher in row.get("traces", {}) for row in chunk)
            print(f"{num_rows} rows written, {num_traces} with a trace of {teacher}", flush=True)


def _judge(verifier: str) -> str:
    """Return the verifier to start; with 'none' it judges nothing."""
    return "exact" if verifier == "none" else verifier


if __name__ == "__main__":
    try:
        typer.run(main)
    except ValueError as error:
        sys.exit(f"error: {error}")
