"""From one command to the ranks of a run: check the inputs, then be a rank or start the local ones."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_dypo.architecture import load_architecture
from megatron_dypo.config.tree import Config
from megatron_dypo.parallel.rules import check_fp8_sizes, check_layout

CHECKED_VARIABLE = "MEGATRON_DYPO_CHECKED"
"""Environment of a launcher whose inputs were checked by the command that became it."""


def check_inputs(config: Config) -> list[str]:
    """What a dry run notes and a real run refuses: files that are not there.

    Raises:
        ValueError: a model that is there and does not fit the parallel layout or the length of sequences.
    """
    from megatron_dypo.objective.recipes.registry import build_objective  # brings torch, which --help need not wait for

    notes = [
        f"{field}={path!r}: no such file"
        for field, paths in (("data.prompts", config.data.prompts), ("eval.prompts", config.eval.sets.values()))
        for path in paths
        if not Path(path).is_file()
    ]
    if not (Path(config.model.hf_path) / "config.json").is_file():
        return [*notes, f"model.hf_path={config.model.hf_path!r}: no config.json there"]
    if not any(Path(config.model.hf_path).glob("*.safetensors")):
        notes.append(f"model.hf_path={config.model.hf_path!r}: no *.safetensors there, which a plan does without")
    build_objective(config.objective)
    arch = load_architecture(config.model.hf_path)
    check_layout(arch, config.parallel)
    check_fp8_sizes(arch, config.parallel, config.model.fp8)
    arch.check_length(
        config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.data.max_trace_tokens),
        "data.max_prompt_tokens + the larger of rollout.max_new_tokens and data.max_trace_tokens",
    )
    return notes


def num_processes(config: Config) -> int:
    """Ranks that the config asks for on this machine."""
    parallel = config.parallel
    stage = math.lcm(parallel.tensor * parallel.context, parallel.expert_ranks)
    return parallel.num_processes or parallel.pipeline * stage


def launch(config: Config, config_path: Path, overrides: Sequence[str]) -> NoReturn:
    """Run this process as one rank (under torchrun, or when one is enough), else start the local ranks.

    The process ends with the status of a :class:`~megatron_dypo.ending.Cause`.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    if "RANK" not in os.environ and num_processes(config) > 1:
        _become_local_ranks(num_processes(config), config_path, overrides)
    from megatron_dypo.attempt import run_rank

    sys.exit(run_rank(config, _train))


def _train(config: Config) -> None:
    from megatron_dypo.mcore.features import shield_imports
    from megatron_dypo.rollout.descriptors import raise_descriptor_limit

    raise_descriptor_limit()  # servers and checkpoint writers inherit it
    shield_imports()  # before anything imports Megatron
    from megatron_dypo.train import train

    train(config)


def _become_local_ranks(count: int, config_path: Path, overrides: Sequence[str]) -> NoReturn:
    """Turn this process into torchrun, which passes signals on to the ranks; pending ones stay pending."""
    torchrun = [sys.executable, "-m", "megatron_dypo.torchrun", "--standalone", f"--nproc-per-node={count}"]
    command = [*torchrun, "-m", "megatron_dypo.cli", "train", str(config_path), *overrides]
    os.environ[CHECKED_VARIABLE] = "1"
    sys.stdout.flush()
    os.execv(sys.executable, command)
