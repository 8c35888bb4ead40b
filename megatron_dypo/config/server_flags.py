"""Flags of SGLang in ``rollout.servers.extra_args``: those that the run sets, and those that a refit cannot serve.

The settings behind the flags are also read from running servers (``/server_info``), whose flags nobody here has seen.
Source: SGLang 0.5.23, ``srt/arg_groups/fields`` and ``srt/model_executor/model_runner_components/weight_updater.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dypo.config.unsafe_flags import UNSAFE_FLAGS

_OWN_FLAGS = {
    "--model-path": "model.hf_path",
    "--model": "model.hf_path",
    "--dtype": "model.dtype",
    "--random-seed": "run.seed",
    "--host": "rollout.servers.host",
    "--port": "rollout.servers.port",
    "--tp-size": "rollout.servers.tensor_parallel",
    "--tensor-parallel-size": "rollout.servers.tensor_parallel",
    "--base-gpu-id": "rollout.servers.base_gpu",
    "--mem-fraction-static": "rollout.servers.mem_fraction",
    "--max-total-tokens": "rollout.servers.max_total_tokens",
    "--api-key": "the environment variable that rollout.servers.api_key_env names",
    "--config": None,
    "--skip-tokenizer-init": None,
    "--custom-weight-loader": None,
    "--weight-version": None,
}
"""Flags of SGLang that a run sets, each with the key to use instead; None: no key sets it."""

ROUTES_FLAG = "--enable-return-routed-experts"
"""Flag with which a server can return the experts that it chose."""
ROUTES_SETTING = "enable_return_routed_experts"
"""Its name in the answer to ``/server_info``."""

SEEDS_SETTING = "enable_deterministic_inference"
"""Name, in the same answer, of the setting with which a server samples each request with the seed that it names."""

ATTENTION_COPIES = ("--attn-dp-size", "--attention-data-parallel-size")
"""Names of the flag for the number of copies of attention (attention data parallelism)."""
REPLICAS = ("--dp-size", "--data-parallel-size")
"""Names of the flag for the number of replicas; with :data:`SPREAD_ATTENTION`, of copies of attention."""
SPREAD_ATTENTION = "--enable-dp-attention"

_WHOLE_FLAGS = ("--ep", "--ssl-keyfile")
"""Flags of SGLang that other flags begin with."""

PLANNED = ("p2p", "local")
"""Transports that send each server rank the slices that it holds, by a plan of where they are."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A setting of a server that a refit cannot serve."""

    name: str
    """Name in the answer to ``/server_info``."""
    flags: tuple[str, ...]
    reason: str
    plain: tuple[object, ...] = (None, False, 0, 1)
    """Values that a refit can serve. Texts are compared in lower case."""
    planned_only: bool = False
    """Whether SGLang's own updates (``broadcast``, ``disk``) serve it."""

    def is_plain(self, value: object) -> bool:
        """Return whether a refit can serve this value; a text of a flag counts as the number that it is."""
        plain = {str(one).lower() for one in self.plain}
        return str(value).lower() in plain

    def refuses(self, transport: str) -> bool:
        """Return whether refits by ``transport`` cannot serve the setting; ``auto`` takes a transport that can."""
        return not self.planned_only or transport in PLANNED

    def rule(self) -> str:
        """Return the reason, and the way out if there is one."""
        return f"{self.reason}; use refit.transport=broadcast or disk" if self.planned_only else self.reason


_MOVING = "the plan of p2p and local knows no experts that move, or that several ranks hold"
_SLICES = "the plan of p2p and local knows no division of layers but those of --tp-size, --ep-size and --attn-dp-size"

