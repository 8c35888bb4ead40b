"""The rules of FP8 training that need neither torch nor Megatron."""

import math

import pytest

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.training import BatchingConfig, OptimizerConfig
from megatron_dypo.config.tree import Config

FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def make_config(fp8, **sections):
    return Config(model=ModelConfig(hf_path="m", fp8=fp8), data=DataConfig(prompts=("p.jsonl",)), **sections)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first_layers_bf16": 1}, "first_layers_bf16=1: needs an FP8 recipe"),
        (
            {"recipe": "delayed", "last_layers_bf16": 2},
            "last_layers_bf16=2: needs recipe tensorwise, blockwise or mxfp8",
        ),
        ({"recipe": "tensorwise", "margin": 1}, "margin=1: needs recipe=delayed, got tensorwise"),
        ({"param_gather": True}, "param_gather=true: needs an FP8 recipe"),
        ({"recipe": "delayed", "param_gather": True}, "param_gather=true: needs recipe tensorwise, blockwise or mxfp8"),
        ({"recipe": "delayed", "amax_history_len": 0}, "amax_history_len=0: must be positive"),
        ({"recipe": "mxfp8", "first_layers_bf16": -1}, "first_layers_bf16=-1: must not be negative"),
    ],
)
def test_options_that_a_recipe_does_not_know_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Fp8Config(**fields)


def test_fp8_needs_bf16_around_it():
    with pytest.raises(ValueError, match=r"fp8.recipe=tensorwise: needs dtype=bfloat16 around it, got float32"):
        ModelConfig(hf_path="m", dtype="float32", fp8=Fp8Config(recipe="tensorwise"))


def test_gathering_fp8_parameters_needs_the_distributed_optimizer():
    fp8 = Fp8Config(recipe="tensorwise", param_gather=True)
    with pytest.raises(ValueError, match=r"param_gather=true: needs optimizer.distributed=true"):
        make_config(fp8)
    make_config(fp8, optimizer=OptimizerConfig(distributed=True))


@pytest.mark.parametrize("own", [1, 3, 64])
@pytest.mark.parametrize(("recipe", "granule"), [("none", 1), ("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)])
def test_rows_are_multiples_of_what_both_the_user_and_the_recipe_ask(recipe, granule, own):
    config = make_config(Fp8Config(recipe=recipe), batching=BatchingConfig(token_multiple=own))
    assert config.token_multiple % own == config.token_multiple % granule == 0
    assert config.token_multiple == own * granule // math.gcd(own, granule)


@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_gradients_need_the_wider_range_where_a_tensor_has_one_scale(recipe):
    assert Fp8Config(recipe=recipe).element_format == ("hybrid" if recipe in ("delayed", "tensorwise") else "e4m3")
    assert Fp8Config(recipe=recipe, format="e4m3").element_format == "e4m3"


def test_the_recipe_is_set_by_a_dotted_override(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {hf_path: m}\ndata: {prompts: [p.jsonl]}\n")
    config = load_config(path, ["model.fp8.recipe=blockwise", "model.fp8.first_layers_bf16=1"])
    assert config.model.fp8 == Fp8Config(recipe="blockwise", first_layers_bf16=1)
