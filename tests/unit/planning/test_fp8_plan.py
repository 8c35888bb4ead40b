"""FP8 training in the plan: times against published times, bytes against a count by hand, and the laws of both."""

import dataclasses
from typing import Any

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.training import OptimizerConfig
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.planning.activations import layer_bytes
from megatron_dypo.planning.devices import GPUS, find_gpu
from megatron_dypo.planning.fit import check_memory
from megatron_dypo.planning.fp8 import fp8_layers, quantized
from megatron_dypo.planning.memory import trainer_footprints
from megatron_dypo.planning.training import LINK_EFFICIENCY, logprob_time, update_time
from tests.support.planning_cases import ROOT, architecture, from_file, pretraining
from tests.support.present import present

RECIPES: tuple[Any, ...] = ("delayed", "tensorwise", "blockwise", "mxfp8")
HOPPER, BLACKWELL = (9, 0), (10, 0)
H, F, V, LAYERS, HEADS = 768, 2048, 51_200, 8, 12
LINEAR = LAYERS * (4 * H * H + 3 * H * F)
OTHER = LAYERS * 2 * H + H + 2 * V * H


def small(fp8=None, *, gpu="h100-80gb", parallel=None, gpus=8, recompute="none", distributed=True, arch=None):
    setting = pretraining(arch or architecture(), parallel or {}, gpus=gpus, batch=64, recompute=recompute)
    model = dataclasses.replace(setting.config.model, fp8=fp8 or Fp8Config())
    optimizer = OptimizerConfig(distributed=distributed)
    config = dataclasses.replace(setting.config, model=model, optimizer=optimizer)
    return dataclasses.replace(setting, config=config, gpu=find_gpu(gpu))


LLAMA_70B = {"num_layers": 80, "hidden_size": 8192, "num_attention_heads": 64, "ffn_hidden_size": 28_672}
LLAMA_8B = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 14_336}
INTERLEAVED = {"tensor": 4, "pipeline": 8, "virtual_pipeline": 5, "sequence": True}
# fmt: off
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "Llama 3 70B, H100": (LLAMA_70B, INTERLEAVED, 64, 256, 1, "h100-80gb", "tensorwise", 1621),
    "Llama 3 8B, H100": (LLAMA_8B, {}, 8, 128, 1, "h100-80gb", "tensorwise", 14_451),
    "Llama 3 8B, B200": (LLAMA_8B, {}, 8, 128, 2, "b200-180gb", "tensorwise", 30_624),
    "Llama 3 8B, B200, MXFP8": (LLAMA_8B, {}, 8, 128, 2, "b200-180gb", "mxfp8", 29_521),
}
# fmt: on
"""Sizes, axes, GPUs, sequences of 8,192 a step and a row, recipe, tokens a second and GPU (Megatron-Bridge,
docs/performance-summary-archive.md: 26.02 for 70B, 25.11 for 8B, whose H100 run shards parameters too)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_fp8_update_is_as_fast_as_published_within_15_percent(name):
    sizes, parallel, gpus, batch, row_sequences, gpu, recipe, published = PUBLISHED[name]
    arch = architecture(**sizes, num_key_value_heads=8, head_dim=128, vocab_size=128_256)
    setting = pretraining(arch, parallel, gpus=gpus, batch=batch, row_sequences=row_sequences, length=8192)
    model = dataclasses.replace(setting.config.model, fp8=Fp8Config(recipe=recipe))
    config = dataclasses.replace(setting.config, model=model, optimizer=OptimizerConfig(distributed=True))
    # The published layout of 70B has fewer layers on the last stage, and logits are computed once.
    setting = dataclasses.replace(setting, config=config, gpu=find_gpu(gpu), balanced_output=True, output_passes=3)
    assert batch * 8192 / update_time(setting).total / gpus == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize("gpu", [name for name, gpu in GPUS.items() if gpu.fp8])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_fp8_is_faster_than_bf16_by_less_than_the_data_sheets_say(gpu, recompute):
    bf16, fp8 = (small(kind, gpu=gpu, recompute=recompute) for kind in (None, Fp8Config(recipe="tensorwise")))
    for measure in (update_time, lambda setting: logprob_time(setting, 64)):
        gain = measure(bf16).compute / measure(fp8).compute
        assert 1 < gain < present(GPUS[gpu].fp8) / GPUS[gpu].bf16


def test_a_gpu_without_fp8_is_no_faster_in_it():
    bf16, fp8 = (small(kind, gpu="a100-80gb") for kind in (None, Fp8Config(recipe="tensorwise")))
    assert update_time(bf16) == update_time(fp8)


def test_layers_in_bf16_take_their_share_of_the_time_saved():
    times = [
        update_time(small(Fp8Config(recipe="tensorwise", first_layers_bf16=count, last_layers_bf16=count))).compute
        for count in (0, 1, 4)
    ]
    bf16 = update_time(small()).compute
    assert times[2] == bf16, "all eight layers"
    assert (bf16 - times[1]) / (bf16 - times[0]) == pytest.approx(6 / 8)


def test_full_recomputation_repeats_linear_layers_in_fp8():
    """Three passes become four: linear layers and scores take a third more, the output projection does not."""
    none, full = (update_time(small(Fp8Config(recipe="tensorwise"), recompute=r)).compute for r in ("none", "full"))
    bf16_none, bf16_full = (update_time(small(recompute=r)).compute for r in ("none", "full"))
    assert 0 < full - none < bf16_full - bf16_none


def test_scores_and_output_projection_stay_in_bf16():
    """FP8 saves the linear layers' time, except for the share that it still takes."""
    setting = small(Fp8Config(recipe="tensorwise"))
    saved = update_time(small()).compute - update_time(setting).compute
    tokens = 64 * 2048
    seconds = 6 * LINEAR * tokens / 8 / (setting.gpu.bf16 * setting.gpu.matmul * setting.constants.matmul)
    assert saved == pytest.approx(seconds * (1 - 1 / setting.gpu.fp8_gain))


