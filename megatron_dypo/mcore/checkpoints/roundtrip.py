"""A test that a model survives conversion to a Megatron checkpoint and back bit for bit, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.metrics.progress import progress
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.carried import find_carried
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.parallel.mesh import Mesh

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Difference:
    """A tensor that the conversion changed."""

    name: str
    shape: tuple[int, ...]
    num_elements: int
    """Number of elements that differ in any bit; all elements if the type differs."""
    largest: float
    """Largest magnitude of a difference between two finite elements."""


def check_roundtrip(
    hf_path: Path,
    work_dir: Path,
    *,
    mcore_path: Path | None = None,
    mesh: Mesh | None = None,
    show_progress: bool = True,
) -> list[Difference]:
    """Convert an HF folder to a Megatron checkpoint for this mesh (None: one rank) and back, and compare every tensor.

    Both results are written to ``work_dir``; together they have twice the size of the model. With ``mcore_path`` that
    checkpoint replaces the first conversion; this tests whether it holds the weights of the HF folder.

    Raises:
        ValueError: the model cannot be converted, or ``work_dir`` already holds one of the results.
    """
    if mcore_path is None:
        mcore_path = work_dir / "mcore"
        hf_to_mcore(
            hf_path,
            mcore_path,
            mesh=mesh or Mesh(),
            show_progress=show_progress,
        )
    mcore_to_hf(mcore_path, work_dir / "hf", hf_reference=hf_path, show_progress=show_progress)
    return differing_tensors(hf_path, work_dir / "hf", show_progress=show_progress)


def differing_tensors(expected: Path, actual: Path, *, show_progress: bool = True) -> list[Difference]:
    """List the tensors that differ between two HF folders of a model. One tensor of each is in memory at a time.

    Raises:
        ValueError: a tensor of the model is missing, unknown or misshapen in a folder.
    """
    arch = load_architecture(expected)
    readers = HFReader(expected), HFReader(actual)
    for reader in readers:
        reader.check_complete(arch)
    names = [name for row in family_rows(arch) if not row.is_copy for name in row.hf]
    sizes = [torch.Size(readers[0].shape(name)).numel() * readers[0].dtype(name).itemsize for name in names]
    carried = find_carried(expected, arch)
    differences = []
    with progress(sum(sizes), "comparing", "bytes", enabled=show_progress) as bar:
        for name, num_bytes in zip(names, sizes, strict=True):
            difference = _difference(name, *(reader.slice(name)[:] for reader in readers))
            if difference is not None:
                differences.append(difference)
            bar.update(num_bytes)
    copies = find_carried(actual, arch)
    for (name, ours), (other, theirs) in zip(carried.tensors(), copies.tensors(), strict=True):
        if name != other:
            raise ValueError(f"{actual}: tensor {name} is missing")
        if (difference := _difference(name, ours, theirs)) is not None:
            differences.append(difference)
    return differences


def _difference(name: str, expected: Tensor, actual: Tensor) -> Difference | None:
    if expected.dtype == actual.dtype:
        integers = _INTEGER_OF_SIZE[expected.dtype.itemsize]
        num_elements = int((expected.view(integers) != actual.view(integers)).sum())
    else:
        num_elements = expected.numel()
    if num_elements == 0:
        return None
    gaps = (expected.double() - actual.double()).abs()
    largest = gaps.nan_to_num(nan=0.0, posinf=0.0).max().item()
    return Difference(name, tuple(expected.shape), num_elements, largest)
