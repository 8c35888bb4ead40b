"""Compare time and peak memory of log-probs and entropy from hidden states, forward and backward, with alternatives.

    python benchmarks/logprobs.py

- ``eager``: makes the logits of all tokens, then ``log_softmax`` and ``gather``. Entropy has no gradient and needs one
  temporary.
- ``chunked``: makes and keeps the logits of all tokens. log_softmax and its gradient work on chunks of tokens, as in
  NeMo-RL's chunked log-prob function. ``chunked_response``: the same on the response tokens only.
- ``fused``: this package's function, on the response tokens only, with its default memory budget.

With ``--entropy-gradient`` the loss has an entropy bonus too, and ``eager`` and ``fused`` alone are compared: the
chunked versions have no gradient of the entropy.

Every measurement is one forward and backward pass in a fresh process. Each round measures every variant once, so that a
change of the machine's load affects all of them; medians are compared. Peak memory is the growth of the process's
maximal resident set during the pass. Inputs are in memory before it and do not count; gradients of hidden states and
weight do. The last line is one JSON object of ratios.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import measure as measuring
import torch
from torch import Tensor

from megatron_dypo.objective.fused_logprobs import fused_logprobs

CHUNK_TOKENS = 512
"""Tokens of one chunk in the variants ``chunked`` and ``chunked_response``."""


def eager(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, response: slice) -> tuple[Tensor, Tensor]:
    logp_TV = (hidden_TH @ weight_VH.t()).log_softmax(dim=-1)
    with torch.no_grad():
        entropy_T = -logp_TV.exp().mul_(logp_TV).sum(dim=-1)
    return logp_TV.gather(1, targets_T[:, None])[response, 0], entropy_T[response]


def eager_entropy(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, response: slice) -> tuple[Tensor, Tensor]:
    logp_TV = (hidden_TH @ weight_VH.t()).log_softmax(dim=-1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(dim=-1)
    return logp_TV.gather(1, targets_T[:, None])[response, 0], entropy_T[response]


def chunked(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, response: slice) -> tuple[Tensor, Tensor]:
    logp_T, entropy_T = _ChunkedLogProbs.apply(hidden_TH @ weight_VH.t(), targets_T)  # type: ignore[no-untyped-call]
    return logp_T[response], entropy_T[response]


def chunked_response(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, response: slice) -> tuple[Tensor, Tensor]:
    return chunked(hidden_TH[response], weight_VH, targets_T[response], slice(None))


def fused(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, response: slice) -> tuple[Tensor, Tensor | None]:
    return fused_logprobs(hidden_TH[response], weight_VH, targets_T[response], vocab_size=len(weight_VH))


class _ChunkedLogProbs(torch.autograd.Function):
    """Log-probs that keep the logits, and make the softmax of one chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits_TV, targets_T)
        logp, entropy = [], []
        for logits, targets in zip(logits_TV.split(CHUNK_TOKENS), targets_T.split(CHUNK_TOKENS), strict=True):
            logp_RV = logits.log_softmax(dim=-1)
            logp.append(logp_RV.gather(1, targets[:, None])[:, 0])
            entropy.append(-logp_RV.exp().mul_(logp_RV).sum(dim=-1))
        entropy_T = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy_T)
        return torch.cat(logp), entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits_TV, targets_T = ctx.saved_tensors
        grad_TV = torch.empty_like(logits_TV)
        pieces = (t.split(CHUNK_TOKENS) for t in (logits_TV, targets_T, grads[0], grad_TV))
        for logits, targets, grad, out in zip(*pieces, strict=True):
            torch.softmax(logits, dim=-1, out=out)
            out.mul_(-grad[:, None]).scatter_add_(1, targets[:, None], grad[:, None])
        return grad_TV, None


VARIANTS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "eager": eager,
    "chunked": chunked,
    "chunked_response": chunked_response,
    "fused": fused,
}
WITH_ENTROPY = {"eager": eager_entropy, "fused": fused}
"""Variants whose entropy has a gradient."""
BONUS = 0.1
"""Weight of the entropy with ``--entropy-gradient``."""


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Measure one pass in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden_TH = torch.randn(args.tokens, args.hidden)
    weight_VH = torch.randn(args.vocab, args.hidden).div_(args.hidden**0.5)
    targets_T = torch.randint(0, args.vocab, (args.tokens,))
    hidden_TH.requires_grad_()
    weight_VH.requires_grad_()
    torch.mm(torch.ones(256, 256), torch.ones(256, 256))  # starts the threads
    before, start = _peak(), time.perf_counter()
    variants = WITH_ENTROPY if args.entropy_gradient else VARIANTS
    logp, entropy = variants[name](hidden_TH, weight_VH, targets_T, slice(args.tokens - args.response, None))
    assert entropy is not None
    (logp.sum() + BONUS * entropy.sum() if args.entropy_gradient else logp.sum()).backward()
    seconds = time.perf_counter() - start
    assert weight_VH.grad is not None
    return {
        "seconds": seconds,
        "bytes": _peak() - before,
        "logp": float(logp.detach().sum()),
        "entropy": float(entropy.detach().sum()),
        "grad_norm": float(weight_VH.grad.norm()),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare(args: argparse.Namespace) -> dict[str, float]:
    """Measure each variant once a round, each time in a process of its own; return ratios of medians."""
    variants = WITH_ENTROPY if args.entropy_gradient else VARIANTS
    results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name in variants:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[name].append(json.loads(output))
    for key in ("logp", "entropy", "grad_norm"):
        values = [runs[0][key] for runs in results.values()]
        assert max(values) - min(values) <= 1e-4 * abs(values[0]), f"the variants differ in {key}: {values}"
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("seconds", "bytes")}
        for name, runs in results.items()
    }
    print(f"{args.vocab=} {args.hidden=} {args.tokens=} {args.response=} {args.threads=} {args.rounds=}")
    for name, median in medians.items():
        spread = [round(run["seconds"], 2) for run in results[name]]
        print(f"{name:17} {median['seconds']:7.2f} s {median['bytes'] / 2**20:9.0f} MiB   seconds by round {spread}")
    return {
        f"{what}_vs_{name}": round(medians["fused"][key] / medians[name][key], 4)
        for name in variants
        if name != "fused"
        for what, key in (("memory", "bytes"), ("time", "seconds"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1_024)
    parser.add_argument("--tokens", type=int, default=4_096)
    parser.add_argument("--response", type=int, default=2_048, help="how many of the tokens are response")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--entropy-gradient", action="store_true", help="add an entropy bonus to the loss")
    parser.add_argument("--smoke", action="store_true", help="one round of a tiny shape: does it run?")
    parser.add_argument("--measure", choices=VARIANTS, help="one pass in this process, as JSON")
    args = parser.parse_args()
    if args.smoke:
        args.vocab, args.hidden, args.tokens, args.response, args.rounds = 2_000, 64, 128, 64, 1
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return
    measuring.print_header()
    measuring.print_result(compare(args))


if __name__ == "__main__":
    main()
