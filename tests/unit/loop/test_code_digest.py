"""The digest of a module's code changes with every file that decides what the module does, and with nothing else."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_dypo.loop.setup.code_digest import digest_of_module, digest_of_program


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules on the path."""
    folder = tmp_path / "code"
    for name, text in {
        "lone_judge.py": "import os, near_rules as rules\nfrom json import loads\n",
        "near_rules.py": "    from far_rules.words import right\n",
        "far_rules/words.py": "right = 1\n",
        "unrelated.py": "",
        "whole_judge/__init__.py": "from whole_judge.inner import verify\n",
        "whole_judge/inner.py": "def verify(response, answer): return True\n",
        "whole_judge/deep/tables.py": "",
        "whole_judge/words.txt": "",
        "spread_judge/judge.py": "",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.mark.parametrize(
    ("module", "file", "counts"),
    [
        ("lone_judge", "lone_judge.py", True),
        ("lone_judge", "near_rules.py", True),
        ("lone_judge", "far_rules/words.py", True),
        ("lone_judge", "unrelated.py", False),
        ("lone_judge", "whole_judge/inner.py", False),
        ("whole_judge", "whole_judge/inner.py", True),
        ("whole_judge.inner", "whole_judge/__init__.py", True),
        ("whole_judge.inner", "whole_judge/deep/tables.py", True),
        ("whole_judge.inner", "whole_judge/words.txt", False),
        ("whole_judge.inner", "lone_judge.py", False),
        ("spread_judge.judge", "spread_judge/judge.py", True),
    ],
)
def test_a_change_counts_in_the_package_and_in_modules_beside_it_that_are_imported(
    code: Path, module: str, file: str, counts: bool
) -> None:
    before = digest_of_module(module)
    assert before is not None
    with (code / file).open("a") as opened:
        opened.write("# changed\n")
    assert (digest_of_module(module) != before) is counts


def test_a_new_or_renamed_file_of_the_package_counts(code: Path) -> None:
    before = digest_of_module("whole_judge")
    (code / "whole_judge" / "inner.py").rename(code / "whole_judge" / "other.py")
    renamed = digest_of_module("whole_judge")
    (code / "whole_judge" / "new.py").write_text("")
    assert len({before, renamed, digest_of_module("whole_judge")}) == 3


def test_moved_code_has_the_same_digest(code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [digest_of_module(name) for name in ("lone_judge", "whole_judge.inner")]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "moved"), *(path for path in sys.path if path != str(code))])
    shutil.move(code, tmp_path / "moved")
    assert [digest_of_module(name) for name in ("lone_judge", "whole_judge.inner")] == before


def test_installed_modules_beside_an_installed_one_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "installed_judge.py").write_text("import installed_rules\n")
    (installed / "installed_rules.py").write_text("")
    monkeypatch.syspath_prepend(str(installed))
    before = digest_of_module("installed_judge")
    (installed / "installed_rules.py").write_text("changed = True\n")
    assert digest_of_module("installed_judge") == before is not None


@pytest.mark.parametrize(
    "module", ["no_such_judge", "no_such_judge.inner", "whole_judge.absent", "lone_judge.inner", "math", "without_spec"]
)
def test_a_module_without_a_python_file_has_no_digest(code: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, "without_spec", ModuleType("without_spec"))
    assert digest_of_module(module) is None


def test_the_programs_digest_is_of_the_files_of_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import megatron_dypo

    before, grading = digest_of_program(), digest_of_program("grading")
    copy = tmp_path / "megatron_dypo"
    shutil.copytree(megatron_dypo.__path__[0], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(megatron_dypo, "__path__", [str(copy)])
    assert digest_of_program() == before
    (copy / "loop" / "train.py").write_text("")
    assert digest_of_program() != before
    assert digest_of_program("grading") == grading
