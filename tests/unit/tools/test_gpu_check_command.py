"""The check of a GPU machine, on a machine without one: its code on a CPU, and its verdicts on results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dypo.planning.devices import find_rates
from megatron_dypo.types import SampleKind
from tests.support.tool_commands import run_tool
from tools.gpu_parts.logprob_speed import ProjectionSizes
from tools.gpu_parts.page import page
from tools.gpu_parts.plan_of_stages import Plan, plan_stages
from tools.gpu_parts.precisions import compare, compare_tensors, precisions, run_precisions
from tools.gpu_parts.resumed import compare_resumed
from tools.gpu_parts.run_part import PartError
from tools.gpu_parts.stages import Stage, is_good, run_stages
from tools.gpu_parts.synthetic import CheckSizes, architecture, count, make_samples

HOPPER = {"device": "NVIDIA H100 80GB HBM3", "on_gpu": True, "fp8_obstacles": {"mxfp8": "…", "blockwise": "…"}}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line():
    result = run_tool("gpu_check.py")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "gpu_check: no GPU here: torch sees none; --cpu-smoke runs every stage in small\n"


def part_of_a_hopper(spec, *, ranks=1):
    """Tensorwise is fast and agrees; delayed fails."""
    if spec["recipe"] == "delayed":
        raise PartError("RuntimeError: cuBLAS")
    is_fp8 = spec["recipe"] != "none"
    tensors = {"gradient": torch.tensor([1.0, 0.0]).bfloat16(), "logp": torch.tensor([-1.0, -2.0 - is_fp8])}
    torch.save(tensors, spec["keep"])
    return {
        "losses": [1.0, 2.0, 2.01 if is_fp8 else 2.0],
        "step_s": {"float32": 4.0, "bfloat16": 0.5 if is_fp8 else 1.0}[spec["dtype"]],
        "tokens_per_s": 1.0,
        "model_flops_per_s": 98.9e12,
        "peak_gib": 3.0,
    }


def test_a_precision_that_fails_is_reported_and_stops_no_other(tmp_path):
    sizes = CheckSizes(hidden=64, head_dim=32, tokens=512, length=32)
    result = run_precisions(HOPPER, sizes, tmp_path, run_part=part_of_a_hopper, say=lambda line: None)
    assert result["updates"]["fp8_delayed"] == {"error": "RuntimeError: cuBLAS"}
    assert result["updates"]["bf16"]["mfu"] == pytest.approx(0.1)
    assert result["updates"]["fp8_tensorwise"]["speed_of_bf16"] == 2.0
    assert result["updates"]["fp8_tensorwise"]["against"] == pytest.approx(
        {
            "reference": "float32",
            "loss_gap_max": 0.005,
            "loss_gap_mean": 0.005 / 3,
            "speed": 8.0,
            "memory": 1.0,
            "gradient_cosine": 1.0,
            "score_gap_mean": 0.5,
            "score_gap_max": 1.0,
        }
    )
    assert result["verdicts"] == {
        "float32 runs": True,
        "bf16 runs": True,
        "bf16: loss within 1%": True,
        "fp8_delayed runs": False,
        "fp8_tensorwise runs": True,
        "fp8_tensorwise: loss within 1%": True,
        "fp8_tensorwise: step 1.25 times as fast as in bf16": True,
    }


def test_an_override_wins_over_the_checks_own_fields(tmp_path):
    override = "rollout.servers.mem_fraction=0.1"
    plan = Plan(
        machine=HOPPER | {"num_gpus": 1},
        folder=tmp_path,
        sizes=CheckSizes(),
        projection=ProjectionSizes(),
        overrides=(override,),
        is_smoke=False,
    )
    command = plan.trainer.command("run", "rollout.servers.mem_fraction=0.2")
    assert [field for field in command if field.startswith("rollout.servers.mem_fraction")][-1] == override


def test_a_checkpoint_that_changes_the_updates_after_it_or_does_not_load_misses_its_bar(tmp_path):
    def part(spec, *, ranks=1):
        if spec["loads"] and spec["recipe"] == "delayed":
            raise PartError("UnpicklingError: …")
        return {"series": [2.0, 4.0, 1.0, 2.0021 if spec["loads"] and spec["recipe"] == "tensorwise" else 2.0]}

    result = compare_resumed(HOPPER, tmp_path, run_part=part)
    assert result["resumed"]["fp8_delayed"] == {"error": "UnpicklingError: …"}
    assert result["resumed"]["fp8_tensorwise"]["gap"] == pytest.approx(0.00105)
    assert result["verdicts"] == {
        "float32: goes on within 0.001": True,
        "bf16: goes on within 0.001": True,
        "fp8_delayed: loads": False,
        "fp8_tensorwise: goes on within 0.001": False,
    }


def stage(name, result):
    calls = []

    def run():
        calls.append(name)
        if isinstance(result, Exception):
            raise result
        return result

    return Stage(name=name, about="what it shows", run=run), calls


def test_a_later_call_goes_on_after_the_stages_that_are_done(tmp_path):
    good, good_calls = stage("good", {"verdicts": {"bar": True}})
    missed, missed_calls = stage("missed", {"verdicts": {"bar": True, "other": False}})
    broken, broken_calls = stage("broken", PartError("RuntimeError: cuBLAS"))
    for _ in range(2):
        results = run_stages([good, missed, broken], tmp_path, {"device": "H100"}, lambda line: None)
    assert (len(good_calls), len(missed_calls), len(broken_calls)) == (1, 2, 2)
    assert [is_good(results[name]) for name in ("good", "missed", "broken")] == [True, False, False]
    assert results["broken"]["error"] == "RuntimeError: cuBLAS"
    run_stages([good], tmp_path, {"device": "another"}, lambda line: None)
    assert len(good_calls) == 2, "a result of another machine does not count"


def test_the_page_names_every_bar_that_was_missed():
    stages = [stage(name, {})[0] for name in ("kernels", "updates", "layouts")]
    results: dict[str, Any] = {
        "kernels": {"verdicts": {"fused agrees with eager": True}, "seconds": 3.0},
        "updates": {"error": "RuntimeError: cuBLAS", "verdicts": {}, "seconds": 1.0},
        "layouts": {"skipped": "needs two GPUs", "verdicts": {}, "seconds": 0.0},
    }
    machine = {"device": "NVIDIA H100", "num_gpus": 1, "features": "layers: Transformer Engine"}
    text = page("2026-11-26", machine, {"torch": "2.13.0"}, stages, results)
    assert "| kernels | what it shows | 1 of 1 bars met in 3 s |" in text
    assert "| updates | what it shows | failed: RuntimeError: cuBLAS |" in text
    assert "skipped: needs two GPUs" in text
    assert "- met: fused agrees with eager" in text
    results["kernels"]["verdicts"]["fused agrees with eager"] = False
    assert "- **missed**: fused agrees with eager" in page("", machine, {}, stages, results)


def test_one_gpu_skips_what_needs_two(tmp_path):
    machine = {**HOPPER, "num_gpus": 1, "features": ""}
    plan = Plan(machine=machine, folder=tmp_path, sizes=CheckSizes(), projection=ProjectionSizes(), is_smoke=False)
    stages = {one.name: one for one in plan_stages(plan, say=lambda line: None)}
    for name in ("layouts", "lost_server"):
        assert stages[name].run()["skipped"] == "needs two GPUs"


def test_only_recipes_of_the_machine_are_tried():
    assert [p.name for p in precisions(HOPPER)] == ["float32", "bf16", "fp8_delayed", "fp8_tensorwise"]


def test_a_gap_is_relative_to_the_reference_of_the_same_update():
    runs = [{"losses": losses, "step_s": 1.0, "peak_gib": 1.0} for losses in ([2.0, -4.0], [2.0, -5.0])]
    assert compare(*runs)["loss_gap_max"] == 0.25
    assert compare(*runs)["loss_gap_mean"] == 0.125


def test_opposite_gradients_have_cosine_minus_one():
    tensors = [{"gradient": sign * torch.tensor([1.0, 2.0]), "logp": torch.zeros(1)} for sign in (1, -1)]
    assert compare_tensors(*tensors)["gradient_cosine"] == pytest.approx(-1)


@pytest.mark.parametrize(
    ("device", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-40gb"),
        ("NVIDIA H20", "h20-96gb"),
    ],
)
def test_a_devices_rates_are_found_by_its_drivers_name(device, row):
    found = find_rates(device)
    assert found is not None
    assert found.name == row
    assert find_rates("CPU") is None


def test_the_batch_has_mid_groups_with_both_verdicts_and_traces():
    sizes = CheckSizes(hidden=64, head_dim=32, vocab=100, tokens=1024, length=32)
    samples = make_samples(sizes)
    totals = count(samples)
    assert totals.num_sequences == {SampleKind.TRACE: 3, SampleKind.ROLLOUT: 24}
    assert totals.num_prompts == 6
    assert sizes.tokens - 9 * sizes.length < sum(len(s.tokens) for s in samples) <= sizes.tokens
    assert {s.is_correct for s in samples if s.kind is SampleKind.ROLLOUT} == {True, False}


def test_sizes_that_hold_no_group_are_refused():
    with pytest.raises(ValueError, match="tokens=100: must hold a group and a trace: 9216 at least"):
        CheckSizes(tokens=100)
    assert architecture(CheckSizes()).ffn_hidden_size == 14336
