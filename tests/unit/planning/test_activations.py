"""Activation memory of a layer against Korthikanti et al. 2022 (arXiv 2205.05198), table 2."""

import pytest

from megatron_dypo.planning.activations import layer_bytes
from megatron_dypo.planning.schedule import chunks_in_flight
from tests.support.planning_cases import architecture


@pytest.mark.parametrize("tensor", [1, 8])
def test_a_fused_layer_keeps_what_korthikanti_publish_within_6_percent(tensor):
    """34·s·b·h/t with sequence parallelism and without scores. Here: no dropout masks (−2), rotated q and k (+4)."""
    arch = architecture(hidden_size=12_288, num_attention_heads=96, num_key_value_heads=96)
    kept = layer_bytes(arch, 2, fused=True).kept("none", tensor, tensor > 1)
    published = 34 * arch.hidden_size / tensor
    assert kept / published == pytest.approx(36 / 34, abs=0.002)
    assert abs(kept / published - 1) < 0.06


def test_without_sequence_parallelism_norms_and_residuals_are_whole_on_every_rank():
    """Published: 10 + 24/t. Here: 8 (without dropout masks) + 28/t."""
    arch = architecture(hidden_size=12_288, num_attention_heads=96, num_key_value_heads=96)
    kept = layer_bytes(arch, 2, fused=True).kept("none", 8, False)
    assert kept == pytest.approx((8 + 28 / 8) * arch.hidden_size, rel=0.003)
    assert abs(kept / ((10 + 24 / 8) * arch.hidden_size) - 1) < 0.12


@pytest.mark.parametrize("fused", [True, False])
def test_full_recomputation_keeps_the_input_of_the_layer_alone(fused):
    layer = layer_bytes(architecture(), 2, fused=fused)
    assert layer.kept("full", 4, True) == 2 * 768 / 4
    assert layer.working("full", 1, False) > layer.kept("none", 1, False)


def test_selective_recomputation_frees_nothing_of_flash_attention():
    fused, unfused = (layer_bytes(architecture(qk_norm=True), 4, fused=kind) for kind in (True, False))
    assert fused.kept("selective", 1, False) == fused.kept("none", 1, False)
    assert unfused.kept("selective", 1, False) < unfused.kept("none", 1, False)


@pytest.mark.parametrize(("pipeline", "virtual"), [(8, 3), (4, 2), (35, 3)])
def test_interleaving_costs_the_published_factor_of_the_first_stage(pipeline, virtual):
    """1 + (p − 1)/(p·m) of all layers of a stage (Korthikanti et al. 2022, section 4.2.3)."""
    chunks = chunks_in_flight(stage=0, pipeline=pipeline, virtual_pipeline=virtual, microbatches=10 * pipeline)
    assert chunks / (pipeline * virtual) == pytest.approx(1 + (pipeline - 1) / (pipeline * virtual))


def test_a_stage_of_1f1b_holds_one_row_for_itself_and_each_stage_behind_it():
    in_flight = [chunks_in_flight(stage=s, pipeline=4, virtual_pipeline=1, microbatches=9) for s in range(4)]
    assert in_flight == [4, 3, 2, 1]
    assert chunks_in_flight(stage=0, pipeline=4, virtual_pipeline=1, microbatches=2) == 2
