"""The code has everything that docs/adding_a_model.md says it has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"```python\n# (\S+)\n(.*?)```", GUIDE, flags=re.DOTALL)


def test_every_block_of_python_names_its_file():
    assert len(QUOTED) == GUIDE.count("```python") > 3


@pytest.mark.parametrize(("path", "code"), QUOTED)
def test_code_that_is_quoted_is_in_the_file_that_is_named(path, code):
    assert code in (ROOT / path).read_text(encoding="utf-8")


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"(?:megatron_dypo|tests|tools)/[\w./]*\w", GUIDE))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_names_in_the_text_are_names_in_the_code():
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "megatron_dypo").rglob("*.py")))
    sources += (ROOT / "tests" / "support" / "hf_models.py").read_text(encoding="utf-8")
    for name in ("architecture_from_hf", "refuse_unsupported", "check_length", "transformer_config", "layer_spec"):
        assert f"`{name}`" in GUIDE or f".{name}`" in GUIDE
        assert f"def {name}(" in sources
    for rule in re.findall(r"^\| `(\w+)\(", GUIDE, flags=re.MULTILINE):
        assert f"class {rule}(Rule):" in sources
