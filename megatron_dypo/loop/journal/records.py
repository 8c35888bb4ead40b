"""The records of a journal as bytes: arrays of groups as safetensors, everything else as JSON. No pickle."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from megatron_dypo.json_text import parse_json
from megatron_dypo.types import GradedGroup, Prompt, Rollout, RolloutGroup, Tier, Tokens, Verdict

Decode: TypeAlias = Callable[[Tokens], str]
"""Token ids → the text of a rollout."""
_JSON, _GROUP = b"J", b"G"


@dataclass(frozen=True, kw_only=True)
class Start:
    """The first record of a file."""

    setting: str
    """Digest of everything in the configuration and the data that decides a group."""
    replicas: int
    """Replicas of the run that wrote the file. The file has draws of one of them."""


@dataclass(frozen=True, kw_only=True)
class Logged:
    """A finished group, without its arrays and its prompt."""

    order: int
    prompt: str
    """Digest of the prompt's tokens."""
    weights: Mapping[int, str]
    """Every version that sampled a token → the digest of those weights."""
    verdicts: tuple[Verdict, ...]
    trace_verdict: Verdict | None = None
    tier: Tier | None = None
    is_graded: bool
    """Whether the verdicts are all there are to give."""

    @property
    def newest(self) -> int:
        """The newest version that sampled one of its tokens."""
        return max(self.weights)

    @property
    def oldest(self) -> int:
        """The oldest version that sampled one of its tokens."""
        return min(self.weights)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The verdicts on the last group of a draw that was logged before it had any."""

    order: int
    verdicts: tuple[Verdict, ...]
    trace_verdict: Verdict | None
    tier: Tier | None


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Groups that one look of a collection took from the stream."""

    step: int
    look: int
    orders: tuple[int, ...] = field(default=())
    weights: str
    """Digest of the weights that collected."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A pass for log-probs over everything that waited, in the middle of a collection."""

    step: int
    look: int
    """The look that it came after."""


@dataclass(frozen=True, kw_only=True)
class Complete:
    """Says which groups one replica took in a whole collection."""

    step: int
    orders: tuple[int, ...]
    replica: int
    replicas: int
    """Replicas that collected."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """Says that servers are about to get weights, so that all collections by earlier weights are over."""

    version: int


@dataclass(frozen=True, kw_only=True)
class Void:
    """Says that the records of collections before it count no longer, from this step on."""

    step: int


Plain: TypeAlias = "Start | Judged | Taken | Passed | Complete | Served | Void"
"""A record without arrays."""
Record: TypeAlias = "Logged | Plain"
Listed: TypeAlias = "Taken | Passed | Complete | Served | Void"
"""A record about collections."""
_KINDS: Mapping[str, type[Plain]] = {
    kind.__name__: kind for kind in (Start, Judged, Taken, Passed, Complete, Served, Void)
}


def prompt_digest(tokens: Tokens) -> str:
    """Return the digest of a prompt's tokens."""
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()[:32]


def versions_of(rollouts: Sequence[Rollout]) -> set[int]:
    """Return every version that sampled one of the tokens."""
    return {version for one in rollouts for version in (one.policy_version, *(v for v, _ in one.version_spans))}


def dump(record: Plain) -> bytes:
    """Return a record without arrays as bytes."""
    return _JSON + json.dumps({"kind": type(record).__name__, **vars(record)}, default=_plain).encode()


def logged_of(group: RolloutGroup | GradedGroup, weights: Mapping[int, str]) -> Logged:
    """Return the record of a finished group; ``weights`` has the digest of every version in it."""
    graded = group if isinstance(group, GradedGroup) else None
    return Logged(
        order=group.prompt.order,
        prompt=prompt_digest(group.prompt.tokens),
        weights={version: weights[version] for version in sorted(versions_of(group.rollouts))},
        verdicts=tuple(group.verdicts),
        trace_verdict=graded.trace_verdict if graded else None,
        tier=graded.tier if graded else None,
        is_graded=graded is not None,
    )


