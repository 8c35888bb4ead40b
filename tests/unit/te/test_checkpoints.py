"""Checkpoints load into models of Transformer Engine's layers, in the lowest and the highest version."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore
from tests.support.hf_models import make_hf_model
from tests.support.slow import slow_unless
from tests.support.te import models
from tests.support.te.run import VERSIONS, run_with_te, te_folder

pytestmark = pytest.mark.parametrize("version", slow_unless("highest".__eq__, VERSIONS))

KINDS = ("llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3", "moonlight", "glm4_moe", "glm4_air", "gpt_oss")
"""Dense without and with biases, with norms of queries and keys, with experts, with latent attention, with experts
behind a dense layer and beside an MLP, and with sinks and biases of experts."""
DENSE_LINEARS = ["TELayerNormColumnParallelLinear", "TERowParallelLinear"]
LINEARS_OF_EXPERTS = [
    "TEColumnParallelGroupedLinear",
    "TELayerNormColumnParallelLinear",
    "TERowParallelGroupedLinear",
    "TERowParallelLinear",
]
LATENT_LINEARS = sorted({*LINEARS_OF_EXPERTS, "TEColumnParallelLinear", "TELinear"})
LINEARS = {
    "qwen3_moe": LINEARS_OF_EXPERTS,
    "gpt_oss": LINEARS_OF_EXPERTS,
    "deepseek_v3": LATENT_LINEARS,
    "moonlight": LATENT_LINEARS,
}
LINEARS |= dict.fromkeys(("glm4_moe", "glm4_air"), sorted({*LINEARS_OF_EXPERTS, "TEColumnParallelLinear"}))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return HF folder and checkpoint of each kind."""
    root, made = tmp_path_factory.mktemp("converted"), {}
    for kind in KINDS:
        hf_path = make_hf_model(kind, root / kind / "hf")
        hf_to_mcore(hf_path, root / kind / "mcore", mesh=ParallelConfig().mesh(1), show_progress=False)
        made[kind] = (hf_path, root / kind / "mcore")
    return made


def test_a_converted_checkpoint_gives_the_weights_of_the_hf_folder(
    version: str, converted: dict[str, tuple[Path, Path]]
) -> None:
    te_folder(version)
    folders = [[str(path) for path in pair] for pair in converted.values()]
    for kind, found in zip(KINDS, run_with_te(version, models.load_converted, folders), strict=True):
        assert found["different"] == [], kind
        assert found["linears"] == LINEARS.get(kind, DENSE_LINEARS), kind
        assert f"decoder.layers.3.{norm_of_queries(kind)}" in found["names"], kind


def norm_of_queries(kind: str) -> str:
    if kind in ("deepseek_v3", "moonlight"):
        return "self_attention.linear_kv_up_proj.layer_norm_weight"
    has_norms_of_heads = kind in ("qwen3", "qwen3_moe", "glm4_moe")
    return "self_attention." + ("q_layernorm.weight" if has_norms_of_heads else "linear_qkv.layer_norm_weight")


def test_layers_that_worked_in_fp8_are_saved_and_resume_with_their_scales(version: str, tmp_path: Path) -> None:
    te_folder(version)
    dense = make_hf_model("qwen3", tmp_path / "dense", head_dim=16)
    experts = make_hf_model("qwen3_moe", tmp_path / "experts", head_dim=16, moe_intermediate_size=48)
    cases = [
        (str(hf_path), str(tmp_path / f"{hf_path.name}_{recipe}"), recipe)
        for hf_path in (dense, experts)
        for recipe in ("delayed", "tensorwise")
    ]
    for case, found in zip(cases, run_with_te(version, models.resume_states, cases), strict=True):
        linears_in_4_layers = 16
        scales_and_histories = 4 if case[2] == "delayed" else 0
        expected = {"linears": linears_in_4_layers, "tensors": scales_and_histories * 16, "different": []}
        assert found == expected, case


def test_a_fused_adam_that_made_no_step_is_saved_and_resumes(version: str, tmp_path: Path) -> None:
    te_folder(version)
    found = run_with_te(
        version, models.resume_optimizer, str(make_hf_model("qwen3", tmp_path / "hf")), str(tmp_path / "root")
    )
    assert found["class"] == "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"
    assert found["moments"] == ["exp_avg", "exp_avg_sq"]
    assert found["main_parameters"] == found["parameters"] > 0
    assert found["cursor"] == 7


def test_every_private_name_that_needs_transformer_engine_is_there(version: str) -> None:
    assert run_with_te(version, models.check_private_names) == ["te_experts.SPLIT_STATE"]
