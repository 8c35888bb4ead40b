"""Random groups and batches for the tests of the objective."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_dypo.objective.loss import LossInputs
from megatron_dypo.objective.streams import STREAMS
from megatron_dypo.types import Sample, SampleKind, Totals, Treatment


def loss_inputs(
    num_tokens: int, *, sequence: Any = None, num_sequences: int | None = None, **streams: Any
) -> LossInputs:
    """Return float64 streams of the loss. Streams that are not given are zero; all tokens are one sequence."""
    zeros = {stream.name: [0.0] * num_tokens for stream in STREAMS}
    tensors = {k: torch.as_tensor(v, dtype=torch.float64) for k, v in {**zeros, **streams}.items()}
    tensors["is_trace"] = tensors["is_trace"].bool()
    index = torch.as_tensor([0] * num_tokens if sequence is None else sequence).long()
    count = int(index.max()) + 1 if num_tokens else 0
    return LossInputs(streams=tensors, sequence=index, num_sequences=num_sequences or count)


def totals_of(groups: Sequence[Sequence[Sample]]) -> Totals:
    """Return counts over whole groups, as the trainer makes them."""
    by_kind = {kind: [s for g in groups for s in g if s.kind is kind] for kind in SampleKind}
    return Totals(
        num_prompts=len(groups),
        num_sequences={kind: len(samples) for kind, samples in by_kind.items()},
        num_response_tokens={kind: sum(s.num_response_tokens for s in samples) for kind, samples in by_kind.items()},
    )


def random_groups(
    seed: int, *, num_hard: int = 2, num_mid: int = 3, group_size: int = 4, vocab: int = 50, max_response: int = 9
) -> list[list[Sample]]:
    """Draw ``num_hard`` traces, and ``num_mid`` groups with at least one success and one failure each."""
    rng = np.random.default_rng(seed)
    groups = []
    for order in range(num_hard + num_mid):
        prompt = rng.integers(3, vocab, rng.integers(2, 6)).astype(np.int32)
        is_mid = order >= num_hard
        correct = rng.permutation(group_size) % 2 == 0
        members = []
        for member in range(group_size if is_mid else 1):
            length = int(rng.integers(1, max_response))
            logps = (rng.normal(-2, 0.5, length).astype(np.float32) for _ in range(3))
            rollout_logp, old_logp, ref_logp = logps if is_mid else (None, None, None)
            response = rng.integers(3, vocab, length).astype(np.int32)
            members.append(
                Sample(
                    order=order,
                    member=member,
                    treatment=Treatment.REINFORCE if is_mid else Treatment.DISTILL,
                    kind=SampleKind.ROLLOUT if is_mid else SampleKind.TRACE,
                    tokens=np.concatenate([prompt, response]),
                    num_prompt_tokens=len(prompt),
                    policy_version=0,
                    is_correct=bool(is_mid and correct[member]),
                    reward=float(is_mid and correct[member]) + (0.1 * member if is_mid else 0.0),
                    rollout_logp=rollout_logp,
                    old_logp=old_logp,
                    ref_logp=ref_logp,
                )
            )
        groups.append(members)
    return groups
