from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.config.reading.load import load_config
from megatron_dypo.planning.refit import RefitOptions, plan_of_config
from megatron_dypo.refit.plan.refit_plan import Mesh, ServerMesh
from tests.support.big_models import QWEN3_235B_A22B

SMALL = {
    "model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def config_path(tmp_path):
    def write(hf=SMALL):
        (tmp_path / "config.json").write_text(json.dumps(hf))
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"model": {"hf_path": str(tmp_path)}, "data": {"prompts": ["p.jsonl"]}}))
        return path

    return write


def invoke(*args):
    return CliRunner().invoke(app, ["plan-refit", *map(str, args)])


def test_the_plan_is_that_of_the_configs_trainer_and_servers(config_path):
    overrides = [
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.virtual_pipeline=2",
        "rollout.servers.urls=[http://a, http://b, http://c]",
        "rollout.servers.tensor_parallel=4",
        "model.dtype=float32",
    ]
    made = plan_of_config(load_config(config_path(), overrides), RefitOptions(world_size=12))
    assert made.source == Mesh(tensor=2, pipeline=2, virtual_pipeline=2, data=3)
    assert made.servers == (ServerMesh(tensor=4),) * 3
    assert made.encoding.element_size == 4


def test_a_rank_sends_the_layers_of_its_stage(config_path):
    """Each layer is sent once; the first and last stage also send the tensors before and after the layers."""
    stages = ["parallel.pipeline=2", "parallel.first_stage_layers=1", "model.dtype=float32"]
    result = invoke(config_path(), *stages, "--json")
    assert result.exit_code == 0, result.output
    layer, vocabulary = 2 * 64 + 4 * 64 * 64 + 3 * 64 * 128, 100 * 64
    sent = [row["bytes"] for row in json.loads(result.stdout)["sent"]]
    assert sent == [4 * (vocabulary + layer), 4 * (3 * layer + 64 + vocabulary)]


@pytest.mark.parametrize("extra", ["[--ep-size, '2']", "[--ep-size=2]"])
def test_servers_that_the_run_starts_have_the_expert_parallelism_of_their_arguments(config_path, extra):
    overrides = ["rollout.servers.tensor_parallel=4", f"rollout.servers.extra_args={extra}"]
    resolved = load_config(config_path(QWEN3_235B_A22B), overrides)
    assert plan_of_config(resolved, RefitOptions()).servers == (ServerMesh(tensor=4, expert=2),)
    assert plan_of_config(resolved, RefitOptions(ep_size=4)).servers == (ServerMesh(tensor=4, expert=4),)


def test_json_has_every_rank_and_link(config_path):
    result = invoke(config_path(), "parallel.tensor=2", "rollout.servers.per_node=2", "--world-size", "4", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["rank"] for row in report["sent"]] == [0, 1, 2, 3]
    assert [(row["server"], row["rank"]) for row in report["received"]] == [(0, 0), (1, 0)]
    parameters = 2 * 100 * 64 + 64 + 4 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 128)
    assert report["total_bytes"] == 2 * 2 * parameters


def test_the_text_names_limit_and_prediction_at_the_bandwidth(config_path):
    result = invoke(config_path(), "--bandwidth-gbs", "25")
    assert result.exit_code == 0, result.output
    assert "25 GB/s" in result.stdout
    assert "1.00 × the limit" in result.stdout


def test_a_layout_that_only_the_plan_knows_is_planned_with_a_note(config_path):
    stages = ["parallel.pipeline=4", "parallel.first_stage_layers=23", "parallel.last_stage_layers=23"]
    result = invoke(config_path(QWEN3_235B_A22B), "parallel.tensor=8", "parallel.expert=8", *stages)
    assert result.exit_code == 0, result.output
    assert "note: `train` refuses this layout: parallel.tensor=8 does not divide num_key_value_heads=4" in result.stderr


def test_what_does_not_fit_is_one_line_of_error(config_path):
    command = [sys.executable, "-m", "megatron_dypo.cli", "plan-refit", str(config_path()), "parallel.tensor=3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 65
    assert result.stderr == "megatron-dypo: error: tensor_parallel=3 does not divide num_attention_heads=4\n"
    with pytest.raises(ValueError, match="world_size=3: must be a multiple of tensor × pipeline × context = 2 × 1 × 1"):
        plan_of_config(load_config(config_path(), ["parallel.tensor=2"]), RefitOptions(world_size=3))
