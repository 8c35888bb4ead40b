"""Models of Transformer Engine's layers on a CPU. These functions run in a process of ``tests.support.te.program``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


def built(
    hf_path: str, layout: Any, *, distributed_optimizer: bool = False, **settings: Any
) -> tuple[Any, Any, list[Any]]:
    """Return the architecture, the settings and the chunks of a model of an HF folder."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.model import build_model
    from megatron_dypo.models.architecture import load_architecture

    arch, model = load_architecture(hf_path), ModelConfig(hf_path=hf_path, **settings)
    return arch, model, build_model(arch, model, ParallelConfig(), layout, distributed_optimizer=distributed_optimizer)


def joined() -> Any:
    """Return this process's place in a mesh of one rank."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron

    return start_megatron(ParallelConfig())


def load_converted(folders: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Load converters' checkpoints, and compare the weights with those that are read from the HF folders.

    Args:
        folders: HF folder and checkpoint of each model.
    """
    layout = joined()
    return [_load_converted(hf_path, mcore_path, layout) for hf_path, mcore_path in folders]


def _load_converted(hf_path: str, mcore_path: str, layout: Any) -> dict[str, Any]:
    from megatron_dypo.config.model import ModelConfig
    from megatron_dypo.mcore.chunks import named_global_parameters
    from megatron_dypo.mcore.model import load_initial_weights

    arch, _, chunks = built(hf_path, layout)
    values: list[dict[str, torch.Tensor]] = []
    for path in (mcore_path, None):
        with torch.no_grad():
            for _, parameter in named_global_parameters(chunks):
                parameter.fill_(torch.nan)
        load_initial_weights(chunks, ModelConfig(hf_path=hf_path, mcore_path=path), arch, layout)
        values.append({name: value.detach().clone() for name, value in named_global_parameters(chunks)})
    stored, read = values
    return {
        "names": sorted(read),
        "different": [name for name in read if not torch.equal(read[name], stored[name])],
        "linears": sorted({type(module).__name__ for module in _linears(chunks)}),
    }


def resume_states(cases: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Save models whose layers have worked in FP8, load each into a new one, and return how their states compare.

    Args:
        cases: HF folder, new folder for the checkpoint, and recipe of each model.
    """
    layout = joined()
    return [_resume_states(hf_path, Path(folder), recipe, layout) for hf_path, folder, recipe in cases]


def _resume_states(hf_path: str, folder: Path, recipe: Any, layout: Any) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    from megatron_dypo.config.fp8 import Fp8Config
    from megatron_dypo.mcore.checkpoints.weights import model_state, read_weights

    worked, resumed = (built(hf_path, layout, dtype="bfloat16", fp8=Fp8Config(recipe=recipe))[2] for _ in range(2))
    _work_in_fp8(worked)
    folder.mkdir()
    dist_checkpointing.save(model_state(worked), str(folder))
    read_weights(folder, resumed)
    saved, loaded = _scales(worked), _scales(resumed)
    return {
        "linears": len(_linears(worked)),
        "tensors": len(saved),
        "different": [name for name, value in saved.items() if not torch.equal(value, loaded.get(name, value[:0]))],
    }


def _linears(chunks: Sequence[torch.nn.Module]) -> list[Any]:
    """Return Transformer Engine's linear layers. Attention scores are not in FP8, and Megatron stores no scales of
    theirs."""
    from transformer_engine.pytorch import DotProductAttention
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    found = (module for chunk in chunks for module in chunk.modules())
    return [
        module
        for module in found
        if isinstance(module, TransformerEngineBaseModule) and not isinstance(module, DotProductAttention)
    ]


def _work_in_fp8(chunks: Sequence[torch.nn.Module]) -> None:
    """Give layers the states that they have after a forward pass: scales and histories, if the recipe has any."""
    from megatron.core.fp8_utils import get_fp8_context

    from megatron_dypo.mcore.chunks import unwrap

    with get_fp8_context(unwrap(chunks[0]).config):
        for module in _linears(chunks):
            module.init_fp8_metadata(num_gemms=getattr(module, "num_gemms", 1))
    generator = torch.Generator().manual_seed(1)
    for value in _scales(chunks).values():
        value.copy_(torch.rand(value.shape, generator=generator))


def _scales(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    return dict(_each_scale(chunks))


def _each_scale(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    for number, module in enumerate(_linears(chunks)):
        for direction in ("scaling_fwd", "scaling_bwd"):
            scaling = module.fp8_meta.get(direction)
            for part in ("scale", "amax_history"):
                if isinstance(value := getattr(scaling, part, None), torch.Tensor):
                    yield f"{number}.{direction}.{part}", value


def check_private_names() -> list[str]:
    """Get every private name that needs Transformer Engine; return which ones there are."""
    from tests.support.private_names import all_private_names

    joined()
    return [name for name, private in all_private_names().items() if private.needs_te and private.get()]


def resume_optimizer(hf_path: str, folder: str) -> dict[str, Any]:
    """Save a model and an optimizer without a step, load both into new ones, and say what the optimizer is."""
    from megatron_dypo.config.training import OptimizerConfig
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.model import load_initial_weights
    from megatron_dypo.mcore.optimizer import build_optimizer

    layout, config = joined(), OptimizerConfig(lr=1e-3, distributed=True, warmup_steps=1)

    def started() -> tuple[list[Any], Any]:
        arch, model, chunks = built(hf_path, layout, dtype="bfloat16", distributed_optimizer=True)
        load_initial_weights(chunks, model, arch, layout)
        return chunks, build_optimizer(chunks, config, dtype="bfloat16", total_steps=8)

    chunks, optimizer = started()
    checkpoint.begin_save(
        folder, 1, chunks=chunks, optimizer=optimizer, layout=layout, trainer_state={"cursor": 7}
    ).finish()
    chunks, optimizer = started()
    restored = checkpoint.load(Path(folder) / "step_000001", chunks=chunks, optimizer=optimizer, layout=layout)
    inner = optimizer.megatron.chained_optimizers[0].optimizer
    return {
        "cursor": restored.trainer_state["cursor"],
        "class": f"{type(inner).__module__}.{type(inner).__name__}",
        "moments": sorted({name for state in inner.state.values() for name in state}),
        "parameters": sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        "main_parameters": sum(parameter.numel() for parameter in inner.state),
    }


def recipes() -> dict[str, list[Any]]:
    """Return name → class, format, margin and history of what Megatron makes of each recipe of the config."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dypo.config.fp8 import Fp8Config
    from megatron_dypo.mcore.fp8 import layer_settings

    joined()
    configs = [Fp8Config(recipe=name) for name in ("tensorwise", "blockwise", "mxfp8")]
    made: dict[str, list[Any]] = {}
    for fp8 in (*configs, Fp8Config(recipe="delayed", margin=1, amax_history_len=32)):
        sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
        recipe = get_fp8_recipe(TransformerConfig(**sizes, bf16=True, **layer_settings(fp8)))
        own = next(base for base in type(recipe).__mro__ if base.__module__ == "transformer_engine.common.recipe")
        settings = [getattr(recipe, name, None) for name in ("margin", "amax_history_len")]
        made[fp8.recipe] = [own.__name__, recipe.fp8_format.name, *settings]
    return made
