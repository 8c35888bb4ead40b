"""The site of docs/: its navigation has every page, pictures match their sources, and files that it names exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_dypo
from tests.support.pins import pins_of
from tools.pictures.__main__ import pictures
from tools.pictures.charts import METRICS, source_of_run

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def leaves(node: Any) -> list[str]:
    if isinstance(node, str):
        return [node]
    children = node.values() if isinstance(node, dict) else node
    return [leaf for child in children for leaf in leaves(child)]


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(leaves(SITE["nav"])) == [page.name for page in PAGES]


def test_a_broken_link_is_an_error() -> None:
    assert SITE["strict"] is True
    assert {*SITE["validation"]["links"].values(), *SITE["validation"]["nav"].values()} == {"warn"}
    target = re.search(r"^docs:.*\n(?:\t.*\n)+", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert target is not None
    assert "mkdocs build --strict" in target[0]
    assert "--quiet" not in target[0], "mkdocs counts no warning that it does not print"
    assert "make --no-print-directory docs" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_tools_of_the_site_are_pinned_and_cover_the_extra() -> None:
    pins = pins_of(ROOT / "requirements" / "docs.txt")
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    assert {"mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python"} <= names


@pytest.mark.parametrize("path", sorted(pictures()), ids=lambda path: path.name)
def test_a_picture_is_drawn_from_its_source_and_small(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == pictures()[path], "run: python -m tools.pictures"
    assert path.stat().st_size < 300_000


def test_every_picture_is_shown_and_none_is_missing() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in [ROOT / "README.md", *PAGES])
    assert set(re.findall(r"pictures/([\w.]+)\)", text)) == {path.name for path in pictures()}


def test_the_source_of_a_picture_keeps_what_is_drawn(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1, "gate/easy": 0.123456, "gal/eta": null, "train/loss": 2.0}\n', encoding="utf-8")
    assert source_of_run(metrics) == '[\n{"step": 1, "gate/easy": 0.1235}\n]\n'
    assert "train/loss" not in METRICS


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    folders = "megatron_dypo|examples|tests|tools|requirements|docs|benchmarks|slurm"
    named = set(re.findall(rf"`((?:{folders})/[\w./]*\w/?)`", page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_reference_of_the_api_has_every_public_name_at_its_home() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)
    public = [name for name in megatron_dypo.__all__ if name != "__version__"]
    homes = {name: getattr(megatron_dypo, name).__module__ for name in public}
    assert sorted(listed) == sorted(f"{home}.{name}" for name, home in homes.items())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_metric_that_a_page_names_is_in_the_reference(page: Path) -> None:
    reference = (DOCS / "metrics.md").read_text(encoding="utf-8")
    families = sorted({name.split("/")[0] for name in re.findall(r"^\| `([^`]+)`", reference, flags=re.MULTILINE)})
    families.remove("data")  # which is also a folder of users
    named = re.findall(rf"`((?:{'|'.join(families)})/[\w/<>]+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if f"`{name}`" not in reference] == []


def test_the_layers_are_described_in_the_order_of_the_readme() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (sentence,) = re.findall(r"rooms on its left[^:]*: ([^.]+)\.", readme)
    layers = [re.findall(r"\w+", part) for part in sentence.split("→")]
    described = re.findall(
        r"^\| `megatron_dypo/(\w+)", (DOCS / "architecture.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert list(reversed(described))[1:] == [layer for (layer,) in layers[1:]]
    assert described[-1] in layers[0]
