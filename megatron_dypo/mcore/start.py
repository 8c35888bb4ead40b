"""The start of Megatron in this process: preparation before its first import, then groups and random numbers."""

from __future__ import annotations

import datetime

from megatron_dypo.config.model import ParallelConfig
from megatron_dypo.mcore import features
from megatron_dypo.mcore.compat import cpu, without_te
from megatron_dypo.parallel import device, groups
from megatron_dypo.parallel.groups import MeshRank


def start_megatron(parallel: ParallelConfig, *, timeout_s: float = 1800.0, seed: int = 1) -> MeshRank:
    """Join the world, set up Megatron's model-parallel groups and RNG seeds, and return this rank's place in the mesh.

    This also installs :mod:`megatron_dypo.mcore.compat.cpu` on a CPU, and :mod:`megatron_dypo.mcore.compat.without_te`
    where Transformer Engine is not used. Reads ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
    ``MASTER_PORT`` and ``LOCAL_RANK`` as torchrun sets them; without ``RANK`` the world is this process.

    Raises:
        ValueError: the world is no multiple of tensor × pipeline × context; expert × expert_tensor does not divide the
            ranks of a stage; or this version of Megatron is not supported on a CPU.
    """
    mesh = parallel.mesh(device.world_size())
    features.shield_imports()
    if not device.on_gpu():
        cpu.install()
    if not features.uses_transformer_engine():
        without_te.install()
    device.bind()
    layout = groups.join(mesh, datetime.timedelta(seconds=timeout_s))
    _seed(seed, layout)
    return layout


def _seed(seed: int, layout: MeshRank) -> None:
    from megatron.core import tensor_parallel

    # Pipeline stages draw from different streams, as in Megatron's own training loop.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * layout.pp_rank)
