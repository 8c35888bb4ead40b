"""Compare the journal of rollouts with other work of a replica's leader and of a refit.

    python benchmarks/journal.py

- ``write``: :meth:`Journal.add` of groups with k = 8 rollouts of 2,048 tokens each, into a file; and
  :meth:`Journal.judge` of their verdicts. Compared with ``parse``: reading the answers of the server that hold these
  groups, as the client does: JSON, the checks of its fields, arrays. Neither decodes text.
- ``digest``: the digest of weights of 256 MiB, which a run computes at each refit. Compared with ``copy``: one copy of
  the same tensors.
- ``plain``: the same bytes as ``write``, written by one call without records, to see what the file system takes.

Every round is printed: milliseconds of the wall clock and of this process's processor time. The last line is one JSON
object: ``write_vs_parse`` and ``digest_vs_copy``, ratios of medians of the processor time; ``bytes_per_token``: size
of the file divided by the number of tokens; ``us_per_token``: microseconds of processor time of ``write`` for a token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
import torch.distributed as dist

from megatron_dypo.loop.journal.journal import Journal
from megatron_dypo.loop.journal.records import Start, dump
from megatron_dypo.loop.journal.weights import Weights, weights_digest
from megatron_dypo.loop.journal.writer import SegmentWriter
from megatron_dypo.rollout.columns import read_columns
from megatron_dypo.rollout.responses import parse_group
from megatron_dypo.rollout.sampling import Sampling
from megatron_dypo.types import GradedGroup, Prompt, RolloutGroup, Tier, Tokens, Verdict

K = 8
STOP = 2


def no_text(_tokens: Tokens) -> str:
    return ""


def make_answers(groups: int, tokens: int) -> list[bytes]:
    """Return answers of a server, each with a whole group, as its JSON."""
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(groups):
        outputs = []
        for _ in range(K):
            ids = [*rng.integers(3, 150_000, tokens - 1).tolist(), STOP]
            logp = (-rng.exponential(size=tokens)).tolist()
            outputs.append(
                {
                    "output_ids": ids,
                    "meta_info": {
                        "finish_reason": {"type": "stop", "matched": STOP},
                        "weight_version": "3",
                        "output_token_logprobs": [[one, token, None] for one, token in zip(logp, ids, strict=True)],
                    },
                }
            )
        answers.append(json.dumps(outputs, separators=(",", ":")).encode())
    return answers


def parse(answers: list[bytes], tokens: int) -> list[RolloutGroup]:
    sampling = Sampling(n=K, temperature=1.0, max_new_tokens=tokens, top_p=1.0, top_k=-1, stop_token_ids=(STOP,))
    groups = []
    for order, answer in enumerate(answers):
        prompt = Prompt(
            prompt_id=str(order),
            visit=0,
            order=order,
            tokens=np.arange(200, dtype=np.int32),
            text="",
            answer="",
            source="",
        )
        rollouts = parse_group(read_columns(answer), sampling, no_text, versions=[3])
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
    return groups


def graded(group: RolloutGroup) -> GradedGroup:
    verdicts = tuple(Verdict(is_correct=number == 0, reward=1.0) for number in range(K))
    return GradedGroup(prompt=group.prompt, rollouts=group.rollouts, verdicts=verdicts, tier=Tier.MID)


def open_(folder: Path) -> Journal:
    writer = SegmentWriter(folder, start=dump(Start(setting="", replicas=1)), limit_bytes=2**40)
    weights = Weights(digest=lambda: "", keeps=1, known={3: "0" * 32})
    return Journal(writer=writer, weights=weights, decode=no_text, max_version_lag=1)


def measured(groups: int, tokens: int, mib: int, rounds: int, folder: Path) -> dict[str, float]:
    answers = make_answers(groups, tokens)
    sampled = parse(answers, tokens)
    judged = [graded(group) for group in sampled]
    journal = open_(folder / "journal")
    layers = max(mib // 16, 1)
    weights = {f"layer.{number}": torch.randn(2**22 * min(mib, 16) // 16) for number in range(layers)}
    plain = b"\0" * (groups * K * tokens * 8)

    def write() -> None:
        for group in sampled:
            journal.add(group)
        journal.judge(judged)

    variants: dict[str, Any] = {
        "write": write,
        "parse": lambda: parse(answers, tokens),
        "digest": lambda: weights_digest(weights.items()),
        "copy": lambda: [value.clone() for value in weights.values()],
        "plain": lambda: (folder / "plain").write_bytes(plain),
    }
    wall, cpu = measure.interleaved(variants, rounds)
    for name in variants:
        shown = ", ".join(f"{1e3 * a:.1f} ({1e3 * b:.1f})" for a, b in zip(wall[name], cpu[name], strict=True))
        print(f"{name:>7}: {shown} ms", flush=True)
    median = {name: statistics.median(values) for name, values in cpu.items()}
    size, written = journal.writer.size, rounds * groups * K * tokens
    return {
        "write_vs_parse": round(median["write"] / median["parse"], 4),
        "digest_vs_copy": round(median["digest"] / median["copy"], 2),
        "bytes_per_token": round(size / written, 2),
        "us_per_token": round(1e6 * median["write"] / (groups * K * tokens), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny size")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    measure.print_header()
    groups, tokens, mib = (2, 16, 1) if options.smoke else (16, 2048, 256)
    with tempfile.TemporaryDirectory() as folder:
        result = measured(groups, tokens, mib, 2 if options.smoke else options.rounds, Path(folder))
    measure.print_result(result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
