"""The check of a GPU machine, on a machine without one: its code on a CPU, and its verdicts on results."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_dypo.planning.devices import find_rates
from megatron_dypo.types import SampleKind
from tests.support.tool_commands import run_tool
from tools.gpu_parts.check import PartError, compare, compare_tensors, precisions, run_check
from tools.gpu_parts.logprob_speed import ProjectionSizes
from tools.gpu_parts.synthetic import CheckSizes, architecture, count, make_samples

HOPPER = {"device": "NVIDIA H100 80GB HBM3", "on_gpu": True, "fp8_obstacles": {"mxfp8": "…", "blockwise": "…"}}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")


@without_gpu
def test_without_a_gpu_it_says_so_in_one_line():
    result = run_tool("gpu_check.py")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "gpu_check: no GPU here: torch sees none; --cpu-smoke runs the same code in small\n"


@without_gpu
def test_the_smoke_run_trains_in_two_precisions_that_agree(tmp_path):
    out = tmp_path / "new" / "smoke.json"
    done = run_tool("gpu_check.py", "--cpu-smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert list(result["updates"]) == ["float32", "bf16"]
    assert all(result["verdicts"].values())
    losses = result["updates"]["float32"]["losses"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    against = result["updates"]["bf16"]["against"]
    assert against["gradient_cosine"] > 0.999
    assert 0 < against["score_gap_mean"] < 0.05
    values = [result["logprobs"][name]["mean_logp"] for name in ("fused", "eager", "megatron")]
    assert max(values) - min(values) < 1e-5
    assert {"torch", "megatron-core"} <= set(result["versions"])


def part_of_a_hopper(spec):
    """Tensorwise is fast and agrees; delayed fails."""
    if spec["what"] == "logprobs":
        raise PartError("out of luck")
    if spec["recipe"] == "delayed":
        raise PartError("RuntimeError: cuBLAS")
    is_fp8 = spec["recipe"] != "none"
    tensors = {"gradient": torch.tensor([1.0, 0.0]).bfloat16(), "logp": torch.tensor([-1.0, -2.0 - is_fp8])}
    torch.save(tensors, spec["keep"])
    return {
        "losses": [1.0, 2.0, 2.01 if is_fp8 else 2.0],
        "step_s": 0.5 if is_fp8 else 1.0,
        "tokens_per_s": 1.0,
        "model_flops_per_s": 98.9e12,
        "peak_gib": 3.0,
    }


def test_a_part_that_fails_is_reported_and_stops_no_other(tmp_path):
    sizes = CheckSizes(hidden=64, head_dim=32, tokens=512, length=32)
    result = run_check(HOPPER, sizes, ProjectionSizes(), tmp_path, run_part=part_of_a_hopper, say=lambda line: None)
    assert result["updates"]["fp8_delayed"] == {"error": "RuntimeError: cuBLAS"}
    assert result["logprobs"] == {"error": "out of luck"}
    assert result["updates"]["bf16"]["mfu"] == pytest.approx(0.1)
    assert result["updates"]["fp8_tensorwise"]["against"] == pytest.approx(
        {
            "reference": "bf16",
            "loss_gap_max": 0.005,
            "loss_gap_mean": 0.005 / 3,
            "speed": 2.0,
            "memory": 1.0,
            "gradient_cosine": 1.0,
            "score_gap_mean": 0.5,
            "score_gap_max": 1.0,
        }
    )
    assert result["verdicts"] == {
        "bf16 runs": True,
        "fp8_delayed runs": False,
        "fp8_tensorwise runs": True,
        "fp8_tensorwise: loss within 1%": True,
        "fp8_tensorwise: step 1.25 times as fast": True,
    }


def test_only_recipes_of_the_machine_are_tried_after_bf16():
    assert [p.name for p in precisions(HOPPER)] == ["bf16", "fp8_delayed", "fp8_tensorwise"]


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