SETTINGS: tuple[Setting, ...] = (
    Setting(
        name="weight_cache_mode",
        flags=("--weight-cache-mode",),
        plain=(None, "off"),
        reason="SGLang refuses new weights while its weight cache is active",
    ),
    Setting(
        name="speculative_algorithm",
        flags=("--speculative-algorithm",),
        plain=(None, "ngram"),
        reason="a refit brings no weights to a draft model, which would guess for the first policy; ngram has none",
    ),
    Setting(
        name="speculative_draft_model_path",
        flags=("--speculative-draft-model-path", "--speculative-draft-model"),
        plain=(None,),
        reason="a refit brings no weights to a draft model, which would guess for the first policy",
    ),
    Setting(
        name="attn_cp_size",
        flags=("--attn-cp-size", "--attention-context-parallel-size"),
        reason=_SLICES,
        planned_only=True,
    ),
    Setting(name="dcp_size", flags=("--dcp-size", "--decode-context-parallel-size"), reason=_SLICES, planned_only=True),
    Setting(name="moe_dp_size", flags=("--moe-dp-size", "--moe-data-parallel-size"), reason=_SLICES, planned_only=True),
    Setting(
        name="moe_a2a_backend",
        flags=("--moe-a2a-backend",),
        plain=(None, "none", "deepep", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer"),
        reason="the plan of p2p and local knows not how this backend holds experts",
        planned_only=True,
    ),
    Setting(name="dwdp_size", flags=("--dwdp-size",), reason=_SLICES, planned_only=True),
    Setting(name="enable_eplb", flags=("--enable-eplb",), reason=_MOVING, planned_only=True),
    Setting(name="ep_num_redundant_experts", flags=("--ep-num-redundant-experts",), reason=_MOVING, planned_only=True),
    Setting(
        name="init_expert_location",
        flags=("--init-expert-location",),
        plain=(None, "trivial"),
        reason=_MOVING,
        planned_only=True,
    ),
    Setting(
        name="elastic_ep_backend",
        flags=("--elastic-ep-backend",),
        plain=(None, "none"),
        reason=_MOVING,
        planned_only=True,
    ),
)
"""Settings of servers that refits cannot serve."""


def require_free_flags(extra_args: Sequence[str]) -> None:
    """Require SGLang's arguments to repeat no flag that the run sets, and to name none of :data:`UNSAFE_FLAGS`.

    Shortened flags count too, since argparse accepts them. An error does not show the value.
    """
    for flag, _ in _flags(extra_args):
        own = [name for name in _OWN_FLAGS if _means(flag, name)]
        if own:
            key = _OWN_FLAGS[own[0]]
            advice = f"use {key} instead" if key else "leave it out, the run sets it"
            raise ValueError(f"extra_args={flag!r}: {advice}")
        for name, reason in UNSAFE_FLAGS.items():
            if _means(flag, name):
                raise ValueError(f"extra_args={flag!r}: {reason}")


def require_refittable(extra_args: Sequence[str], transport: str) -> None:
    """Require servers with these arguments to take new weights by ``refit.transport``.

    Raises:
        ValueError: names the flag with its value, and why refits cannot serve it.
    """
    for flag, value in _flags(extra_args):
        for setting in SETTINGS:
            named = any(_means(flag, name) for name in setting.flags)
            if named and setting.refuses(transport) and not setting.is_plain(value):
                shown = flag if value is True else f"{flag} {value}"
                raise ValueError(f"rollout.servers.extra_args={shown!r}: refits cannot serve it: {setting.rule()}")


def value_of(extra_args: Sequence[str], *names: str) -> str | bool | None:
    """Return the value of a flag that has these names: a text, True for a flag alone, None if it is not there. The last
    one counts, as for argparse."""
    found: str | bool | None = None
    for flag, value in _flags(extra_args):
        if any(_means(flag, name) for name in names):
            found = value
    return found


def spreads_attention(extra_args: Sequence[str]) -> bool:
    """Return whether a server's ranks attend to requests of their own (attention data parallelism)."""
    copies = value_of(extra_args, *ATTENTION_COPIES)
    return str(copies or 1) != "1" or value_of(extra_args, SPREAD_ATTENTION) is not None


def settings_of(server_info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a running server that refits cannot serve by some transport, by name."""
    return {
        setting.name: server_info[setting.name]
        for setting in SETTINGS
        if setting.name in server_info and not setting.is_plain(server_info[setting.name])
    }


def problem_of(settings: Mapping[str, Any], transport: str) -> str | None:
    """Return the first of a server's :func:`settings_of` that refits by ``transport`` cannot serve; None: they can."""
    for setting in SETTINGS:
        if setting.name in settings and setting.refuses(transport):
            return f"{setting.name}={settings[setting.name]!r}: {setting.rule()}"
    return None


def _flags(extra_args: Sequence[str]) -> Iterator[tuple[str, str | bool]]:
    """Yield each flag with its value: ``--flag value``, ``--flag=value`` or ``--flag``, in one argument or in two."""
    words = [word for argument in extra_args for word in argument.strip().split(" ", 1)]
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        if word.startswith("--"):
            flag, separator, value = word.partition("=")
            yield flag, value if separator else (True if following.startswith("--") else following)


def _means(flag: str, name: str) -> bool:
    """Return whether argparse may take ``flag`` for ``name``."""
    return flag == name or (len(flag) > 2 and flag not in _WHOLE_FLAGS and name.startswith(flag))
