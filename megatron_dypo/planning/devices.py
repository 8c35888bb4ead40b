"""GPUs and their links according to the vendors' data sheets: dense rates, one direction of a link, SI units.

Sources: NVIDIA data sheets "A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU", "DGX B200", "GB200
NVL72" (give 72 GPUs a node: its racks are one NVLink domain), "L40S"
(without NVLink: its GPUs communicate over PCIe). The A800 is an A100, and the H800 an H100, with NVLink at 400 GB/s
(both directions together). Memory is the total that the driver reports, which is less than the name says. Network: each
GPU has one port of the usual DGX/HGX node (200 Gbit/s for Ampere and Ada, 400 Gbit/s for later ones). The share that
kernels reach is no vendor's figure: see ``docs/planning.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.checks import require

GIB = 2**30
FP8_SHARE = 0.8
"""A guess: the share of the FP8 peak that FP8 kernels reach, relative to the share of the bf16 peak that bf16 kernels
reach. It accounts for quantising and transposing, and for norms and activations, which are no faster in FP8.
``docs/planning.md`` compares it with published figures."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU in its node."""

    name: str
    capability: tuple[int, int]
    """Compute capability."""
    memory: int
    """Bytes in total."""
    bf16: float
    """FLOP/s of dense matmuls."""
    fp8: float | None
    """FLOP/s of dense matmuls in FP8; None: the GPU has no FP8."""
    hbm: float
    """Bytes/s."""
    nvlink: float
    """Bytes/s of one direction, to the other GPUs of its node."""
    network: float
    """Bytes/s of one direction, to other nodes."""
    pcie: float
    """Bytes/s of one direction, to the memory of its host."""
    matmul: float
    """Share of ``bf16`` that the kernels of a layer, including norms and attention, reach together in training."""

    per_host: int = 8
    """GPUs of one host. More can be one NVLink domain."""

    @property
    def fp8_gain(self) -> float:
        """Return how many times faster a linear layer is in FP8 than in bf16; 1: the GPU has no FP8."""
        return 1.0 if self.fp8 is None else self.fp8 * FP8_SHARE / self.bf16


def _gpu(
    name: str,
    capability: tuple[int, int],
    gib: float,
    bf16: float,
    fp8: float | None,
    hbm: float,
    links: tuple[float, float, float],
    matmul: float,
    per_host: int = 8,
) -> Gpu:
    """Make a GPU from GiB, TFLOP/s, TB/s, and GB/s of NVLink, network and PCIe."""
    nvlink, network, pcie = (rate * 1e9 for rate in links)
    return Gpu(
        name=name,
        capability=capability,
        memory=int(gib * GIB),
        bf16=bf16 * 1e12,
        fp8=None if fp8 is None else fp8 * 1e12,
        hbm=hbm * 1e12,
        nvlink=nvlink,
        network=network,
        pcie=pcie,
        matmul=matmul,
        per_host=per_host,
    )


_GEN4, _GEN5 = 25.0, 50.0
"""GB/s that a copy from pinned memory reaches over 16 lanes; the links' rates are 32 and 64."""

_C2C = 200.0
"""GB/s that a copy from the memory of a Grace host reaches; the link's rate is 450."""

_AMPERE, _HOPPER, _SLOW = 0.62, 0.55, 0.75
"""Shares for ``Gpu.matmul``. Ampere's agrees with the iteration times of Korthikanti et al. 2022, table 5; Hopper's
agrees with the 41 to 48% MFU of Megatron-LM's README. Those of the H20 (its matmuls are slow relative to its memory),
the L40S and the B200 are guesses."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", (8, 0), 39.4, 312, None, 1.555, (300, 25, _GEN4), _AMPERE),
        _gpu("a100-80gb", (8, 0), 79.2, 312, None, 2.039, (300, 25, _GEN4), _AMPERE),
        _gpu("a800-80gb", (8, 0), 79.2, 312, None, 2.039, (200, 25, _GEN4), _AMPERE),
        _gpu("l40s-48gb", (8, 9), 45.0, 362, 733, 0.864, (_GEN4, 25, _GEN4), _HOPPER),
        _gpu("h100-80gb", (9, 0), 79.1, 989, 1979, 3.35, (450, 50, _GEN5), _HOPPER),
        _gpu("h800-80gb", (9, 0), 79.1, 989, 1979, 3.35, (200, 50, _GEN5), _HOPPER),
        _gpu("h20-96gb", (9, 0), 95.1, 148, 296, 4.0, (450, 50, _GEN5), _SLOW),
        _gpu("h200-141gb", (9, 0), 139.8, 989, 1979, 4.8, (450, 50, _GEN5), _HOPPER),
        _gpu("b200-180gb", (10, 0), 178.3, 2250, 4500, 8.0, (900, 50, _GEN5), _HOPPER),
        _gpu("gb200-192gb", (10, 0), 184.6, 2500, 5000, 8.0, (900, 50, _C2C), _HOPPER, 4),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return a row of the table.

    Raises:
        ValueError: there is none of that name.
    """
    require(name in GPUS, f"gpu={name!r}", f"must be one of {', '.join(GPUS)}")
    return GPUS[name]


def find_rates(device: str) -> Gpu | None:
    """Return the data sheet of a device, found by the name that its driver gives; None if there is none."""
    words = device.lower().replace("-", " ").split()
    return next((gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words), None)
