"""The benchmarks run to their last line at meaninglessly small sizes; benchmarks/results has their measurements."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAST_LINES = {
    "packing": {"padding_share", "flops_imbalance"},
    "logprobs": {
        f"{what}_vs_{other}" for what in ("memory", "time") for other in ("eager", "chunked", "chunked_response")
    },
    "step_overhead": {"time_vs_sft", "memory_vs_sft", "memory_k64_vs_k4"},
    "memory_model": {"parameters", "gradients", "optimizer", "activations", "peak"},
    "plan_fit": {"step_median", "step_worst", "update_median", "update_worst"},
    "plan_search": {"search_70b_s", "search_235b_s"},
    "refit": {"bandwidth_vs_raw", "time_vs_broadcast", "time_vs_broadcast_2_servers"},
    "interval_coverage": {"coverage_3_or_more_seeds", "coverage_2_seeds"},
    "probe": {"time_vs_updates", "device_memory_128_vs_16", "host_vs_plan"},
    "probe_coverage": {"least_coverage"},
    "saving": {"async_share", "sync_share", "none_share"},
    "routes": {"read_vs_text", "cut_vs_whole", "gib_for_1024", "share_of_step"},
    "journal": {"write_vs_parse", "digest_vs_copy", "bytes_per_token", "us_per_token"},
    "controller": {
        *("cpu_vs_lists", "cpu_vs_lists_with_text", "cpu_vs_lists_with_routes", "longest_step_ms", "lag_p99_vs_lists"),
        *("cpu_8_vs_1", "mib_of_8"),
    },
    "data_files": {"index_vs_scan", "index_mib", "row_us", "reads_by_4"},
    "exchange": {"leader_4_vs_2", "assignment_64_vs_bytes"},
    "asynchrony": {"step_time_vs_sync", "accuracy", "accuracy_of_sync", "intervals_overlap"},
    "lm_eval_gsm8k": {"items", "same_responses", "correct_ours", "truncated", "correct_and_truncated"}
    | {
        f"{key}_{name}"
        for key in ("correct", "same_verdicts", "same_answers", "reasons")
        for name in ("flexible-extract", "strict-match")
    },
}
"""Benchmark → the names on its last line."""
CHEAP = ("packing", "plan_fit")
SLOW = (pytest.mark.slow, pytest.mark.timeout(1800))


def output_of(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=1700).stdout


def last_line(script, *arguments):
    return json.loads(output_of(script, *arguments).splitlines()[-1])


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in CHEAP else SLOW) for name in LAST_LINES])
def test_a_benchmark_says_where_it_ran_and_reaches_its_last_line(name, tmp_path):
    if name == "lm_eval_gsm8k" and not (ROOT / ".venv-lm-eval" / "bin" / "lm-eval").is_file():
        pytest.skip("needs make setup-lm-eval")
    where = ["--out", str(tmp_path / "out")] if name in ("asynchrony", "lm_eval_gsm8k", "saving") else []
    lines = output_of(f"{name}.py", "--smoke", *where).splitlines()
    header = "\n".join(line for line in lines if line.startswith(("# ", "$ ")))
    for pattern in (
        r"# \d{4}-\d\d-\d\d \d\d:\d\d UTC, commit (\w+|unknown)( with changes)?, Python 3\.\d+\.\d+, "
        r"torch \S+, megatron-core",
        r"# processor: .+, \d+ of \d+ cores usable, \d+ GiB",
        r"# load at the start: [\d.]+ over 1 minute",
        rf"\$ python benchmarks/{name}\.py --smoke",
        r"# load at the end: [\d.]+ over 1 minute",
    ):
        assert re.search(pattern, header), header
    assert set(json.loads(lines[-1])) == LAST_LINES[name]


def test_every_benchmark_has_a_smoke_a_row_in_the_readme_and_a_results_file():
    scripts = {
        path.stem
        for path in (ROOT / "benchmarks").glob("*.py")
        if '"--smoke"' in path.read_text(encoding="utf-8")
    }  # fmt: skip
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert scripts == set(LAST_LINES) == set(re.findall(r"`python benchmarks/(\w+)\.py`", readme))
    assert scripts == {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.txt")}


def test_packing_leaves_little_padding():
    result = last_line("packing.py", "--sequences", "64", "--draws", "1", "--budgets", "16384", "--many", "500")
    assert 0 <= result["padding_share"] <= 0.02


def test_every_shape_can_be_divided_over_both_numbers_of_ranks(benchmarks):
    from step_overhead import SHAPES, check_shapes

    check_shapes(list(SHAPES), [1, 2])


def test_a_number_of_ranks_that_divides_no_shape_is_refused_at_the_start(benchmarks):
    from step_overhead import check_shapes

    with pytest.raises(ValueError, match=r"--ranks 3: shape 'main': parallel\.tensor=3 does not divide"):
        check_shapes(["main"], [1, 3])


def test_the_interval_of_an_asynchronous_run_is_that_of_its_own_number_of_samples(benchmarks, tmp_path, capsys):
    from asynchrony import measure

    from megatron_dypo.metrics.intervals import wilson_interval

    rows = [
        {"step": step, "timing_s/step": float(step), "rollout/policy_version": step - 1, "timing_s/gen": 0.5}
        for step in range(1, 5)
    ]
    del rows[1]["rollout/policy_version"]  # a step that learned from queued groups
    rows[-1] |= {"eval/heldout/accuracy": 0.5, "eval/heldout/num_samples": 40}
    (tmp_path / "sync").mkdir()
    (tmp_path / "sync" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure(tmp_path, "sync", 2)
    assert (found["low"], found["high"]) == wilson_interval(0.5, 40)
    assert found["seconds"] == 3.0  # of steps 2 and 4: the first step of a block is left out
    assert "[[2.0], [4.0]]" in capsys.readouterr().out


@pytest.fixture(scope="module")
def shape():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from step_overhead import Shape

    sys.path.remove(str(ROOT / "benchmarks"))
    tiny = Shape(hidden=128, layers=2, ffn=64, vocab=500, rollouts=4, traces=1, group_size=2, length=16)
    return json.dumps(dataclasses.asdict(tiny))


def test_updates_are_timed_in_turn(shape):
    result = last_line("step_overhead.py", "--measure", "time", "--shape", shape, "--rounds", "2")
    assert {name: len(values) for name, values in result["wall"].items()} == {"dypo": 2, "sft": 2, "sft_unfused": 2}
    assert min(result["scoring"], *result["wall"]["dypo"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dypo", "sft"])
def test_peak_memory_holds_parameters_gradients_and_moments(shape, variant):
    result = last_line("step_overhead.py", "--measure", f"memory:{variant}", "--shape", shape)
    parameters = 2 * 500 * 128
    assert result["total"] > 4 * 4 * parameters
    assert result["total"] >= result["step"] > 0
