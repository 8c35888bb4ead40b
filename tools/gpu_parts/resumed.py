"""Compare a policy that was saved and loaded with the one that went on, in each precision."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tools.gpu_parts.precisions import precisions
from tools.gpu_parts.run_part import Part, PartError, run_part
from tools.gpu_parts.synthetic import CheckSizes

SIZES = CheckSizes(hidden=256, layers=2, head_dim=64, vocab=1024, tokens=2304, length=256)
GAP_BAR = 1e-3
"""Largest relative gap of losses and gradient norms. Attention adds its gradients in no fixed order on a GPU."""


def compare_resumed(machine: Mapping[str, Any], work: Path, *, run_part: Part = run_part) -> dict[str, Any]:
    """Return precision → largest gap between the losses and norms after loading and those without; and the verdicts."""
    found: dict[str, Any] = {}
    verdicts = {}
    for precision in precisions(machine):
        root = work / "checkpoints" / precision.name
        shutil.rmtree(root, ignore_errors=True)
        spec = {"what": "resumed", "sizes": asdict(SIZES), "dtype": precision.dtype, "recipe": precision.recipe}
        try:
            series = [run_part({**spec, "root": str(root), "loads": loads})["series"] for loads in (False, True)]
        except PartError as error:
            found[precision.name] = {"error": str(error)}
            verdicts[f"{precision.name}: loads"] = False
            continue
        gap = max(abs(own / other - 1) for other, own in zip(*series, strict=True))
        found[precision.name] = {"went_on": series[0], "loaded": series[1], "gap": gap}
        verdicts[f"{precision.name}: goes on within {GAP_BAR:g}"] = gap <= GAP_BAR
    return {"resumed": found, "verdicts": verdicts}
