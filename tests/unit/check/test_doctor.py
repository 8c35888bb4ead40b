"""What `megatron-dypo doctor` says about an environment, and its exit status."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_dypo.check import installed
from megatron_dypo.check.doctor import Line, Use, Verdict, examine, possible, to_text
from megatron_dypo.check.installed import Installed, look
from megatron_dypo.cli import app

H100 = "NVIDIA H100 80GB HBM3 (9.0)"
GPUS = Installed(
    python="3.12.3",
    versions={
        "torch": "2.11.0+cu130",
        "megatron-core": "0.18.0",
        "transformer-engine": "2.16.1",
        "sglang": "0.5.23",
        "sglang-router": "0.3.2",
        "transformers": "5.6.0",
    },
    apex="NVIDIA",
    toolkit="13.0",
    gpus=(H100,) * 8,
)
"""An environment on eight GPUs in which all is well."""
CPU = dataclasses.replace(GPUS, python="3.11.7", apex=None, toolkit=None, gpus=())


def line(found: Installed, name: str) -> Line:
    return next(one for one in examine(found) if one.name == name)


def having(found: Installed, **versions: str) -> Installed:
    return dataclasses.replace(
        found, versions={**found.versions, **{k.replace("_", "-"): v for k, v in versions.items()}}
    )


def without(found: Installed, *names: str) -> Installed:
    return dataclasses.replace(found, versions={k: v for k, v in found.versions.items() if k not in names})


def test_where_all_is_well_every_line_is_ok() -> None:
    lines = examine(GPUS)
    assert {one.verdict for one in lines} == {Verdict.OK}
    assert not any(possible(GPUS, lines).values())
    assert line(GPUS, "GPUs").found == f"8 × {H100}"


@pytest.mark.parametrize(
    ("found", "name", "verdict", "advice"),
    [
        (dataclasses.replace(GPUS, python="3.9.1"), "python", "wrong", "use Python >=3.10,<3.14"),
        (dataclasses.replace(GPUS, python="3.14.0"), "python", "wrong", "use Python >=3.10,<3.14"),
        (having(GPUS, torch="2.7.1"), "torch", "wrong", "pip install 'torch>=2.8'"),
        (dataclasses.replace(GPUS, torch_error="libcudart.so"), "torch", "wrong", "cannot be imported: libcudart.so"),
        (having(GPUS, torch="2.15.0"), "torch", "limited", "broadcast hangs"),
        (having(without(GPUS, "sglang"), torch="2.15.0"), "torch", "ok", ""),
        (having(GPUS, megatron_core="0.20.0"), "megatron-core", "wrong", "'megatron-core>=0.16,<0.20'"),
        (having(CPU, megatron_core="0.16.1"), "megatron-core", "ok", ""),
        (having(CPU, megatron_core="0.16.0"), "megatron-core", "wrong", "pip install megatron-core==0.16.1"),
        (having(GPUS, transformer_engine="2.0.0"), "transformer-engine", "wrong", "'transformer-engine>=2.9,<3'"),
        (CPU, "transformer-engine", "limited", "torch sees no GPU"),
        (having(GPUS, sglang="0.5.12.post1"), "sglang", "limited", "p2p and local need 0.5.22"),
        (having(GPUS, sglang="0.5.11"), "sglang", "wrong", "'sglang>=0.5.12,<0.5.24'"),
        (having(GPUS, sglang="0.5.24"), "sglang", "wrong", "'sglang>=0.5.12,<0.5.24'"),
        (dataclasses.replace(GPUS, apex="PyPI"), "apex", "limited", "pip uninstall apex"),
        (without(GPUS, "sglang-router"), "sglang-router", "-", "rollout.router"),
        (CPU, "GPUs", "-", "runs are on the CPU"),
        (dataclasses.replace(GPUS, gpus=()), "GPUs", "-", "toolkit 13.0: see nvidia-smi"),
    ],
)
def test_a_verdict_says_what_to_change(found: Installed, name: str, verdict: str, advice: str) -> None:
    examined = line(found, name)
    assert examined.verdict.value == verdict
    assert advice in examined.advice
    assert bool(examined.advice) == bool(advice)


def test_the_report_is_a_table_whose_columns_are_aligned() -> None:
    lines = examine(CPU)
    text = to_text(lines, possible(CPU, lines))
    rows, can = text.split("\n\n")
    start = rows.splitlines()[0].index("verdict")
    for row, examined in zip(rows.splitlines()[1:], lines, strict=True):
        assert row[start:].startswith(examined.verdict.value)
        assert row.startswith(examined.name)
    assert can == "This environment can  start jobs: yes   train: no (megatron-core wrong)   serve: yes"


def test_a_use_is_possible_only_with_its_packages() -> None:
    bare = without(CPU, *CPU.versions)
    uses = possible(bare, examine(bare))
    assert uses == {Use.TRAIN: "torch, megatron-core missing", Use.SERVE: "sglang missing"}


@pytest.mark.parametrize(
    ("found", "arguments", "status"),
    [
        (GPUS, [], 0),
        (without(GPUS, "sglang"), ["--for", "train"], 0),
        (without(GPUS, "sglang"), ["--for", "train", "--for", "serve"], 1),
        (without(CPU, *CPU.versions), [], 0),
        (without(CPU, *CPU.versions), ["--for", "train"], 1),
        (having(GPUS, torch="2.7.0"), [], 1),
    ],
)
def test_the_exit_status_tells_a_wrong_package_and_an_impossible_use(
    found: Installed, arguments: list[str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_dypo.check.cli.look", lambda: found)
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert done.exit_code == status, done.output


def test_this_environment_is_found() -> None:
    found = look()
    assert found.versions["torch"].startswith("2.")
    assert found.torch_error is None
    assert line(found, "megatron-core").verdict is Verdict.OK


@pytest.mark.parametrize(
    ("package", "folder", "expected"),
    [("apex", "multi_tensor_apply", "NVIDIA"), ("apex", "lib", "PyPI"), ("", "", None)],
)
def test_the_two_projects_called_apex_are_told_apart(
    package: str, folder: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package:
        (tmp_path / package / folder).mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert look_for_apex() == expected


def look_for_apex() -> str | None:
    return dataclasses.replace(CPU, apex=installed._find_apex()).apex


def test_the_command_works_where_torch_is_missing_and_where_it_is_broken() -> None:
    """An environment that only starts jobs has no torch; one without the libraries of GPUs cannot import it."""
    code = (
        "import importlib.metadata as m, sys\nfrom megatron_dypo.cli import app\nsys.modules['torch'] = None\n"
        "upstream = m.version\n"
        "def version(name):\n    if name in sys.argv[2:]: raise m.PackageNotFoundError(name)\n"
        "    return upstream(name)\n"
        "m.version = version\napp(sys.argv[1:2])"
    )

    def run(*missing: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "doctor", *missing], capture_output=True, text=True, timeout=120
        )

    gone = run("torch", "megatron-core", "sglang")
    assert gone.returncode == 0, gone.stderr
    assert "train: no (torch, megatron-core missing)   serve: no (sglang missing)" in gone.stdout
    broken = run()
    assert broken.returncode == 1, broken.stderr
    assert "cannot be imported: import of torch halted" in broken.stdout
