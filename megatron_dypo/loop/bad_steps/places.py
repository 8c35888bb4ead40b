"""The first tokens of samples at which a log-prob, or an input of the loss, is not finite. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dypo.config.words import first_of
from megatron_dypo.objective.streams import Stream
from megatron_dypo.types import Floats, Sample, StreamValue

_SHOWN = 3
_MAY_BE_MISSING = "rollout_logp"
"""The stream that is NaN on forced tokens, which no server sampled."""


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """A token of a sample."""

    order: int
    member: int
    token: int
    """Index in the response, from 0."""


def bad_logprobs(samples: Sequence[Sample], logprobs: Sequence[Floats]) -> list[Place]:
    """Return the first token of each sample whose log-probs are not finite, in the order of draws and members."""
    found = []
    for sample, logp_R in zip(samples, logprobs, strict=False):
        if not np.isfinite(logp_R).all():
            found.append(_place(sample, logp_R))
    return sorted(found)


def bad_inputs(samples: Iterable[Sample], streams: Sequence[Stream]) -> dict[str, list[Place]]:
    """Return, by the name of the stream, the first token of each sample at which the loss reads no finite number."""
    found: dict[str, list[Place]] = {}
    for sample in samples:
        for stream in streams:
            value = stream.value_of(sample)
            if value is not None and not np.isfinite(values := _values(stream, value, sample)).all():
                found.setdefault(stream.name, []).append(_place(sample, values))
    return {name: sorted(places) for name, places in found.items()}


def shown(places: Sequence[Place], prompts: Mapping[int, str]) -> str:
    """Return the first place of each of the first prompts in words; ``prompts`` has the id of each draw."""
    firsts = {place.order: place for place in reversed(places)}
    return first_of([_words(firsts[order], prompts[order]) for order in sorted(firsts)], _SHOWN)


def _words(place: Place, prompt: str) -> str:
    return f"{prompt} (member {place.member}, token {place.token} of the response)"


def _values(stream: Stream, value: StreamValue, sample: Sample) -> Floats:
    values = np.broadcast_to(np.asarray(value, np.float32), (sample.num_response_tokens,)).copy()
    if stream.name == _MAY_BE_MISSING:
        values[: sample.num_forced_tokens] = 0.0
    return values


def _place(sample: Sample, values_R: Floats) -> Place:
    bad_R = np.flatnonzero(~np.isfinite(values_R))
    return Place(order=sample.order, member=sample.member, token=int(bad_R[0]))
