"""Lengths of sequences against the model's positions and the servers' limits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.metrics.findings import Findings
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.hf.rope_scaling import LinearRopeScaling
from megatron_dypo.objective.recipes.registry import build_objective

_SERVER_RESERVE = 6
"""Tokens of its KV cache that SGLang never gives to a request (``tp_worker.py``: max_req_input_len)."""
_CONTEXT_FLAG = "--context-length"


@dataclass(frozen=True, kw_only=True)
class Longest:
    """Lengths of the longest prompt and trace that a run uses; None if not every row was looked at."""

    prompt: int | None = None
    held_out: int | None = None
    """Length of the longest prompt in the evaluation sets."""
    trace: int | None = None


def check_lengths(config: Config, arch: Architecture, longest: Longest, found: Findings) -> None:
    """Compare prompt + response and prompt + trace with ``max_position_embeddings`` and the servers' limits.

    SGLang refuses a request whose prompt and ``max_new_tokens`` together exceed its context length, and truncates
    responses when its KV cache is full. It is a problem if no response fits into a limit, and a note if only those to
    long prompts do not.
    """
    prompt, prompt_words = _limit(config.data.max_prompt_tokens, longest.prompt, "data.max_prompt_tokens", "prompt")
    trace, trace_words = _limit(config.data.max_trace_tokens, longest.trace, "data.max_trace_tokens", "trace")
    positions = _trained_positions(arch)
    if prompt + trace > positions and longest.trace != 0:
        found.notes.append(
            f"{prompt_words} + {trace_words} = {prompt + trace}: exceeds max_position_embeddings={positions} of "
            f"{config.model.hf_path}/config.json: the model was never trained on positions that far"
        )
    if not asks_servers(config):
        return
    if config.eval.sets and longest.held_out is not None and longest.prompt is not None:
        prompt = max(prompt, min(longest.held_out, config.data.max_prompt_tokens))
        prompt_words = f"the longest prompt ({prompt} tokens)"
    limits = [_context_limit(config, _served_positions(arch)), _cache_limit(config)]
    for limit in (limit for limit in limits if limit is not None):
        _check_response(config, limit, prompt, prompt_words, found)


def _trained_positions(arch: Architecture) -> int:
    """Return the length of the longest sequence that the model supports, scaling included."""
    return arch.num_positions


def _served_positions(arch: Architecture) -> int:
    """Return SGLang's default context length (``get_context_length``). Only linear scaling makes it longer."""
    return arch.num_positions if isinstance(arch.rope_scaling, LinearRopeScaling) else arch.max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class _Limit:
    tokens: int
    """Most tokens of prompt and response together."""
    words: str
    consequence: str
    is_certain: bool
    """Whether the servers certainly have this limit; servers that others started may have another."""


def _limit(configured: int, actual: int | None, key: str, noun: str) -> tuple[int, str]:
    if actual is None or actual >= configured:
        return configured, f"{key}={configured}"
    return actual, f"the longest {noun} ({actual} tokens)"


def _check_response(config: Config, limit: _Limit, prompt: int, prompt_words: str, found: Findings) -> None:
    new = config.rollout.max_new_tokens
    if prompt + new <= limit.tokens:
        return
    text = f"rollout.max_new_tokens={new} + {prompt_words} = {prompt + new}: exceeds {limit.words}"
    if new >= limit.tokens and limit.is_certain:
        # Not even an empty prompt leaves room.
        found.problems.append(f"rollout.max_new_tokens={new}: must be below {limit.words}: {limit.consequence}")
    else:
        found.notes.append(f"{text}: {limit.consequence}")


def _context_limit(config: Config, positions: int) -> _Limit:
    servers = config.rollout.servers
    given = _context_length(servers)
    words = f"max_position_embeddings={positions} of {config.model.hf_path}/config.json"
    if given is not None:
        words = f"{_CONTEXT_FLAG} {given} of rollout.servers.extra_args"
    return _Limit(
        tokens=positions if given is None else given,
        words=words,
        consequence="SGLang refuses every request whose prompt and response together may become longer",
        is_certain=not servers.urls,
    )


def _cache_limit(config: Config) -> _Limit | None:
    servers = config.rollout.servers
    if servers.max_total_tokens is None or servers.urls:
        return None
    return _Limit(
        tokens=servers.max_total_tokens - _SERVER_RESERVE,
        words=f"rollout.servers.max_total_tokens={servers.max_total_tokens} (of which SGLang keeps {_SERVER_RESERVE})",
        consequence="SGLang truncates responses when its KV cache is full",
        is_certain=True,
    )


def _context_length(servers: ServersConfig) -> int | None:
    """Return the value of ``--context-length`` among SGLang's arguments, which may be written ``--flag=N``, ``--flag
    N`` or as two arguments."""
    words = [word for argument in servers.extra_args for word in argument.replace("=", " ", 1).split()]
    values = [value for flag, value in itertools.pairwise(words) if _is_context_flag(flag)]
    return int(values[-1]) if values and values[-1].isdecimal() else None


def _is_context_flag(flag: str) -> bool:
    # argparse accepts a shortened flag.
    return flag.startswith("--context") and _CONTEXT_FLAG.startswith(flag)


def asks_servers(config: Config) -> bool:
    """Return whether any step or evaluation of the run asks a server."""
    if config.eval.sets:
        return True
    try:
        objective = build_objective(config.objective)
    except ValueError:
        return False  # a problem already
    return any(objective.needs_rollouts(step) for step in range(config.run.steps))
