"""The environment of `make setup` can load what the project exports."""

import re
import subprocess
import sys
from pathlib import Path

from tests.support import published_files
from tests.support.pins import pins_of

REPOSITORY = Path(__file__).parents[2]


def test_model_classes_of_transformers_can_be_imported():
    code = "from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_environment_has_no_torchvision_and_its_setup_imports_a_model_class():
    pins = [pin for name in ("torch", "cpu") for pin in pins_of(REPOSITORY / "requirements" / f"{name}.txt")]
    assert not any(pin.startswith("torchvision") for pin in pins)
    setup = (REPOSITORY / "Makefile").read_text().partition("$(STAMP):")[2].partition("setup-nemo-run")[0]
    assert "from transformers import Qwen2ForCausalLM" in setup
    assert "uninstall --quiet --yes torchvision" in setup


def test_packages_of_published_files_are_pinned_and_on_no_import_path():
    pins = pins_of(REPOSITORY / "requirements" / "test_data.txt")
    assert published_files.FOLDER not in [Path(entry) for entry in sys.path]
    for name, version in (pin.split("==") for pin in pins):
        assert published_files.version_of(name) == version


def test_every_file_of_pins_but_torch_is_installed_with_hashes():
    setup = (REPOSITORY / "Makefile").read_text()
    for file in (REPOSITORY / "requirements").glob("*.txt"):
        assert pins_of(file)
        (variable,) = re.findall(rf"^(\w+) := requirements/{file.name}$", setup, re.MULTILINE)
        is_hashed = f"-r $({variable})" in setup
        assert is_hashed == (file.name != "torch.txt")
        for line in setup.splitlines():
            assert f"-r $({variable})" not in line or "--require-hashes" in line


def test_the_images_have_the_versions_that_are_tested():
    """Torch and Megatron-Core differ on purpose: an image has those of its CUDA and its Python."""
    pins = [pin for name in ("torch", "cpu") for pin in pins_of(REPOSITORY / "requirements" / f"{name}.txt")]
    tested = {name.lower(): version for name, version in (pin.split("==") for pin in pins)}
    images = sorted((REPOSITORY / "slurm").glob("Dockerfile*"))
    assert len(images) == 2
    for image in images:
        found = dict(re.findall(r"([A-Za-z][\w-]*)==([\w.]+)", image.read_text()))
        assert len(found) > 10
        for name, version in found.items():
            if name.lower() in tested and name not in ("torch", "megatron-core"):
                assert tested[name.lower()] == version, (image.name, name)