@pytest.mark.parametrize(
    ("gpu", "recipe", "copy_bytes"),
    [
        ("h100-80gb", "tensorwise", 2.0),
        ("l40s-48gb", "tensorwise", 2.0),
        ("b200-180gb", "tensorwise", 1.0),
        ("h100-80gb", "blockwise", 2 + 2 * 4 / 128**2),
        ("b200-180gb", "blockwise", 2 + 2 * 4 / 128**2),
        ("b200-180gb", "mxfp8", 2 + 2 / 32),
    ],
)
def test_weights_have_an_fp8_copy_for_each_use_that_reads_its_own(gpu, recipe, copy_bytes):
    (beside,) = trainer_footprints(small(Fp8Config(recipe=recipe), gpu=gpu))
    assert beside["parameters"] == 2 * (LINEAR + OTHER)
    assert beside["FP8 weights"] == pytest.approx(LINEAR * copy_bytes)
    (alone,) = trainer_footprints(small(Fp8Config(recipe=recipe, param_gather=True), gpu=gpu))
    other_bytes = 4 if recipe == "mxfp8" else 2
    assert alone["parameters"] == pytest.approx(LINEAR * copy_bytes + OTHER * other_bytes)
    assert "FP8 weights" not in [term.name for term in alone.terms]


@pytest.mark.parametrize(("recipe", "saved_bytes"), [("tensorwise", 1), ("blockwise", 1), ("mxfp8", 0)])
def test_gathering_fp8_parameters_moves_a_byte_less_of_each_where_one_copy_is_enough(recipe, saved_bytes):
    bf16, fp8 = (
        update_time(small(Fp8Config(recipe=recipe, param_gather=gathered), gpu="b200-180gb")).data
        for gathered in (False, True)
    )
    rate = LINK_EFFICIENCY * find_gpu("b200-180gb").nvlink
    assert bf16 - fp8 == pytest.approx(saved_bytes * LINEAR * 7 / 8 / rate)


def test_a_dense_layer_keeps_inputs_of_linear_layers_in_fp8_and_nothing_else():
    """Two norms' outputs and the feed-forward layer's inner input; with delayed scaling attention's output again."""
    bf16 = layer_bytes(architecture(), 2, fused=True).kept("none", 1, False)
    kept = {
        recipe: layer_bytes(architecture(), 2, fused=True, fp8=quantized(Fp8Config(recipe=recipe), BLACKWELL)).kept(
            "none", 1, False
        )
        for recipe in RECIPES
    }
    assert bf16 - kept["tensorwise"] == 2 * H + F
    assert kept["delayed"] - kept["tensorwise"] == H
    for in_blocks in ("blockwise", "mxfp8"):
        assert kept[in_blocks] - kept["tensorwise"] == (2 * H + F) / 32


def test_experts_keep_their_inputs_in_fp8_and_the_router_its_own_in_bf16():
    arch = from_file("qwen3_235b_a22b").arch
    bf16, fp8 = (
        layer_bytes(arch, 2, fused=True, fp8=kind).kept("none", 1, False)
        for kind in (None, quantized(Fp8Config(recipe="tensorwise"), HOPPER))
    )
    experts, hidden = present(arch.experts), arch.hidden_size
    assert bf16 - fp8 == hidden + experts.per_token * (hidden + experts.ffn_hidden_size)


