"""The key under which verdicts on traces are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.loop.setup.teachers import verifier_key


def test_verdicts_depend_on_the_grading_and_on_the_files_of_its_verifiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_package" / "judge.py"
    module.parent.mkdir()
    module.write_text("raise RuntimeError('nobody imports it here')")
    cfg = GradingConfig(verifier="my_package.judge:verify")
    first = verifier_key(cfg)
    assert first
    assert verifier_key(cfg) == first
    assert verifier_key(GradingConfig(verifier="my_package.judge:verify", deadline_s=1.0)) != first
    module.write_text("other")
    assert verifier_key(cfg) != first
    module.unlink()
    (tmp_path / "my_package" / "judge").mkdir()
    (tmp_path / "my_package" / "judge" / "__init__.py").write_text("")
    assert verifier_key(cfg) not in ("", first)


def test_verdicts_of_a_verifier_whose_file_nobody_finds_are_not_kept() -> None:
    assert verifier_key(GradingConfig(by_source={"a": "no_such_package.judge:verify"})) == ""


def test_built_in_verifiers_differ() -> None:
    keys = {verifier_key(GradingConfig(verifier=name)) for name in ("math", "exact", "choice")}
    assert len(keys) == 3
    assert "" not in keys
