"""Estimate the seconds of a round of collection, and the tokens that it discards. Pure arithmetic.

A round has ``rollout.prompts_per_round`` prompts. If a stream collects (``rollout.oversample`` above 1, or ``mode:
async``), it has the prompts of a rollout batch instead. While requests wait, each server runs as many as its KV cache
and the clients allow; after that the number of running requests falls.

Without oversampling a round ends with its last group, whose longest response is assumed to reach the limit. With it,
``oversample`` times the groups are started, and the round ends when enough of them are complete
(``rollout/stream.py``). Lengths are assumed to be exponential with mean r. Then the share s of groups of k responses is
complete after −r·ln(1 − s^(1/k)) tokens (at least r, at most the limit). Responses still in flight have about r tokens
each. A synchronous loop aborts them; an asynchronous loop keeps them for the next round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.planning.lengths import survival
from megatron_dypo.planning.serving import Server, decode_step_s, make_server, prefill_s
from megatron_dypo.planning.setting import Setting

_POINTS = 32
"""Places at which the falling number of requests is looked at."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round, over all servers."""

    prompts: float
    """Prompts whose groups the round completes."""
    seconds: float
    aborted: float
    """Tokens of aborted responses."""


def rollout_round(setting: Setting) -> Round:
    """Return a round of the setting's loop; it takes no time if the objective samples no rollouts."""
    cfg, server, assumed = setting.config.rollout, make_server(setting), setting.assumed
    prompts, response, size = _prompts(setting), assumed.response_tokens, setting.group.rollouts
    if not size:
        return Round(prompts=prompts, seconds=0.0, aborted=0.0)
    requests = prompts * size / setting.num_servers
    begun = requests * cfg.oversample
    allowed = min(begun, cfg.max_in_flight * setting.data / setting.num_servers)
    batch = max(1.0, min(allowed, server.concurrency(assumed.prompt_tokens + response / 2)))
    done = max(0.0, min(begun - batch, requests))  # while the batch is full
    drain = drain_tokens(cfg, response, (requests - done) / batch, size)
    full_s = done * response / batch * decode_step_s(setting, server, batch)
    drain_s = _drain_seconds(setting, server, batch, drain)
    started = min(begun, done + batch)
    # The responses of a group share their prompt's prefix.
    seconds = full_s + drain_s + prefill_s(setting, started / size * assumed.prompt_tokens)
    is_kept = cfg.mode == "async"
    return Round(
        prompts=prompts,
        seconds=seconds * requests / started if is_kept else seconds,
        aborted=0.0 if is_kept else (started - requests) * response * setting.num_servers,
    )


def _drain_seconds(setting: Setting, server: Server, batch: float, drain: float) -> float:
    """Return the seconds of ``drain`` decoding steps in which the running requests end one after the other.

    Their number falls as the share of longer responses does, and their contexts grow. An asynchronous stream starts new
    requests as long as it has groups to start.
    """
    cfg, assumed = setting.config.rollout, setting.assumed
    limit = max(cfg.max_new_tokens, assumed.response_tokens, drain)
    least = 1 - 1 / cfg.oversample if cfg.mode == "async" else 0.0
    seconds = 0.0
    for point in range(_POINTS):
        tokens = (point + 0.5) / _POINTS * drain
        running = max(1.0, batch * max(least, survival(assumed.response_tokens, limit, tokens)))
        context = assumed.prompt_tokens + (assumed.response_tokens / 2 if least else tokens)
        seconds += decode_step_s(setting, server, running, context) * drain / _POINTS
    return seconds


def _prompts(setting: Setting) -> float:
    cfg = setting.config.rollout
    if cfg.uses_stream:
        return setting.config.batching.prompts_per_batch / setting.group.learned
    return cfg.prompts_per_round


def drain_tokens(cfg: RolloutConfig, response: float, share: float, size: int) -> float:
    """Return the decoding steps from the last full batch until ``share`` of it is done in whole groups of ``size``."""
    longest = max(cfg.max_new_tokens, response)
    if cfg.oversample == 1 or share >= 1:
        return longest
    return min(longest, max(response, -response * math.log1p(-(share ** (1 / size)))))
