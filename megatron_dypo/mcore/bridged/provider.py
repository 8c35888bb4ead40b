"""The configuration that Megatron-Bridge derives from an HF folder, and the checks that it can be trained here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

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
_RULES: dict[str, Any] = {
    "num_moe_experts": None,
    "multi_latent_attention": False,
    "position_embedding_type": "rope",
    "rope_scaling": False,
    "seq_len_interpolation_factor": None,
    "mtp_num_layers": None,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "window_size": None,
    "softmax_type": "vanilla",
    "add_bias_linear": False,
    "use_transformer_engine_full_layer_spec": False,
}
"""Field of the provider → the only value that this package computes."""
_PLAIN_LAYERS = ("default_layer_spec", "transformer_engine_layer_spec")
"""Functions of the provider's module that return Megatron's layers of Transformer Engine's classes."""
_ACTIVATION_TOLERANCE = 1e-3
"""The tanh approximation of GELU differs from GELU by up to 5e-4."""


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


def read_provider(hf_path: str | Path, arch: Architecture) -> Any:
    """Return Megatron-Bridge's provider: a ``TransformerConfig`` that builds its own GPTModel. It is not finalized.

    Raises:
        ValueError: as :func:`open_bridge`; or the provider contradicts ``config.json``, or says something that this
            package does not compute.
    """
    opened = open_bridge(hf_path)
    provider, config = opened.to_megatron_provider(load_weights=False), opened.hf_pretrained.config
    where = f"{Path(hf_path) / 'config.json'}: model_type={arch.family!r}: Megatron-Bridge's provider"
    gpt = importlib.import_module("megatron.bridge.models.gpt_provider").GPTModelProvider
    require(isinstance(provider, gpt), f"{where} {type(provider).__name__}", "must be a GPTModelProvider")
    said = {theirs: getattr(arch, ours) for theirs, ours in _SIZES.items()}
    # What the file does not say, transformers adds to its own configuration of the family.
    said["share_embeddings_and_output_weights"] = bool(config.tie_word_embeddings)
    said["rotary_percent"] = getattr(config, "partial_rotary_factor", None) or 1.0
    for name, expected in said.items():
        found = getattr(provider, name)
        require(found == expected, f"{where} has {name}={found}", f"config.json says {expected}")
    for name, allowed in _RULES.items():
        value = getattr(provider, name, allowed)
        require(value == allowed, f"{where} has {name}={value!r}", f"must be {allowed!r}")
    spec = getattr(provider.transformer_layer_spec, "__name__", type(provider.transformer_layer_spec).__name__)
    rule = "must have Megatron's plain ones, the only layers that are checked here"
    require(spec in _PLAIN_LAYERS, f"{where} has layers of its own ({spec})", rule)
    _require_activation(provider.activation_func, config, where)
    return provider


def set_fields(provider: Any, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Set this package's own values for layout, precision and memory, and then those of ``model.megatron``.

    Of this package's own fusions, those stay off that the provider has off: not every model can use every one.

    Raises:
        ValueError: a combination that Megatron-Bridge would compute wrongly or not at all.
    """
    for name, value in own.items():
        setattr(provider, name, value and getattr(provider, name) if name in _FUSIONS else value)
    for name, value in given.items():
        setattr(provider, name, value)
    require(
        provider.virtual_pipeline_model_parallel_size is None or not provider.share_embeddings_and_output_weights,
        f"parallel.virtual_pipeline={provider.virtual_pipeline_model_parallel_size}",
        "must be null with model.family=bridge for a model with tied embeddings, which Megatron-Bridge loads wrongly",
    )
    require(
        provider.attention_backend.name != "local",
        "model.megatron.attention_backend=local",
        "must be another with model.family=bridge: Megatron's local attention takes no packed sequences",
    )
    provider.fp16 = False
    provider.should_pad_vocab = False


def _require_activation(activation: Callable[[torch.Tensor], torch.Tensor], config: Any, where: str) -> None:
    """Require a provider's activation to be the one that config.json names, up to an approximation of GELU."""
    known = importlib.import_module("transformers.activations").ACT2FN
    inputs = torch.linspace(-4, 4, 65)
    for field in ("hidden_act", "hidden_activation"):
        name = getattr(config, field, None)
        if name is None:
            continue
        require(name in known, f"{where}: {field}={name!r}", "must be an activation that transformers knows")
        error = (activation(inputs) - known[name](inputs)).abs().max().item()
        require(
            error < _ACTIVATION_TOLERANCE,
            f"{where} has activation_func={activation.__name__}",
            f"config.json says {field}={name!r}",
        )


def _give_plain_names(config: Any) -> None:
    """Copy the rotary fields of transformers 5 to where older versions of Megatron-Bridge look."""
    inside = getattr(config, "rope_parameters", None) or {}
    for name in _ROPE_FIELDS:
        if name in inside and getattr(config, name, None) is None:
            setattr(config, name, inside[name])
