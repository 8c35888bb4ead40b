"""Export of a training run's checkpoint as an HF folder, in one process and without the run's machines."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from megatron_dypo.fs import check_vacant
from megatron_dypo.mcore.checkpoints.convert import mcore_to_hf
from megatron_dypo.mcore.checkpoints.folder import checkpoints_of
from megatron_dypo.mcore.checkpoints.torch_dist import RUN_STATE, WEIGHTS_FOLDER, MCoreReader
from megatron_dypo.mcore.checkpoints.verify import find_damage
from megatron_dypo.models.quantized.names import Quantization

EXPORTS = "exports"
"""Folder of a run that exports go to by default."""

_STEP = re.compile(r"step_(\d+)")
_PARTS = (f"{WEIGHTS_FOLDER}/.metadata", f"{WEIGHTS_FOLDER}/metadata.json", RUN_STATE)
"""Files of every whole checkpoint."""
_log = logging.getLogger(__name__)


def export_run(
    run_dir: Path,
    *,
    step: int | None = None,
    out_dir: Path | None = None,
    overwrite: bool = False,
    keep: bool = False,
    quantization: Quantization = "none",
    show_progress: bool = True,
) -> Path:
    """Write the policy of one checkpoint as an HF folder, byte for byte as the run itself exports that step.

    Args:
        step: step of the checkpoint. None: the newest whole one; a line names the damage of newer ones.
        out_dir: the HF folder; it appears when everything is written. None: ``run_dir/exports/step_<step>``.
        overwrite: replace an existing HF folder.
        keep: return an existing HF folder as it is.

    Returns:
        The HF folder.

    Raises:
        ValueError: ``run_dir`` is no run folder; there is no such checkpoint (the message names the existing ones), or
            it is damaged; or ``out_dir`` is not vacant or is inside the folder of checkpoints. Nothing is written then.
    """
    root = checkpoints_of(run_dir)
    found = whole_checkpoints(root)
    if not found:
        raise ValueError(f"{root}: no whole checkpoint there")
    chosen = _newest_whole(found) if step is None else step
    if chosen not in found:
        raise ValueError(f"step={step}: no whole checkpoint of it in {root}; there are {_listed(sorted(found))}")
    target = out_dir if out_dir is not None else run_dir / EXPORTS / f"step_{chosen:06d}"
    if root.resolve() in (target.resolve(), *target.resolve().parents):
        raise ValueError(f"{target}: must not be among the checkpoints of the run")
    if keep and (target / "config.json").is_file():
        return target
    _check_target(target, overwrite)
    mcore_to_hf(
        found[chosen],
        target,
        overwrite=overwrite,
        quantization=quantization,
        show_progress=show_progress,
        verify=step is not None,
    )
    return target


def _newest_whole(found: Mapping[int, Path]) -> int:
    """Return the newest step whose files are as they were written. Raises ValueError if there is none."""
    for step in sorted(found, reverse=True):
        damage = find_damage(found[step], "manifest")
        if damage is None:
            reader = MCoreReader(found[step])
            damage = find_damage(found[step], "full", wanted=reader.reads, show_progress=True)
        if damage is None:
            return step
        _log.error("DAMAGED CHECKPOINT: %s/%s: taking an older one", found[step], damage)
    raise ValueError(f"{next(iter(found.values())).parent}: no checkpoint there is whole")


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise ValueError unless ``target`` is free, an empty folder, or an HF folder that may be replaced."""
    is_hf = (target / "config.json").is_file()
    if is_hf and not overwrite:
        raise ValueError(f"{target}: is there already; --overwrite replaces it")
    if not is_hf:
        check_vacant(target)


def whole_checkpoints(root: Path) -> dict[int, Path]:
    """Return step → folder of the whole checkpoints; warn of folders of that name that are not whole."""
    found: dict[int, Path] = {}
    for folder in sorted(root.iterdir()):
        name = _STEP.fullmatch(folder.name)
        if name is None:
            continue
        missing = [part for part in _PARTS if not (folder / part).is_file()]
        if missing:
            _log.warning("%s: is passed over: %s is missing", folder, missing[0])
        else:
            found[int(name[1])] = folder
    return found


def _listed(steps: list[int]) -> str:
    shown = steps if len(steps) <= 20 else [*steps[:5], "…", *steps[-15:]]
    return ", ".join(map(str, shown))
