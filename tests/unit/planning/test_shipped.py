"""Plans of published models without their folders."""

import configparser
import dataclasses

import pytest
from typer.testing import CliRunner

from megatron_dypo.cli import app
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.planning.parameters import whole_model
from megatron_dypo.planning.shipped import shipped_architecture, shipped_models
from tests.support.planning_cases import CONFIGS, ROOT

PARAMETERS = {
    "glm-4.5": 358.34e9 - 5.54e9,
    "glm-4.5-air": 110.47e9 - 3.62e9,
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.55e9,
    "llama3-405b": 405.85e9,
    "qwen2.5-math-7b": 7.62e9,
    "qwen3-8b": 8.19e9,
    "qwen3-32b": 32.76e9,
    "qwen3-30b-a3b": 30.53e9,
    "qwen3-235b-a22b": 235.09e9,
    "smollm2-135m": 134.5e6,
    "gpt-oss-20b": 20.91e9,
    "gpt-oss-120b": 116.83e9,
}
"""Published numbers of parameters (model cards), without layers that predict further tokens."""


def test_every_shipped_model_has_its_published_number_of_parameters():
    assert set(shipped_models()) == set(PARAMETERS)
    for name, published in PARAMETERS.items():
        assert whole_model(shipped_architecture(name)).total == pytest.approx(published, rel=0.002), name


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("llama3-70b", ROOT / "examples" / "llama3_70b" / "model"),
        ("qwen3-235b-a22b", CONFIGS / "qwen3_235b_a22b"),
        ("qwen2.5-math-7b", CONFIGS / "qwen2_5_math_7b"),
    ],
)
def test_a_shipped_model_is_that_of_its_folder(name, folder):
    ours, theirs = (dataclasses.asdict(arch) for arch in (shipped_architecture(name), load_architecture(folder)))
    assert ours == theirs


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        (ROOT / "examples" / "llama3_70b" / "config.yaml", "llama3-70b", "llama, 70.55e9 parameters"),
        (CONFIGS / "qwen3_235b_a22b.yaml", "glm-4.5-air", "glm4_moe, 106.85e9 parameters"),
    ],
)
def test_plan_needs_no_folder_for_a_named_model(config, name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["plan", str(config), f"--model={name}", "--nodes=8"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{name}: {expected}")


def test_an_unknown_model_is_refused_with_the_nearest_known_one():
    with pytest.raises(ValueError, match=r"model='llama3-7b': must be one of .*\(did you mean llama3-[78]0?b\?\)"):
        shipped_architecture("llama3-7b")


def test_the_sizes_are_in_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = setup["options.package_data"]["megatron_dypo.planning"].split()
    assert len([*(ROOT / "megatron_dypo" / "planning").glob(patterns[0])]) == len(PARAMETERS)