@pytest.mark.parametrize("recipe", RECIPES)
def test_full_recomputation_keeps_the_bf16_input_of_an_fp8_layer(recipe):
    layer = layer_bytes(architecture(), 2, fused=True, fp8=quantized(Fp8Config(recipe=recipe), HOPPER))
    assert layer.kept("full", 4, True) == 2 * H / 4
    assert layer.working("full", 1, False) > layer.kept("none", 1, False)


def test_activations_of_a_stage_are_between_those_of_its_kinds_of_layers():
    everywhere, nowhere, mixed = (
        trainer_footprints(small(fp8, parallel={"pipeline": 2}))[0]["activations"]
        for fp8 in (Fp8Config(recipe="tensorwise"), None, Fp8Config(recipe="tensorwise", first_layers_bf16=1))
    )
    assert mixed == pytest.approx(everywhere + (nowhere - everywhere) / 4)


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (4, 1), (4, 2), (2, 4)])
def test_stages_together_hold_all_layers_but_those_in_bf16(pipeline, virtual):
    fp8 = Fp8Config(recipe="tensorwise", first_layers_bf16=2, last_layers_bf16=1)
    mesh = Mesh(pipeline=pipeline, virtual_pipeline=virtual)
    assert sum(fp8_layers(fp8, mesh, 16, stage) for stage in range(pipeline)) == 13


def test_interleaved_chunks_of_a_stage_count_by_their_own_layers():
    """Stage 0 of two holds layers 0, 1, 4, 5 of eight; 0 and 1 are in bf16."""
    fp8 = Fp8Config(recipe="tensorwise", first_layers_bf16=2)
    assert fp8_layers(fp8, Mesh(pipeline=2, virtual_pipeline=2), 8, 0) == 2
    assert fp8_layers(fp8, Mesh(pipeline=2), 8, 0) == 2
    assert fp8_layers(fp8, Mesh(pipeline=2, virtual_pipeline=2), 8, 1) == 4


def test_train_refuses_fp8_weights_that_no_longer_fit_and_a_gpu_with_one_layout_holds_them():
    def needs(*overrides, capability=HOPPER):
        config = from_file("llama3_70b", *overrides).config
        check_memory(config, trainer_gpus=64, memory=33 * 2**30, capability=capability, fused=True)

    needs()
    needs("model.fp8.recipe=tensorwise", "model.fp8.param_gather=true", capability=BLACKWELL)
    with pytest.raises(ValueError, match="do not fit"):
        needs("model.fp8.recipe=tensorwise")


@pytest.mark.parametrize(
    ("gpu", "recipe", "lacking"),
    [
        (
            "a100-80gb",
            "tensorwise",
            "needs compute capability 8.9 or higher, found 8.0: it has no FP8; those that can: l40s",
        ),
        ("a800-80gb", "mxfp8", "found 8.0: it has no FP8; those that can: b200-180gb"),
        ("h100-80gb", "mxfp8", "found 9.0: it is not Blackwell; those that can: b200-180gb"),
        ("l40s-48gb", "blockwise", "needs compute capability 9.0 or higher, found 8.9: it is not Hopper or newer"),
    ],
)
def test_a_recipe_that_the_gpu_cannot_run_is_a_problem_of_the_plan(gpu, recipe, lacking, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, option = "tests/planning_configs/llama3_70b.yaml", f"model.fp8.recipe={recipe}"
    done = CliRunner().invoke(app, ["plan", config, option, "--gpu", gpu])
    assert done.exit_code == 1
    assert f"CANNOT RUN: {option} on {gpu}: " in done.stdout
    assert lacking in done.stdout
    assert "FITS." not in done.stdout


def test_a_gpu_that_runs_the_recipe_has_no_problem_and_the_plan_says_fp8(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["plan", "tests/planning_configs/llama3_70b.yaml", "model.fp8.recipe=mxfp8", "--gpu", "b200-180gb"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "linear layers in FP8 (mxfp8)" in done.stdout


def test_shards_that_a_recipe_cannot_multiply_are_refused_before_anything_is_planned():
    with pytest.raises(
        ValueError, match=r"model\.fp8\.recipe=blockwise: moe_intermediate_size .* = 96: must be a multiple"
    ):
        from_file("qwen3_235b_a22b", "model.fp8.recipe=blockwise", "parallel.expert_tensor=16", "parallel.expert=4")
