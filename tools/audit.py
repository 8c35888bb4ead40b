"""Compare the pins of requirements/ with a snapshot of known advisories: python tools/audit.py [--refresh CLONE]

The snapshot, requirements/advisories.json, has the advisories of the Python Packaging Advisory Database for the
packages that are pinned here, so that a check needs no network. ``--refresh CLONE`` writes it anew from a clone
of https://github.com/pypa/advisory-database. A check knows nothing that became known after the snapshot, and says
how old it is. Advisories whose ranges are commits of a repository and not versions are left out.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ROOT / "requirements"
SNAPSHOT = REQUIREMENTS / "advisories.json"
SOURCE = "https://github.com/pypa/advisory-database"
_PIN = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*])?==([^\s;\\]+)")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One line of a list of requirements."""

    file: str
    package: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Advisory:
    """One known weakness of one package."""

    id: str
    aliases: tuple[str, ...]
    package: str
    ranges: tuple[tuple[Mapping[str, str], ...], ...]
    """Ranges of versions, each a list of events in ascending order: introduced, fixed, last_affected."""
    versions: tuple[str, ...]
    """Single versions that are affected. Empty if the ranges say everything."""

    def affects(self, version: str) -> bool:
        """Return whether this version has the weakness."""
        return version in self.versions or any(_is_inside(Version(version), events) for events in self.ranges)


def main(
    refresh: Annotated[Path | None, typer.Option(help="Clone of the database; write the snapshot anew first.")] = None,
) -> None:
    """Compare the pins of requirements/ with a snapshot of known advisories."""
    found = pins(REQUIREMENTS)
    if refresh is not None:
        SNAPSHOT.write_text(json.dumps(snapshot(refresh, found), indent=1) + "\n", encoding="utf-8")
    content = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    lines = list(findings(found, read_advisories(content)))
    age = (datetime.date.today() - datetime.date.fromisoformat(content["date"])).days
    known = f"by the snapshot of {content['date']}, {age} days old"
    print("\n".join([*lines, f"{len(lines)} advisories for {len(found)} pins {known}"]))
    sys.exit(bool(lines))


def pins(folder: Path) -> list[Pin]:
    """Return the pins of all lists in ``folder``."""
    return [
        Pin(file=path.name, package=canonicalize_name(match[1]), version=match[2])
        for path in sorted(folder.glob("*.txt"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if (match := _PIN.match(line))
    ]


def findings(found: Iterable[Pin], advisories: Sequence[Advisory]) -> Iterator[str]:
    """Yield a line for each pin and each advisory that affects it."""
    for pin in found:
        for advisory in advisories:
            if advisory.package == pin.package and advisory.affects(pin.version):
                names = ", ".join((advisory.id, *advisory.aliases))
                yield f"{pin.file}: {pin.package}=={pin.version}: {names}"


def read_advisories(content: Mapping[str, Any]) -> list[Advisory]:
    """Read a snapshot."""
    return [
        Advisory(
            id=fields["id"],
            aliases=tuple(fields["aliases"]),
            package=fields["package"],
            ranges=tuple(map(tuple, fields["ranges"])),
            versions=tuple(fields["versions"]),
        )
        for fields in content["advisories"]
    ]


def snapshot(clone: Path, found: Iterable[Pin]) -> dict[str, Any]:
    """Return the newest commit's advisories for the pinned packages."""
    commit, date = _git(clone, "log", "-1", "--format=%H %cs").split()
    listed = _git(clone, "ls-tree", "-r", "--name-only", "HEAD", "vulns/").splitlines()
    packages = {pin.package for pin in found}
    paths = [path for path in listed if path.endswith(".yaml") and path.split("/")[1] in packages]
    advisories = [one for path in paths for one in from_osv(yaml.safe_load(_git(clone, "show", f"HEAD:{path}")))]
    return {
        "source": f"{SOURCE} (CC BY 4.0), identifiers and versions only",
        "commit": commit,
        "date": date,
        "advisories": [asdict(one) for one in advisories if one.package in packages],
    }


def from_osv(entry: Mapping[str, Any]) -> list[Advisory]:
    """Return the advisories of an entry (https://ossf.github.io/osv-schema/), one for each package."""
    if entry.get("withdrawn"):
        return []
    found = []
    for affected in entry["affected"]:
        ranges = tuple(tuple(one["events"]) for one in affected.get("ranges", ()) if one["type"] == "ECOSYSTEM")
        versions = () if ranges else tuple(affected.get("versions", ()))
        if affected["package"]["ecosystem"] == "PyPI" and (ranges or versions):
            package = canonicalize_name(affected["package"]["name"])
            aliases = tuple(entry.get("aliases", ()))
            found.append(Advisory(id=entry["id"], aliases=aliases, package=package, ranges=ranges, versions=versions))
    return found


def _is_inside(version: Version, events: Sequence[Mapping[str, str]]) -> bool:
    """Return whether the last event at or below ``version`` is the introduction of the weakness."""
    inside = False
    for event in events:
        ((kind, bound),) = event.items()
        if kind == "introduced" and (bound == "0" or version >= _version(bound)):
            inside = True
        elif kind == "fixed":
            inside = inside and version < _version(bound)
        elif kind == "last_affected":
            inside = inside and version <= _version(bound)
    return inside


def _version(text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion as error:
        raise ValueError(f"{SNAPSHOT.name}: version={text!r}: must be a version by PEP 440") from error


def _git(clone: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(clone), *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    typer.run(main)
