"""What a start and ``megatron-dypo check`` say of a model without a name table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_dypo.check.inputs import check_inputs
from megatron_dypo.check.report import to_text
from megatron_dypo.check.survey import survey
from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.tree import Config
from tests.support.bridged_models import NEEDS_BRIDGE, make_bridged_model
from tests.support.check_cases import MODEL, write_case


def bridged_case(folder: Path, *overrides: str) -> Config:
    path = write_case(folder, model={"model_type": "nemotron"})
    return load_config(path, ["model.family=bridge", *overrides])


@pytest.fixture
def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)


@pytest.mark.usefixtures("without_package")
def test_a_start_misses_the_package_and_finds_nothing_else(tmp_path: Path) -> None:
    found = check_inputs(bridged_case(tmp_path))
    assert found.problems == []
    (line,) = found.missing
    assert line.startswith("model.family=bridge: needs the package megatron-bridge, which is not installed")


@pytest.mark.usefixtures("without_package")
def test_parameters_are_counted_by_the_tensors_of_the_folder(tmp_path: Path) -> None:
    config = bridged_case(tmp_path)
    save_file({"a": np.zeros((30, 40), np.float32), "b": np.zeros(7, np.float32)}, tmp_path / "model/model.safetensors")
    assert "nemotron, 1,207 parameters" in to_text(survey(config, show_progress=False))
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "nemotron, an unknown number of parameters" in to_text(survey(config, show_progress=False))


@NEEDS_BRIDGE
def test_a_model_that_megatron_bridge_does_not_take_is_a_problem_before_a_start(tmp_path: Path) -> None:
    config = bridged_case(tmp_path)
    make_bridged_model("nemotron", tmp_path / "model", vocab_size=MODEL["vocab_size"])
    assert check_inputs(config).problems == []
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "silu"}))
    (problem,) = check_inputs(config).problems
    assert problem.startswith(f"{file}: model_type='nemotron': Megatron-Bridge's provider has activation_func=")
    assert problem.endswith("config.json says hidden_act='silu'")
