"""The environment of `make setup` can load what the project exports."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support import published_files

REPOSITORY = Path(__file__).parents[2]


def test_model_classes_of_transformers_can_be_imported():
    code = "from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_environment_has_no_torchvision_and_its_setup_imports_a_model_class():
    pins = (REPOSITORY / "requirements" / "cpu.txt").read_text()
    assert not re.search(r"^torchvision", pins, re.MULTILINE)
    setup = (REPOSITORY / "Makefile").read_text().partition("$(STAMP):")[2].partition("setup-nemo-run")[0]
    assert "from transformers import Qwen2ForCausalLM" in setup
    assert "uninstall --quiet --yes torchvision" in setup


def test_packages_of_published_files_are_pinned_and_on_no_import_path():
    lines = (REPOSITORY / "requirements" / "test_data.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", pin) for pin in pins)
    assert published_files.FOLDER not in [Path(entry) for entry in sys.path]
    for name, version in (pin.split("==") for pin in pins):
        assert published_files.version_of(name) == version
