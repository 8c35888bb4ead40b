"""The audit of pins finds affected versions, and there are none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.audit import REQUIREMENTS, SNAPSHOT, findings, from_osv, pins, read_advisories, snapshot


def entry(events: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": events}] if events else []
    affected = {"package": {"name": "Some_Package", "ecosystem": "PyPI"}, "ranges": ranges}
    return {"id": "PYSEC-1", "aliases": ["CVE-1"], "affected": [affected | fields.pop("affected", {})], **fields}


@pytest.mark.parametrize(
    ("version", "is_affected"),
    [("0.9", False), ("1.0", True), ("1.9.1", True), ("1.10", False), ("2.0rc1", False), ("2.0", True), ("2.5", True)],
)
def test_a_version_is_affected_from_an_introduction_to_the_fix(version, is_affected):
    (advisory,) = from_osv(
        entry([{"introduced": "1.0"}, {"fixed": "1.10"}, {"introduced": "2.0"}, {"last_affected": "2.5"}])
    )
    assert advisory.package == "some-package"
    assert advisory.affects(version) is is_affected
    assert not advisory.affects("2.5.1")


def test_a_version_without_a_range_is_affected_if_it_is_listed():
    (advisory,) = from_osv(entry([], affected={"versions": ["1.0", "1.1"]}))
    assert [advisory.affects(version) for version in ("1.0", "1.1", "1.2")] == [True, True, False]


def test_a_withdrawn_advisory_counts_for_nothing():
    assert from_osv(entry([{"introduced": "0"}], withdrawn="2024-01-01T00:00:00Z")) == []


def test_an_old_torch_and_an_old_requests_are_found_by_the_shipped_snapshot(tmp_path: Path):
    (tmp_path / "old.txt").write_text("# pins\ntorch==1.13.0  # old\nrequests[socks]==2.30.0\naiohttp>=3\n")
    lines = list(findings(pins(tmp_path), read_advisories(json.loads(SNAPSHOT.read_text()))))
    assert "old.txt: torch==1.13.0: PYSEC-2022-43015, CVE-2022-45907" in lines
    assert any(line.startswith("old.txt: requests==2.30.0: PYSEC-2023-74") for line in lines)


def test_no_pin_has_a_known_weakness():
    found = pins(REQUIREMENTS)
    assert len(found) > 150
    assert list(findings(found, read_advisories(json.loads(SNAPSHOT.read_text())))) == []


def test_a_refreshed_snapshot_holds_the_pinned_packages_of_the_newest_commit(tmp_path: Path):
    for name, package in (("PYSEC-1", "some-package"), ("PYSEC-2", "another")):
        path = tmp_path / "clone" / "vulns" / package / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        one = entry([{"introduced": "0"}], id=name, affected={"package": {"name": package, "ecosystem": "PyPI"}})
        path.write_text(yaml.safe_dump(one))
    git = ["git", "-C", str(tmp_path / "clone"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "list.txt").write_text("some.package==3.0\n")
    content = json.loads(json.dumps(snapshot(tmp_path / "clone", pins(tmp_path))))
    assert [advisory.id for advisory in read_advisories(content)] == ["PYSEC-1"]
    assert list(findings(pins(tmp_path), read_advisories(content))) == ["list.txt: some-package==3.0: PYSEC-1, CVE-1"]
