"""The memory of parameters and optimizer, and the refusal of a run that cannot fit."""

import dataclasses

import pytest

from megatron_dypo.config.training import OptimizerConfig
from megatron_dypo.planning.fit import check_memory
from megatron_dypo.planning.memory import stage_counts, trainer_footprints
from megatron_dypo.planning.parameters import active_parameters, whole_model
from tests.support.planning_cases import architecture, from_file, pretraining


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [("llama3_70b", 70.554, None), ("qwen3_235b_a22b", 235.094, 22.2)],
)
def test_published_models_have_their_published_number_of_parameters(name, billions, active):
    arch = from_file(name).arch
    assert whole_model(arch).total / 1e9 == pytest.approx(billions, abs=0.001)
    if active:  # the published figure counts embedding and output layer
        with_embeddings = active_parameters(arch) + 2 * arch.vocab_size * arch.hidden_size
        assert with_embeddings / 1e9 == pytest.approx(active, abs=0.1)


@pytest.mark.parametrize(("is_distributed", "bytes_each"), [(False, 18), (True, 6 + 12 / 4)])
def test_state_is_that_of_megatrons_own_estimate(is_distributed, bytes_each):
    """18 bytes a parameter, or 6 + 12/dp (Megatron-LM, megatron/training/theoretical_memory_usage.py)."""
    setting = pretraining(architecture(), {"tensor": 2}, gpus=8, batch=8)
    optimizer = OptimizerConfig(distributed=is_distributed)
    setting = dataclasses.replace(setting, config=dataclasses.replace(setting.config, optimizer=optimizer))
    (footprint,) = trainer_footprints(setting)
    state = sum(footprint[name] for name in ("parameters", "gradients", "optimizer"))
    assert state == pytest.approx(bytes_each * stage_counts(setting, 0).total)


@pytest.mark.parametrize(
    ("options", "bytes_each"),
    [
        ({"precision_aware": True}, 6 + 10 / 4),
        (
            {"precision_aware": True, "megatron": {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}},
            6 + 6 / 4,
        ),
        ({"precision_aware": True, "megatron": {"store_param_remainders": False}}, 6 + 12 / 4),
        ({"precision_aware": True, "cpu_offload": 1.0}, 6),
    ],
)
def test_state_follows_the_options_of_the_optimizer(options, bytes_each):
    """Two moments, and 16 bits of the main parameter; a gradient of 4 bytes and a parameter of 2."""
    setting = pretraining(architecture(), {"tensor": 2}, gpus=8, batch=8)
    optimizer = OptimizerConfig(distributed=True, **options)
    setting = dataclasses.replace(setting, config=dataclasses.replace(setting.config, optimizer=optimizer))
    (footprint,) = trainer_footprints(setting)
    state = sum(footprint[name] for name in ("parameters", "gradients", "optimizer"))
    assert state == pytest.approx(bytes_each * stage_counts(setting, 0).total)


UNEVEN = ("parallel.pipeline=4", "parallel.first_stage_layers=23", "parallel.last_stage_layers=23")


@pytest.mark.parametrize(
    ("name", "overrides"), [("llama3_70b", ()), ("qwen3_235b_a22b", ()), ("qwen3_235b_a22b", UNEVEN)]
)
def test_stages_together_hold_the_model_once(name, overrides):
    setting = from_file(name, *overrides)
    parallel = setting.config.parallel
    stages = [stage_counts(setting, stage) for stage in range(parallel.pipeline)]
    assert sum(s.experts for s in stages) * parallel.expert == whole_model(setting.arch).experts
    # Norms and routers are on every tensor-parallel rank.
    dense = sum(s.dense for s in stages) * parallel.tensor
    assert 1 <= dense / whole_model(setting.arch).dense < 1.02


def test_a_stage_is_charged_for_its_own_layers():
    first, second, third, last = trainer_footprints(from_file("qwen3_235b_a22b", *UNEVEN))
    layers = [next(t.why for t in f.terms if t.name == "activations") for f in (first, second, third, last)]
    assert [int(why.partition(" layers")[0].split()[-1]) for why in layers] == [23, 24, 24, 23]
    assert second["parameters"] == third["parameters"]
    # Three microbatches are in flight on the second stage, two on the third.
    assert second["activations"] == pytest.approx(1.5 * third["activations"])


def test_interleaved_175b_fits_where_it_was_trained_and_twice_the_row_does_not():
    """GPT-3 on 64 A100s (Korthikanti et al. 2022, table 3): without a distributed optimizer, 80 GB."""
    arch = architecture(num_layers=96, hidden_size=12_288, num_attention_heads=96, num_key_value_heads=96)
    parallel = {"tensor": 8, "pipeline": 8, "virtual_pipeline": 3, "sequence": True}
    once, twice = (
        trainer_footprints(pretraining(arch, parallel, gpus=64, batch=64, row_sequences=rows))[0] for rows in (1, 3)
    )
    assert once.spare > 0 > twice.spare


def test_a_run_that_cannot_fit_is_refused_with_the_term_and_the_way_round():
    config = from_file("llama3_70b").config
    check_memory(config, trainer_gpus=64, memory=80 * 2**30, capability=(9, 0), fused=True)
    with pytest.raises(
        ValueError, match=r"stage 1 of 4: .* do not fit into 24\.0 GiB; the largest term is optimizer"
    ) as e:
        check_memory(config, trainer_gpus=64, memory=24 * 2**30, capability=(9, 0), fused=True)
    assert "run.check_memory=false" in str(e.value)
