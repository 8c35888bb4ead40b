"""FP8 settings for Megatron. Nothing here runs in FP8."""

import dataclasses

import pytest
import torch

from megatron_dypo.batching.pack import alignment
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.mcore import fp8
from megatron_dypo.mcore.features import Features, fp8_obstacles, require_fp8
from megatron_dypo.mcore.model import transformer_config
from megatron_dypo.models.layout_rules import check_fp8_sizes
from tests.support.architectures import make_arch

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
HOPPER, ADA, BLACKWELL, GEFORCE_BLACKWELL, AMPERE = (9, 0), (8, 9), (10, 0), (12, 0), (8, 0)
ARCH = make_arch(hidden_size=512, head_dim=64, ffn_hidden_size=1024, vocab_size=131, max_position_embeddings=512)


def config_of(settings, **axes):
    features = Features(transformer_engine=False, grad_accumulation_fusion=False)
    return transformer_config(ARCH, ModelConfig(hf_path="x", fp8=settings), ParallelConfig(**axes), features)


@pytest.mark.parametrize(("recipe", "element"), zip(RECIPES, ("hybrid", "hybrid", "e4m3", "e4m3"), strict=True))
def test_megatron_accepts_every_recipe(recipe, element):
    config = config_of(Fp8Config(recipe=recipe))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (element, recipe, False)
    assert not config.first_last_layers_bf16


def test_without_a_recipe_megatron_hears_nothing_of_fp8():
    assert config_of(Fp8Config()).fp8 is None
    assert fp8.gather_settings(Fp8Config()) == fp8.optimizer_settings(Fp8Config()) == {}


def test_delayed_scaling_takes_its_history():
    config = config_of(Fp8Config(recipe="delayed", margin=1, amax_history_len=16, amax_compute_algo="most_recent"))
    assert (config.fp8_margin, config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1, 16, "most_recent")


@pytest.mark.parametrize(("first", "last"), [(1, 1), (2, 0), (0, 1)])
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_only_the_named_layers_stay_in_bf16(recipe, first, last):
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = config_of(Fp8Config(recipe=recipe, first_layers_bf16=first, last_layers_bf16=last))
    in_bf16 = [is_first_last_bf16_layer(config, layer) for layer in range(ARCH.num_layers)]
    assert in_bf16 == [True] * first + [False] * (ARCH.num_layers - first - last) + [True] * last


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_gathered_parameters_are_told_to_model_buffers_and_optimizer_alike(recipe):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

    settings = Fp8Config(recipe=recipe, param_gather=True)
    buffers = DistributedDataParallelConfig(use_distributed_optimizer=True, **fp8.gather_settings(settings))
    optimizer = MegatronOptimizerConfig(use_distributed_optimizer=True, **fp8.optimizer_settings(settings))
    assert config_of(settings).fp8_param
    assert buffers.fp8_param_gather
    assert optimizer.fp8_recipe == recipe
    # Megatron asks for both or neither.
    shared = recipe == "mxfp8"
    assert buffers.reuse_grad_buf_for_mxfp8_param_ag == optimizer.reuse_grad_buf_for_mxfp8_param_ag == shared


@pytest.mark.parametrize(
    ("change", "axes", "settings", "message"),
    [
        ({"hidden_size": 520}, {}, {"recipe": "tensorwise"}, "hidden_size = 520: must be a multiple of 16"),
        (
            {},
            {"tensor": 8},
            {"recipe": "blockwise"},
            r"width of attention heads / parallel.tensor = 64: must be a mult",
        ),
        ({"ffn_hidden_size": 96}, {"tensor": 2}, {"recipe": "mxfp8"}, "intermediate_size / parallel.tensor = 48"),
        (
            {},
            {"pipeline": 4},
            {"recipe": "mxfp8", "first_layers_bf16": 2},
            "first_layers_bf16=2: must not exceed a pipe",
        ),
    ],
)
def test_shards_that_a_recipe_cannot_multiply_are_refused(change, axes, settings, message):
    with pytest.raises(ValueError, match=message):
        check_fp8_sizes(dataclasses.replace(ARCH, **change), ParallelConfig(**axes), Fp8Config(**settings))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_what_a_rank_holds_of_a_row_suits_megatrons_own_alignment(recipe, tensor, context):
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    row = alignment(tensor, context, Fp8Config(recipe=recipe).token_multiple)
    assert row // (tensor * context) % get_fp8_align_size(Fp8Recipe(recipe)) == 0


@pytest.mark.parametrize(
    ("capability", "toolkit", "usable"),
    [
        (AMPERE, (12, 9), set()),
        (ADA, (12, 9), {"delayed", "tensorwise"}),
        (HOPPER, (12, 8), {"delayed", "tensorwise"}),
        (HOPPER, (12, 9), {"delayed", "tensorwise", "blockwise"}),
        (BLACKWELL, (13, 0), {"delayed", "tensorwise", "blockwise", "mxfp8"}),
        (GEFORCE_BLACKWELL, (13, 0), {"delayed", "tensorwise", "blockwise"}),
        (None, (), set()),
    ],
)
def test_a_machine_runs_the_recipes_of_its_generation(capability, toolkit, usable):
    obstacles = fp8_obstacles(te_version="2.9.0+abc", capability=capability, toolkit=toolkit)
    assert set(RECIPES) - set(obstacles) == usable


def test_an_old_engine_or_none_is_named_as_what_is_lacking():
    old = fp8_obstacles(te_version="2.1.0", capability=HOPPER, toolkit=(12, 9))
    assert old["tensorwise"] == "Transformer Engine 2.2 or newer, found 2.1.0"
    assert "delayed" not in old
    none = fp8_obstacles(te_version=None, capability=HOPPER, toolkit=(12, 9))
    assert set(none.values()) == {"Transformer Engine, which is not installed"}


def test_a_recipe_that_cannot_run_here_is_refused_in_one_line():
    obstacles = fp8_obstacles(te_version="2.9", capability=HOPPER, toolkit=(12, 9))
    features = Features(transformer_engine=True, grad_accumulation_fusion=False, fp8_obstacles=obstacles)
    require_fp8(Fp8Config(), features)
    require_fp8(Fp8Config(recipe="blockwise"), features)
    message = "model.fp8.recipe=mxfp8: needs compute capability 10.0 or higher and below 12.0, found 9.0"
    with pytest.raises(ValueError, match=f"^{message}$"):
        require_fp8(Fp8Config(recipe="mxfp8"), features)


class Layer(torch.nn.Module):
    """A linear layer that knows, like Transformer Engine's, whether its quantised weight is out of date."""

    def __init__(self):
        super().__init__()
        self.is_first_microbatch = True


def test_changed_weights_are_quantised_anew_by_the_next_pass():
    from megatron.core.transformer.module import MegatronModule

    chunk = MegatronModule(config_of(Fp8Config(recipe="tensorwise")))
    chunk.first, chunk.second = Layer(), Layer()
    chunk.first.is_first_microbatch = chunk.second.is_first_microbatch = False
    fp8.forget_quantized_weights([chunk])
    assert chunk.first.is_first_microbatch
    assert chunk.second.is_first_microbatch
