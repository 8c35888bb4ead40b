"""The direction of imports: the contract of setup.cfg holds, can fail, and agrees with the documents."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = Path(sys.executable).parent / "lint-imports"


def sections() -> dict[str, configparser.SectionProxy]:
    """Return the sections of setup.cfg that import-linter reads, by the name of the contract."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    prefix = "importlinter:contract:"
    return {name.removeprefix(prefix): parser[name] for name in parser.sections() if name.startswith(prefix)}


def layers() -> list[list[str]]:
    """Return the rooms of each layer, lowest layer first."""
    lines = sections()["rooms"]["layers"].split("\n")
    return [re.findall(r"\w+", line) for line in reversed(lines) if line.strip()]


def lint(folder: Path, *contracts: str) -> subprocess.CompletedProcess[str]:
    chosen = [word for contract in contracts for word in ("--contract", contract)]
    return subprocess.run(
        [LINT, "--no-logo", "--no-cache", *chosen],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_package_keeps_every_contract():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout
    assert f"{len(sections())} kept, 0 broken" in done.stdout


def test_no_import_is_excepted():
    assert [name for name, section in sections().items() if "ignore_imports" in section] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_the_layers_in_the_order_of_the_contract(document):
    text = " ".join((ROOT / document).read_text().split())
    (sentence,) = re.findall(r"rooms on its left[^:]*: ([^.]+)\.", text)
    assert [re.findall(r"\w+", part) for part in sentence.split("→")] == layers()


@pytest.mark.parametrize(
    ("contract", "room", "line"),
    [
        ("rooms", "data", "import megatron_dypo.loop"),
        ("rooms", "parallel", "import megatron_dypo.config"),
        ("rooms", "types", "import megatron_dypo.checks"),
        ("megatron", "loop", "from megatron.core import parallel_state"),
        ("sglang", "refit", "import sglang"),
        ("plain", "config", "import torch.distributed"),
        ("plain", "grading", "import megatron_dypo.heavy"),
    ],
)
def test_an_import_against_a_contract_breaks_it(contract, room, line, tmp_path):
    package = tmp_path / "megatron_dypo"
    for name in (room for layer in layers() for room in layer):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").touch()
    (package / "__init__.py").touch()
    if contract != "rooms":  # the contract "rooms" has every module of the package
        (package / "heavy.py").write_text("import torch\n")
    (package / "mcore" / "model.py").write_text("import megatron.core\n")
    server = package / "rollout" / "server"
    server.mkdir()
    (server / "__init__.py").touch()
    for launcher in ("sglang_cpu", "sglang_keyed"):
        (server / f"{launcher}.py").write_text("import sglang\n")
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    before = lint(tmp_path, contract)
    assert before.returncode == 0, before.stdout
    (package / room / "__init__.py").write_text(line + "\n")
    after = lint(tmp_path, contract)
    assert after.returncode == 1
    assert f"megatron_dypo.{room}" in after.stdout.partition("Broken contracts")[2]
