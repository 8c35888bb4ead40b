"""Everything beside the checkpoint that decides the steps of a run, as a checkpoint stores it.

The settings of the objective and the optimizer are not here: they may change, and the log shows each change.
:mod:`megatron_dypo.loop.setup.same_inputs` compares.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from megatron_dypo import __version__
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.prompts import PromptStream
from megatron_dypo.data.row_check.cache import tokenizer_files
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.loop.setup.code_digest import OWN_PACKAGE, digest_of_program
from megatron_dypo.loop.setup.teachers import JUDGES, code_of_verifiers
from megatron_dypo.metrics.versions import installed_versions
from megatron_dypo.models.architecture import Architecture

log = logging.getLogger("megatron_dypo")

Inputs = dict[str, Any]
"""Part → its description in JSON values; see :func:`describe_inputs`."""

_LIBRARIES = (
    *("torch", "triton", "megatron-core", "megatron-bridge", "transformer-engine", "flash-attn", "apex"),  # the step
    *("sglang", "transformers"),  # rollouts, where the servers run in this environment
    *("tokenizers", "sentencepiece", "jinja2"),  # prompts
    *JUDGES,
)
"""Distributions whose version decides results. Python, NumPy and the rest carry values, or draw by our own rules."""
_SPEED_OF_GRADING = ("workers", "deadline_s", "batch_size")
"""Keys of ``grading`` that decide no verdict."""
DECIDING_DATA = ("max_prompt_tokens", "max_trace_tokens", "drop_wrong_traces", "shuffle")
"""Fields of ``data`` that decide, as they are written, which prompts and traces there are, or their order."""
OTHER_DATA = {
    "prompts": "paths: the content of the files counts, and the ends of their names, which ids are made of",
    "format": "counts by the columns that it stands for",
    "fields": "counts by the columns that it stands for",
    "teachers": "counts by the teachers that are used: null is the same as to name all of them",
    "on_bad_row": "counts by the rows that are skipped, which are described with their file",
    "keep_row": "decides nothing: a verifier that asks for the row is refused without it",
    "chat_template": "is in the part tokenizer",
    "chat_template_args": "is in the part tokenizer",
}
"""Each other field of ``data``, and where it counts."""


def describe_inputs(
    config: Config,
    *,
    stream: PromptStream,
    tokenizer: Tokenizer,
    arch: Architecture,
    reference: Mapping[str, str] | None,
    teacher: str | None,
    version: Mapping[str, str | None],
) -> Inputs:
    """Return the parts ``data``, ``seed``, ``tokenizer``, ``model``, ``reference``, ``teacher``, ``verifier`` and
    ``version``.

    Args:
        reference: file → SHA-256 of a frozen π_ref; None if the run reads none.
        teacher: name of the model that the teacher's servers serve; None if the run asks none, or they do not tell.
        version: see :func:`describe_version`.
    """
    return _plain(
        {
            "data": {"files": stream.fingerprint(), **_data(config.data, stream)},
            "seed": {"run.seed": config.run.seed},
            "tokenizer": {
                **tokenizer_files(tokenizer),
                "ids that end a response": list(tokenizer.eos_ids),
                "data.chat_template": config.data.chat_template,
                "data.chat_template_args": dict(config.data.chat_template_args),
            },
            "model": dataclasses.asdict(arch),
            "reference": None if reference is None else dict(reference),
            "teacher": None if teacher is None else {"teacher_servers.model": teacher},
            "verifier": {**_grading(config.grading), **code_of_verifiers(config.grading)},
            "version": dict(version),
        }
    )


def describe_version() -> dict[str, str | None]:
    """Return the version of this program, the digest of its code, and the versions of libraries: None if not installed.

    SGLang is the one of this environment; servers elsewhere are not asked.
    """
    own = {"megatron-dypo": __version__, f"code of {OWN_PACKAGE}": digest_of_program()}
    return own | dict.fromkeys(_LIBRARIES) | installed_versions(_LIBRARIES)


def warn_of_unseen_code(inputs: Inputs) -> None:
    """Log a line for each verifier whose code is in no file that could be compared."""
    for key, digest in inputs["verifier"].items():
        if key.startswith("code of ") and digest is None:
            log.warning("verifier: no Python file has the %s: a resume will not notice whether it changed", key)


def _data(data: DataConfig, stream: PromptStream) -> dict[str, Any]:
    """Return what decides prompts, answers, traces and their order besides the files, by the names below ``data``."""
    columns = dataclasses.asdict(columns_of(data.format, data.fields))
    return {
        **{f"fields.{name}": value for name, value in columns.items()},
        **{name: getattr(data, name) for name in DECIDING_DATA},
        "teachers": stream.teachers,
    }


def _grading(cfg: GradingConfig) -> dict[str, Any]:
    return {f"grading.{k}": v for k, v in dataclasses.asdict(cfg).items() if k not in _SPEED_OF_GRADING}


def _plain(content: Inputs) -> Inputs:
    """Return the content as it is after a round trip through JSON, so that a stored one compares equal."""
    plain: Inputs = json.loads(json.dumps(content))
    return plain
