"""The checkpoints of a run as ``megatron-dypo checkpoints`` lists them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.mcore.checkpoints.folder import DAMAGED, candidates, checkpoints_of, step_of, whole_folders
from megatron_dypo.mcore.checkpoints.manifest import MANIFEST, list_files
from megatron_dypo.mcore.checkpoints.prune import kept_by, score_of
from megatron_dypo.mcore.checkpoints.verify import Verify, find_damage

_NAME = re.compile(rf"step_(\d+)({re.escape(DAMAGED)}(-\d+)?)?")
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


@dataclass(frozen=True, kw_only=True)
class Listed:
    """One checkpoint of a run."""

    step: int
    path: Path
    size: int
    """Bytes of all its files."""
    age_s: float
    """Seconds since it was saved."""
    kept: tuple[str, ...]
    """Rules of the run's config that keep it."""
    state: str
    """``whole``, or the damaged file and the reason."""
    is_damaged: bool


def list_checkpoints(run_dir: Path, verify: Verify, *, show_progress: bool = False) -> list[Listed]:
    """Return the checkpoints of a run by step, those that were set aside as damaged included.

    Raises:
        ValueError: ``run_dir`` has no folder of checkpoints, or its config.yaml breaks a rule.
    """
    root = checkpoints_of(run_dir)
    written = run_dir / "config.yaml"
    cfg = load_config(written, []).checkpoint if written.is_file() else CheckpointConfig()
    kept = _kept(root, cfg)
    found = [(int(name[1]), path) for path in root.iterdir() if (name := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [_listed(step, path, kept.get(path, []), verify, show_progress) for step, path in sorted(found)]


def _kept(root: Path, cfg: CheckpointConfig) -> dict[Path, list[str]]:
    """Return folder → rules that keep it. The tracker tells which one was saved last."""
    folders = {step_of(folder): folder for folder in whole_folders(root)}
    tracked = [folder for folder in candidates(root) if folder in folders.values()]
    if not tracked:
        return {}
    newest = step_of(tracked[0])
    scores = {step: score_of(folder, cfg.keep_best.metric) for step, folder in folders.items()}
    return {folders[step]: rules for step, rules in kept_by(scores, cfg, newest=newest).items()}


def _listed(step: int, path: Path, kept: Sequence[str], verify: Verify, show_progress: bool) -> Listed:
    damage = find_damage(path, verify, show_progress=show_progress)
    was_set_aside = path.suffix.startswith(DAMAGED)
    if damage is not None:
        state = f"DAMAGED: {damage}"
    elif was_set_aside:
        state = "set aside as DAMAGED" + ("" if verify == "full" else "; --verify names the file")
    else:
        state = "whole" if (path / MANIFEST).is_file() else f"not verified: has no {MANIFEST}"
    return Listed(
        step=step,
        path=path,
        size=sum(list_files(path).values()),
        age_s=time.time() - path.stat().st_mtime,
        kept=tuple(kept),
        state=state,
        is_damaged=damage is not None or was_set_aside,
    )


def table(found: Sequence[Listed]) -> str:
    """Return the lines that the command prints."""
    if not found:
        return "no checkpoints"
    rows = [("step", "size", "age", "kept by", "state")]
    rows += [(str(one.step), _size(one.size), _age(one.age_s), ", ".join(one.kept) or "-", one.state) for one in found]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(row[:4], widths, strict=True)) + f"  {row[4]}"
        for row in rows
    )


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _age(seconds: float) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if seconds >= unit), (1, "s"))
    return f"{seconds / unit:.0f} {name}"
