"""The verdicts of ``megatron-dypo doctor``: what each installed package is good for, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_dypo.check.installed import Installed
from megatron_dypo.supported import CPU_CORES, RANGES, WEIGHT_SESSIONS, is_at_least, newest_core

_NEEDS = {
    "train": ("torch", "megatron-core"),
    "serve": ("sglang",),
}
"""Use → the packages without which it is not possible."""
_WITHOUT = {
    "torch": "training needs it; an environment that only starts jobs does not",
    "megatron-core": "training needs it",
    "transformer-engine": "optional: fast layers and FP8 on GPUs",
    "sglang": "only the machines of the servers need it",
    "sglang-router": "optional: for rollout.router",
    "transformers": "SGLang needs it",
}
"""Package → advice where it is not installed, in the order of the report."""


class Use(str, Enum):
    """A use of an environment; any environment can start jobs."""

    TRAIN = "train"
    SERVE = "serve"


class Verdict(str, Enum):
    """How a package fits."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "-"
    WRONG = "wrong"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the report."""

    name: str
    found: str
    works: str
    """The range of versions that works."""
    verdict: Verdict
    advice: str = ""


def examine(found: Installed) -> list[Line]:
    """Return a line for each component, in the order of the report."""
    lines = [_python(found)]
    lines += [_package(name, found) for name in _WITHOUT]
    lines.insert(4, _apex(found))
    lines.append(_gpus(found))
    return lines


def possible(found: Installed, lines: Sequence[Line]) -> dict[Use, str]:
    """Return use → what stands in its way; an empty text if nothing does."""
    wrong = {line.name for line in lines if line.verdict is Verdict.WRONG}
    obstacles = {}
    for use in Use:
        missing = [name for name in _NEEDS[use.value] if name not in found.versions]
        broken = [name for name in _NEEDS[use.value] if name in wrong]
        texts = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(broken)} wrong"] * bool(broken)
        obstacles[use] = "; ".join(texts)
    return obstacles


def to_text(lines: Sequence[Line], uses: dict[Use, str]) -> str:
    """Return the report: a table, and what this environment can do."""
    rows = [("", "found", "works with", "verdict", "")]
    rows += [(line.name, line.found, line.works, line.verdict.value, line.advice) for line in lines]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    table = []
    for *cells, advice in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        table.append("  ".join([*padded, advice]).rstrip())
    words = ["start jobs: yes", *(f"{use.value}: {f'no ({why})' if why else 'yes'}" for use, why in uses.items())]
    return "\n".join([*table, "", "This environment can  " + "   ".join(words)])


def _python(found: Installed) -> Line:
    works = RANGES["python"]
    verdict = Verdict.OK if found.python in works else Verdict.WRONG
    advice = "" if verdict is Verdict.OK else f"use Python {works}"
    return Line(name="python", found=found.python, works=str(works), verdict=verdict, advice=advice)


def _package(name: str, found: Installed) -> Line:
    works, version = RANGES[name], found.versions.get(name)
    if version is None:
        return Line(name=name, found="-", works=str(works), verdict=Verdict.MISSING, advice=_WITHOUT[name])
    verdict, advice = Verdict.OK, ""
    if version not in works:
        verdict, advice = Verdict.WRONG, f"pip install '{name}{works}'"
    else:
        special = {
            "torch": _torch,
            "megatron-core": _core,
            "transformer-engine": _transformer_engine,
            "sglang": _sglang,
        }.get(name)
        if special is not None:
            verdict, advice = special(found, version)
    return Line(name=name, found=version, works=str(works), verdict=verdict, advice=advice)


def _torch(found: Installed, version: str) -> tuple[Verdict, str]:
    if found.torch_error is not None:
        return Verdict.WRONG, f"cannot be imported: {found.torch_error}"
    if is_at_least(version, "2.15") and "sglang" in found.versions:
        return (
            Verdict.LIMITED,
            "on GPUs refit.transport=broadcast hangs with servers of this environment, whose SGLang expects a torch "
            "below 2.15: pip install 'torch<2.15', or use p2p",
        )
    return Verdict.OK, ""


def _core(found: Installed, version: str) -> tuple[Verdict, str]:
    on_cpu = "torch" in found.versions and found.torch_error is None and not found.gpus
    if on_cpu and version not in CPU_CORES:
        newest = newest_core(found.python)
        return Verdict.WRONG, f"on a CPU one of {', '.join(CPU_CORES)}: pip install megatron-core=={newest}"
    return Verdict.OK, ""


def _transformer_engine(found: Installed, version: str) -> tuple[Verdict, str]:
    return (Verdict.OK, "") if found.gpus else (Verdict.LIMITED, "left out, since torch sees no GPU")


def _sglang(found: Installed, version: str) -> tuple[Verdict, str]:
    if is_at_least(version, WEIGHT_SESSIONS):
        return Verdict.OK, ""
    return (
        Verdict.LIMITED,
        f"refit.transport=broadcast and disk; p2p and local need {WEIGHT_SESSIONS}: "
        f"pip install 'sglang>={WEIGHT_SESSIONS},<{RANGES['sglang'].below}'",
    )


def _apex(found: Installed) -> Line:
    texts = {
        None: ("-", Verdict.MISSING, "optional: fuses the accumulation of gradients on GPUs"),
        "NVIDIA": ("NVIDIA's", Verdict.OK, ""),
        "PyPI": ("PyPI's", Verdict.LIMITED, "another project, which is left out: pip uninstall apex"),
    }
    version, verdict, advice = texts[found.apex]
    return Line(name="apex", found=version, works="NVIDIA's", verdict=verdict, advice=advice)


def _gpus(found: Installed) -> Line:
    if found.gpus:
        counted = [f"{found.gpus.count(gpu)} × {gpu}" for gpu in dict.fromkeys(found.gpus)]
        return Line(
            name="GPUs", found=", ".join(counted), works=f"toolkit {found.toolkit}", verdict=Verdict.OK, advice=""
        )
    advice = "runs are on the CPU" if "torch" in found.versions and not found.torch_error else "torch would find them"
    if found.toolkit:
        advice += f"; torch is built for toolkit {found.toolkit}: see nvidia-smi if there is a GPU"
    return Line(name="GPUs", found="-", works="", verdict=Verdict.MISSING, advice=advice)
