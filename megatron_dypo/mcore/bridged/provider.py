"""The configuration that Megatron-Bridge derives from an HF folder, and the checks that it can be trained here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dypo.checks import require
from megatron_dypo.mcore.bridged.package import import_bridge
from megatron_dypo.models.architecture import Architecture

_ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")
_FUSIONS = ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "apply_rope_fusion")
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "layernorm_epsilon": "norm_epsilon",
    "rotary_base": "rope_theta",
}
"""Field of the provider → that of :class:`Architecture` with the same value."""


def open_bridge(hf_path: str | Path) -> Any:
    """Return Megatron-Bridge's ``AutoBridge`` of an HF folder. No code of the folder is run, and no weight is read.

    Raises:
        ValueError: Megatron-Bridge is not installed, or does not know the model.
    """
    auto = import_bridge().AutoBridge
    try:
        found = auto.from_hf_pretrained(str(hf_path), trust_remote_code=False)
        _give_plain_names(found.hf_pretrained.config)
        return found
    except (ValueError, NotImplementedError) as error:
        known = ", ".join(auto.list_supported_models())
        raise ValueError(
            f"{Path(hf_path) / 'config.json'}: architectures: Megatron-Bridge does not take this model "
            f"({' '.join(str(error).split())[:200]}); it knows {known}"
        ) from error


def read_provider(hf_path: str | Path, arch: Architecture, *, has_te: bool) -> Any:
    """Return Megatron-Bridge's provider: a ``TransformerConfig`` that builds its own GPTModel. It is not finalized.

    Args:
        has_te: whether layers are built of Transformer Engine's classes.

    Raises:
        ValueError: as :func:`open_bridge`; or the provider says something that this package does not compute.
    """
    provider = open_bridge(hf_path).to_megatron_provider(load_weights=False)
    where = f"{Path(hf_path) / 'config.json'}: model_type={arch.family!r}: Megatron-Bridge's provider"
    gpt = _module("gpt_provider").GPTModelProvider
    require(isinstance(provider, gpt), f"{where} {type(provider).__name__}", "must be a GPTModelProvider")
    for theirs, ours in _SIZES.items():
        found, expected = getattr(provider, theirs), getattr(arch, ours)
        require(found == expected, f"{where} has {theirs}={found}", f"config.json says {expected}")
    rules = {
        "num_moe_experts": None,
        "multi_latent_attention": False,
        "position_embedding_type": "rope",
        "rope_scaling": False,
        "seq_len_interpolation_factor": None,
        "mtp_num_layers": None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        **({} if has_te else {"window_size": None, "softmax_type": "vanilla", "add_bias_linear": False}),
    }
    for name, allowed in rules.items():
        value = getattr(provider, name, allowed)
        needed = (
            f"must be {allowed!r}"
            if has_te or name not in ("window_size", "softmax_type")
            else (f"must be {allowed!r} without Transformer Engine")
        )
        require(value == allowed, f"{where} has {name}={value!r}", needed)
    spec = getattr(provider.transformer_layer_spec, "__name__", type(provider.transformer_layer_spec).__name__)
    plain = ("default_layer_spec", "transformer_engine_layer_spec", "local_layer_spec")
    require(has_te or spec in plain, f"{where} has layers of its own ({spec})", "needs a GPU and Transformer Engine")
    return provider


def set_fields(provider: Any, values: Mapping[str, Any]) -> None:
    """Set this package's values for layout, precision and memory, and let Megatron check them all together.

    A fusion stays off if either side has it off: not every model can use every one.
    """
    for name, value in values.items():
        is_fusion = name in _FUSIONS
        setattr(provider, name, value and getattr(provider, name) if is_fusion else value)
    require(
        provider.virtual_pipeline_model_parallel_size is None or not provider.share_embeddings_and_output_weights,
        f"parallel.virtual_pipeline={provider.virtual_pipeline_model_parallel_size}",
        "must be null with model.family=bridge for a model with tied embeddings, which Megatron-Bridge loads wrongly",
    )
    provider.fp16 = False
    provider.should_pad_vocab = False
    provider.finalize()


def _give_plain_names(config: Any) -> None:
    """Copy the rotary fields of transformers 5 to where older versions of Megatron-Bridge look."""
    inside = getattr(config, "rope_parameters", None) or {}
    for name in _ROPE_FIELDS:
        if name in inside and getattr(config, name, None) is None:
            setattr(config, name, inside[name])


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(f"megatron.bridge.models.{name}")
