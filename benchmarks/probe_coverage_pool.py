"""Rollouts of ``probe_coverage.py`` and their whole gradients, by transformers and torch alone.

Nothing here uses Megatron, a projection or the package's own objective: the two losses are written out, and autograd
differentiates them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dypo.grading.exact import verify_exact
from megatron_dypo.metrics.progress import progress

EPSILON, CLIP, BETA = 1e-6, 0.2, 1.0
PROMPTS_AT_A_TIME = 16
PAIRS = {"grpo": (0, 0), "gal": (1, 1), "both": (0, 1)}


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The rollouts of one prompt, in groups of k in their order."""

    prompt_id: str
    prompt: list[int]
    responses: list[list[int]]
    """Token ids, with the end token unless the response was cut off."""
    correct: list[bool]

    def mid_groups(self, size: int) -> Iterator[int]:
        """Yield the index of each group with correct and wrong rollouts."""
        for group in range(len(self.correct) // size):
            if 0 < sum(self.correct[group * size : (group + 1) * size]) < size:
                yield group


@dataclass(frozen=True, kw_only=True)
class Folders:
    """The policy and the frozen reference, as HF folders, and the prompts."""

    model: Path
    reference: Path
    data: Path


def load_model(folder: Path) -> Any:
    """Return the transformers model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def draw(folders: Folders, *, prompts: int, rollouts: int, new_tokens: int, seed: int, parity: bool) -> list[Rollouts]:
    """Sample at temperature 1 and judge.

    Args:
        parity: call a response correct if the sum of its token ids is odd. A model with random weights cannot add.
    """
    torch.manual_seed(seed)
    model = load_model(folders.model)
    tokenizer = AutoTokenizer.from_pretrained(folders.model, padding_side="left")
    end = int(model.generation_config.eos_token_id)
    with folders.data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(prompts), file, strict=False)]
    found = []
    with progress(len(rows), "rollouts", "prompts") as bar:
        for first in range(0, len(rows), PROMPTS_AT_A_TIME):
            part = rows[first : first + PROMPTS_AT_A_TIME]
            texts = [row["prompt"] for row in part]
            inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            tokens = model.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=True, temperature=1.0,
                top_k=0, top_p=1.0, max_new_tokens=new_tokens, num_return_sequences=rollouts, pad_token_id=end,
            )[:, inputs.input_ids.shape[1] :].tolist()  # fmt: skip
            for index, row in enumerate(part):
                own = [_until(response, end) for response in tokens[index * rollouts : (index + 1) * rollouts]]
                correct = [
                    sum(response) % 2 == 1 if parity else _is_correct(tokenizer, response, end, row["answer"])
                    for response in own
                ]
                ids = tokenizer.encode(row["prompt"], add_special_tokens=False)
                found.append(Rollouts(prompt_id=row["id"], prompt=ids, responses=own, correct=correct))
            bar.update(len(part))
    return found


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _is_correct(tokenizer: Any, response: list[int], end: int, answer: str) -> bool:
    """Judge as the quickstart does: a response that was cut off is wrong."""
    return response[-1] == end and verify_exact(tokenizer.decode(response[:-1]), answer)


def save_pool(pool: list[Rollouts], path: Path) -> None:
    path.write_text(json.dumps([asdict(one) for one in pool]), encoding="utf-8")


def read_pool(path: Path) -> list[Rollouts]:
    return [Rollouts(**one) for one in json.loads(path.read_text(encoding="utf-8"))]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums over all Mid groups of the pool; the gradients of the other groups are zero."""

    groups: int
    mid: int
    square: dict[str, float]
    """Σ |g|²; of ``both``: Σ ⟨g_GRPO, g_GAL⟩."""
    mean: dict[str, float]
    """|Σ g|²; of ``both``: ⟨Σ g_GRPO, Σ g_GAL⟩."""

    def variances(self, scope: str) -> dict[str, float]:
        """Return E[gg'] − E[g]E[g'] over all groups, or over the Mid groups."""
        count = self.mid if scope == "mid" else self.groups
        return {pair: self.square[pair] / count - self.mean[pair] / count**2 for pair in PAIRS}


def whole_gradients(folders: Folders, pool: list[Rollouts], group_size: int) -> Sums:
    """Differentiate both losses of every Mid group."""
    model, reference = load_model(folders.model), load_model(folders.reference)
    parameters = list(model.parameters())
    total: list[Tensor] = [torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64) for _ in range(2)]
    square = dict.fromkeys(PAIRS, 0.0)
    groups = [(one, group) for one in pool for group in one.mid_groups(group_size)]
    with progress(len(groups), "whole gradients", "Mid groups") as bar:
        for one, group in groups:
            own = slice(group * group_size, (group + 1) * group_size)
            losses = _losses(model, reference, one.prompt, one.responses[own], torch.tensor(one.correct[own]))
            gradients = [
                torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)])
                for loss in losses
            ]
            for pair, (a, b) in PAIRS.items():
                square[pair] += float(torch.dot(gradients[a].double(), gradients[b].double()))
            for sum_, gradient in zip(total, gradients, strict=True):
                sum_ += gradient
            bar.update(1)
    return Sums(
        groups=sum(len(one.correct) // group_size for one in pool),
        mid=len(groups),
        square=square,
        mean={pair: float(torch.dot(total[a], total[b])) for pair, (a, b) in PAIRS.items()},
    )


def _losses(
    model: Any, reference: Any, prompt: list[int], responses: list[list[int]], correct_G: Tensor
) -> tuple[Tensor, Tensor]:
    """Return L_GRPO and L_GAL of one group at θ = θ_old, with ``length_normalization: sequence_mean``."""
    logp_GT, is_response_GT = _logprobs(model, prompt, responses)
    with torch.no_grad():
        reference_GT, _ = _logprobs(reference, prompt, responses)
    length_G = is_response_GT.sum(dim=1)
    reward_G = correct_G.float()
    advantage_G1 = ((reward_G - reward_G.mean()) / (reward_G.std() + EPSILON))[:, None]
    ratio_GT = torch.exp(logp_GT - logp_GT.detach())
    clipped_GT = ratio_GT.clamp(1 - CLIP, 1 + CLIP)
    surrogate_GT = torch.minimum(ratio_GT * advantage_G1, clipped_GT * advantage_G1)
    grpo = -((surrogate_GT * is_response_GT).sum(dim=1) / length_G).mean()
    scaled_G = ((logp_GT - reference_GT) * is_response_GT).sum(dim=1) / length_G
    margin_SF = scaled_G[correct_G][:, None] - scaled_G[~correct_G][None, :]
    return grpo, -logsigmoid(BETA * margin_SF).mean()


def _logprobs(model: Any, prompt: list[int], responses: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return [G, T] log-probs of the response tokens and the mask of those that exist; padding is on the right."""
    longest = max(map(len, responses))
    tokens_GL = torch.tensor([prompt + response + [0] * (longest - len(response)) for response in responses])
    logits_GLV = model(input_ids=tokens_GL, use_cache=False).logits
    logp_GLV = torch.log_softmax(logits_GLV[:, len(prompt) - 1 : -1].float(), dim=-1)
    logp_GT = logp_GLV.gather(2, tokens_GL[:, len(prompt) :, None])[..., 0]
    return logp_GT, torch.arange(longest) < torch.tensor([[len(response)] for response in responses])


def is_mid(pool: list[Rollouts], group_size: int) -> NDArray[np.bool_]:
    """Return whether each rollout of the pool, in order, is in a Mid group."""
    flags = []
    for one in pool:
        mid = set(one.mid_groups(group_size))
        flags += [index // group_size in mid for index in range(len(one.correct))]
    return np.array(flags)