def dump_group(logged: Logged, rollouts: Sequence[Rollout]) -> bytes:
    """Return a finished group as bytes: its record, and the arrays of its rollouts."""
    header = {
        **vars(logged),
        "rollouts": [
            {
                "length": len(one.tokens),
                "finish": one.finish,
                "policy_version": one.policy_version,
                "version_spans": one.version_spans,
                "num_forced_tokens": one.num_forced_tokens,
                "has_routes": one.routes is not None,
            }
            for one in rollouts
        ],
    }
    tensors: dict[str, npt.NDArray[Any]] = {
        "tokens": np.concatenate([one.tokens for one in rollouts]).astype(np.int32),
        "logp": np.concatenate([one.logp for one in rollouts]).astype(np.float32),
    }
    tensors |= {f"routes.{index}": one.routes for index, one in enumerate(rollouts) if one.routes is not None}
    return _GROUP + safetensors_numpy.save(tensors, metadata={"group": json.dumps(header, default=_plain)})


def load(payload: bytes) -> Record:
    """Return the record of a payload. Raises ValueError if no version of this package wrote it."""
    try:
        if payload[:1] == _GROUP:
            return _logged(_header(payload))
        stored = parse_json(payload[1:])
        kind = _KINDS[stored.pop("kind")]
        for name in ("verdicts", "trace_verdict", "tier"):
            if name in stored:
                stored[name] = _READ[name](stored[name])
        stored = {name: tuple(value) if name == "orders" else value for name, value in stored.items()}
        return kind(**stored)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"an unknown record of a journal: {error}") from error


def load_rollouts(payload: bytes, decode: Decode) -> tuple[Rollout, ...]:
    """Return the rollouts of the payload of a :class:`Logged`. Raises ValueError as :func:`load`."""
    try:
        arrays, heads = safetensors_numpy.load(payload[1:]), _header(payload)["rollouts"]
        ends = np.cumsum([0, *(head["length"] for head in heads)])
        return tuple(
            Rollout(
                tokens=(tokens := arrays["tokens"][start:end]),
                logp=arrays["logp"][start:end],
                text=decode(tokens),
                finish=head["finish"],
                policy_version=head["policy_version"],
                version_spans=tuple((version, first) for version, first in head["version_spans"]),
                num_forced_tokens=head["num_forced_tokens"],
                # A journal of an earlier version has none.
                routes=arrays[f"routes.{index}"] if head.get("has_routes") else None,
            )
            for index, (head, (start, end)) in enumerate(zip(heads, itertools.pairwise(ends), strict=True))
        )
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"an unknown record of a journal: {error}") from error


def as_group(logged: Logged, rollouts: tuple[Rollout, ...], prompt: Prompt) -> RolloutGroup | GradedGroup:
    """Return the group of a draw as it was logged."""
    if not logged.is_graded:
        return RolloutGroup(prompt=prompt, rollouts=rollouts, verdicts=logged.verdicts)
    return GradedGroup(
        prompt=prompt,
        rollouts=rollouts,
        verdicts=logged.verdicts,
        tier=logged.tier,
        trace_verdict=logged.trace_verdict,
    )


def _header(payload: bytes) -> dict[str, Any]:
    size = int.from_bytes(payload[1:9], "little")
    header: dict[str, Any] = parse_json(parse_json(payload[9 : 9 + size])["__metadata__"]["group"])
    return header


def _logged(header: Mapping[str, Any]) -> Logged:
    return Logged(
        order=header["order"],
        prompt=header["prompt"],
        weights={int(version): digest for version, digest in header["weights"].items()},
        verdicts=_verdicts(header["verdicts"]),
        trace_verdict=_verdict(header["trace_verdict"]),
        tier=_tier(header["tier"]),
        is_graded=header["is_graded"],
    )


def _verdict(stored: Mapping[str, Any] | None) -> Verdict | None:
    return None if stored is None else Verdict(**stored)


def _verdicts(stored: Sequence[Mapping[str, Any]]) -> tuple[Verdict, ...]:
    return tuple(Verdict(**one) for one in stored)


def _tier(stored: str | None) -> Tier | None:
    return None if stored is None else Tier(stored)


_READ: Mapping[str, Callable[[Any], object]] = {"verdicts": _verdicts, "trace_verdict": _verdict, "tier": _tier}


def _plain(value: object) -> object:
    return value.value if isinstance(value, Tier) else vars(value)
