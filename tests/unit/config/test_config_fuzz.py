"""Any config.json and any index give the same architecture as in transformers, or a ValueError; never a traceback."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dypo.models.architecture import architecture_from_hf, load_architecture
from megatron_dypo.models.hf.files import INDEX_NAME, read_weight_map
from tests.support.hf_config_oracle import as_transformers_reads, config_from, differences

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "attention_factor": 1.5,
    "truncate": True,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
BASES: list[dict[str, Any]] = [
    {**SIZES, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3, "attention_bias": False},
    {**SIZES, "model_type": "qwen2", "rope_parameters": YARN, "use_sliding_window": False, "sliding_window": 4096},
    {**SIZES, "model_type": "qwen2", "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {**SIZES, "model_type": "mistral", "head_dim": 24, "sliding_window": 128},
    {**SIZES, "model_type": "qwen3", "head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {**SIZES, **EXPERTS, "model_type": "qwen3_moe", "head_dim": 24},
]
MORE_FIELDS = ("partial_rotary_factor", "layer_types", "original_max_position_embeddings", "type", "num_local_experts")

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 130),
    st.sampled_from([2**31, 10**30, 10**400, "yarn", "default", "linear", "dynamic", "llama3", "", "1", "\0"]),
    st.floats(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*YARN, *SIZES, "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated_configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a good config with one to three changes: a field removed, changed or added, also inside the scaling."""
    config = json.loads(json.dumps(draw(st.sampled_from(BASES))))
    for _ in range(draw(st.integers(1, 3))):
        sections = [value for value in config.values() if isinstance(value, dict)]
        target = draw(st.sampled_from([config, *sections]))
        name = draw(st.sampled_from([*target, *MORE_FIELDS, *YARN]))
        if draw(st.booleans()):
            target.pop(name, None)
        else:
            target[name] = draw(VALUES)
    return config


REFUSALS = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError)
"""Errors that transformers raises for a config that it refuses."""


def outcome(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, str]:
    """Return (result, ""), or (None, message of the ValueError)."""
    try:
        return function(*arguments, **options), ""
    except ValueError as error:
        return None, str(error)


def fuzz(num_examples: int) -> Any:
    return settings(max_examples=num_examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check_config(config: dict[str, Any]) -> None:
    arch, refusal = outcome(architecture_from_hf, config, where="some/config.json")
    if arch is None:
        assert refusal.startswith("some/config.json: ")
        assert len(refusal) < 1000
        return
    assert arch.check_positions(10**19) is not None
    try:
        theirs = as_transformers_reads(config_from(json.loads(json.dumps(config))))
    except REFUSALS:
        return
    assert differences(arch, theirs) == []


def check_bytes(place: int, removed: int, inserted: bytes, base: int) -> None:
    content = json.dumps(BASES[base % len(BASES)]).encode()
    place %= len(content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_bytes(content[:place] + inserted + content[place + removed :])
        arch, refusal = outcome(load_architecture, folder)
        assert arch is not None or refusal.startswith(f"{path}: ")


def check_index(index: Any, cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.safetensors").write_bytes(b"")
        path, text = Path(folder) / INDEX_NAME, json.dumps(index)
        path.write_text(text[: len(text) - cut])
        weight_map, refusal = outcome(read_weight_map, path)
        assert weight_map or refusal.startswith(folder)


BYTES = (st.integers(0, 10**6), st.integers(0, 20), st.binary(max_size=8), st.integers(0, 5))
INDEXES = (
    st.one_of(
        VALUES,
        st.fixed_dictionaries({"weight_map": VALUES | st.dictionaries(st.text(max_size=5), VALUES, max_size=3)}),
        st.fixed_dictionaries(
            {"weight_map": st.dictionaries(st.text(max_size=5), st.just("a.safetensors"), min_size=1)}
        ),
    ),
    st.integers(0, 3),
)


@fuzz(120)
@given(mutated_configs())
def test_an_accepted_config_is_read_as_transformers_reads_it(config):
    check_config(config)


@fuzz(100)
@given(*BYTES)
def test_changed_bytes_of_a_config_end_in_one_line_or_in_an_architecture(place, removed, inserted, base):
    check_bytes(place, removed, inserted, base)


@fuzz(100)
@given(*INDEXES)
def test_any_index_ends_in_one_line_or_in_names_of_files(index, cut):
    check_index(index, cut)


@pytest.mark.slow
def test_longer_runs_find_nothing_more():
    for check, strategies in ((check_config, (mutated_configs(),)), (check_bytes, BYTES), (check_index, INDEXES)):
        fuzz(4000)(given(*strategies)(check))()
