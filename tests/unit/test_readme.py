"""The README describes the package correctly."""

import json
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_dypo
from megatron_dypo.config.reading.load import parse_config
from megatron_dypo.config.reference import sections
from megatron_dypo.grading.math import verify_math
from megatron_dypo.metrics.names import lookup
from megatron_dypo.metrics.samples import RolloutRow, SampleRow
from megatron_dypo.objective.metrics_page import all_metrics
from megatron_dypo.supported import CPU_CORES, RANGES
from megatron_dypo.types import DropReason, Tier, Treatment
from tests.support.pins import pins_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_config_example_is_valid():
    (text,) = _blocks("yaml")
    config = parse_config(yaml.safe_load(text), where="README.md")
    assert config.parallel.tensor == 4


def test_the_line_of_data_has_the_fields_that_prompt_files_have():
    (text,) = _blocks("json")
    row = json.loads(text)
    assert set(row) == {"prompt", "answer", "source", "traces"}
    assert all(verify_math(trace, row["answer"]) for trace in row["traces"].values())


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    pages = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z0-9-]+)|`make ([a-z0-9-]+)", pages, flags=re.MULTILINE))
    assert {first or second for first, second in named} <= targets


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "megatron_dypo|examples|tests|tools|requirements|docs"
    named = set(re.findall(rf"`((?:{folders})/[\w./]*)`", text)) | set(re.findall(r"\]\((?!http)([^)]+)\)", text))
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert named
    assert missing == []


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md")))
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#[\w-]*)?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert [link for link in links if link and not (ROOT / "docs" / link).exists()] == []


def test_the_first_screen_says_what_has_run_and_what_has_not():
    box = " ".join(line for line in README.splitlines() if line.startswith("> "))
    assert f"version {megatron_dypo.__version__}" in box
    for word in ("CPUs", "gloo", "SGLang", "Slurm", "GPU", "NCCL", "Transformer Engine", "FP8"):
        assert word in box
    assert README.index("> **Status") < README.index("## Quickstart")


def test_how_long_the_quickstart_takes_is_said_once():
    pages = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*/README.md"))]
    pages += [(ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "docs/index.md", "docs/quickstart.md")]
    assert sum(len(re.findall(r"(?:six|ten|\d+) minutes\b(?! ahead)", page)) for page in pages) == 1


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_verifier_of_the_readme_judges_in_eight_lines():
    (code,) = _blocks("python")
    assert len([line for line in code.splitlines() if line]) <= 8
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["score"]("17 + 25 = 42.", "42") == {"is_correct": True, "reward": 1.0}
    assert names["score"]("41, no: 43", "42") == {"is_correct": False, "reward": 0.0}


def test_features_name_keys_with_their_defaults():
    rows = re.findall(r"^\| [^|]+ \| (`[^|]+) \| `([^|`]+)` \|$", README, flags=re.MULTILINE)
    defaults = {key.path: key.facts() for section in sections() for key in section.keys}
    named = [(key, default) for keys, default in rows for key in re.findall(r"`([\w.]+)`", keys)]
    assert len(named) >= 10
    assert [key for key, default in named if f"default `{default}`" not in defaults.get(key, "")] == []


def test_results_name_commands_that_exist():
    for script in re.findall(r"`python ([\w/]+\.py)`", README):
        assert (ROOT / script).is_file()


def test_defaults_in_the_glossary_are_those_of_the_config():
    config = parse_config({"model": {"hf_path": "m"}, "data": {"prompts": ["p"]}}, where="test")
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in page.splitlines() if re.match(r"\| [kαγβε]", line)]
    assert len(rows) >= 6
    for _, _, keys, default in rows:
        for key in re.findall(r"`([\w.]+)`", keys):
            assert operator.attrgetter(key)(config) == float(default)


def test_metrics_that_the_glossary_names_are_written():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:train|rollout|gate|gal|eval|perf|score|queue|refit)/[\w/<>]+)`", page))
    assert len(named) >= 8
    for name in named:
        lookup(name.replace("<set>", "held_out"), all_metrics())


def test_reasons_and_treatments_in_the_glossary_are_those_of_the_package():
    page = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    for value in (*DropReason, *Treatment, *Tier):
        assert f"`{value.value}`" in page
    for field in (*SampleRow.__annotations__, *RolloutRow.__annotations__):
        assert f"`{field}`" in page


def test_ranges_are_those_that_the_package_checks():
    """tests/unit/test_supported.py compares these with setup.cfg."""
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    for package, works in RANGES.items():
        assert f"| {package} | `{works}` |" in page
    for core in CPU_CORES:
        assert core in README
        assert core in page
    for stated in ("3.10 to 3.13", "2.8 or newer", "0.16 to 0.19", "0.5.12 to 0.5.23", "2.9 or newer"):
        assert stated in README


def test_pins_are_exact_and_cover_what_the_package_asks_for():
    pins = [pin for name in ("torch", "cpu") for pin in pins_of(ROOT / "requirements" / f"{name}.txt")]
    pinned = {_canonical(pin.split("==")[0]) for pin in pins}
    assert len(pinned) == len(pins)
    metadata = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    required = re.search(r"install_requires =\n((?:    .*\n)+)", metadata)
    assert required is not None
    names = [re.split(r"[<>=\[]", line.strip())[0] for line in required[1].splitlines()]
    assert [name for name in names if _canonical(name) not in pinned] == []


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
