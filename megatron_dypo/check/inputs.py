"""The checks of a dry run and of every start of a run. They are cheap and need no GPU."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from megatron_dypo.check.lengths import Longest, asks_servers, check_lengths
from megatron_dypo.check.program import missing_program
from megatron_dypo.check.prompt_files import check_prompt_files
from megatron_dypo.check.room import check_run_folder
from megatron_dypo.config.evaluation import EvalConfig
from megatron_dypo.config.server_flags import PLANNED
from megatron_dypo.config.tree import Config
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.eval.judging import grading_of_sets, verifiers_of_sets
from megatron_dypo.grading.trial import check_importable
from megatron_dypo.metrics.findings import Findings
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.bridged import architecture_of
from megatron_dypo.models.hf.json_file import read_json_object
from megatron_dypo.models.layout_rules import check_fp8_sizes, check_layout, check_replay
from megatron_dypo.models.quantized.names import NO_REFIT, is_mxfp4
from megatron_dypo.refit.plan.flags import mesh_of_flags
from megatron_dypo.refit.plan.server_mesh import check_server_mesh, check_serving

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def check_inputs(config: Config) -> Findings:
    """Check model folder, layout, objective, tokenizer, prompt files, verifiers, lengths and run folder.

    This takes seconds for files of any size: only both ends of large prompt files are read. Ranks other than the first
    leave out the files that they never open.
    """
    found = Findings()
    arch = check_model(config, found)
    if os.environ.get("RANK", "0") != "0":
        return found
    check_weights(config, found)
    tokenizer = load_tokenizer_of(config, arch, found)
    longest = check_prompt_files(config, tokenizer, found)
    with found.noting():
        check_importable(
            grading_of_sets(config.grading, config.eval), named_by=verifiers_of_sets(config.grading, config.eval)
        )
    check_rest(config, arch, longest, found)
    return found


def check_model(config: Config, found: Findings) -> Architecture | None:
    """Check the objective, the model's config.json against the layout, and which files are missing."""
    # These bring torch, which --help need not wait for.
    from megatron_dypo.loop.teacher import require_logprob_sources
    from megatron_dypo.mcore.options.check import option_problems
    from megatron_dypo.objective.recipes.registry import build_objective

    found.missing += _missing_files(config)
    found.problems += option_problems(config)
    with found.noting():
        require_logprob_sources(config, build_objective(config.objective))
    if not (Path(config.model.hf_path) / "config.json").is_file():
        return None
    arch = None
    with found.noting():
        arch = architecture_of(config.model)
    if arch is None:
        return None
    if asks_servers(config) and is_mxfp4(read_json_object(Path(config.model.hf_path) / "config.json")):
        found.problems.append(f"model.hf_path={config.model.hf_path!r}: servers would serve it {NO_REFIT}")
    if arch.is_bridged:
        _check_provider(config, arch, found)
    elif asks_servers(config) and not config.rollout.servers.urls:
        with found.noting():
            _check_servers(config, arch)
    with found.noting():
        check_layout(arch, config.parallel)
        check_replay(arch, config.objective.replay)
        check_fp8_sizes(arch, config.parallel, config.model.fp8)
    with found.noting():
        arch.check_length(
            config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.data.max_trace_tokens),
            "data.max_prompt_tokens + the larger of rollout.max_new_tokens and data.max_trace_tokens",
        )
    return arch


def _check_servers(config: Config, arch: Architecture) -> None:
    """Check that the servers that the run starts can serve the model, and take it by the configured transport.

    Raises:
        ValueError: names the size, and the setting that gives it.
    """
    servers = config.rollout.servers
    mesh = mesh_of_flags(servers.tensor_parallel, servers.extra_args)
    check = check_server_mesh if config.refit.transport in PLANNED else check_serving
    try:
        check(arch, mesh)
    except ValueError as error:
        raise ValueError(f"rollout.servers: {error}") from error


def _check_provider(config: Config, arch: Architecture, found: Findings) -> None:
    """Check that Megatron-Bridge is there, and takes the model."""
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")  # as ranks have it, for which this process may go on
    from megatron_dypo.mcore.bridged.package import NOT_INSTALLED, is_installed
    from megatron_dypo.mcore.bridged.provider import read_provider

    if not is_installed():
        found.missing.append(NOT_INSTALLED)
        return
    with found.noting():
        read_provider(config.model.hf_path, arch)


def check_weights(config: Config, found: Findings) -> None:
    """Open every safetensors file of the model folder: headers and index, no weights."""
    from megatron_dypo.models.hf.files import SafetensorsFiles

    folder = Path(config.model.hf_path)
    if config.model.mcore_path is None and not config.run.smoke and any(folder.glob("*.safetensors")):
        with found.noting():
            SafetensorsFiles(folder)


def load_tokenizer_of(config: Config, arch: Architecture | None, found: Findings) -> Tokenizer | None:
    """Load the policy's tokenizer and compare it with the embedding; None if it is missing or broken."""
    from megatron_dypo.loop.setup.open_data import open_tokenizer

    folder = Path(config.model.hf_path)
    if arch is None:
        return None
    if not any((folder / name).exists() or (folder / name).is_symlink() for name in _TOKENIZERS):
        return None  # noted as missing
    with found.noting():
        return open_tokenizer(config, arch.vocab_size)
    return None


def check_rest(config: Config, arch: Architecture | None, longest: Longest, found: Findings) -> None:
    """Check lengths against the model and the servers, the servers' program, and the run folder against its disk."""
    if not config.eval.sets:
        defaults = EvalConfig()
        found.notes += [
            f"eval.{option.name}={getattr(config.eval, option.name)}: does nothing: eval.sets names no set"
            for option in dataclasses.fields(defaults)
            if option.name != "sets" and getattr(config.eval, option.name) != getattr(defaults, option.name)
        ]
    if asks_servers(config):
        found.missing += missing_program(config.rollout.servers)
    if arch is not None:
        check_lengths(config, arch, longest, found)
    check_run_folder(config, arch, found)


def _missing_files(config: Config) -> list[str]:
    keys = [("data.prompts", path) for path in config.data.prompts]
    keys += [(f"eval.sets.{name}.path", one.path) for name, one in config.eval.sets.items()]
    missing = [f"{key}={path!r}: no such file" for key, path in keys if not os.path.lexists(path)]
    folder = Path(config.model.hf_path)
    key = f"model.hf_path={config.model.hf_path!r}"
    if not (folder / "config.json").is_file():
        return [*missing, f"{key}: no config.json there"]
    if not any(os.path.lexists(folder / name) for name in _TOKENIZERS):
        missing.append(f"{key}: no {' and no '.join(_TOKENIZERS)} there")
    if config.run.smoke:
        return missing  # its weights are random
    if config.model.mcore_path is None:
        if not any(folder.glob("*.safetensors")):
            missing.append(f"{key}: no *.safetensors there, which a plan does without")
    elif not Path(config.model.mcore_path).is_dir():
        missing.append(f"model.mcore_path={config.model.mcore_path!r}: no such folder")
    return missing
