"""Fixtures: one trainer rank with a refitter to two fake servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.random_model import write_random_model
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.refitter import Refitter
from megatron_dypo.refit.servers import Watch
from tests.support.fake_control import KEY, fake_servers
from tests.support.refit_setting import HF_CONFIG, Lost, Setting


@pytest.fixture(scope="module")
def layout() -> Iterator[MeshRank]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = dict.fromkeys(
        ("tp_group", "pp_group", "dp_group", "cp_group", "replica_group", "leaders_group"), dist.group.WORLD
    )
    yield MeshRank(mesh=Mesh(), rank=0, **groups)
    dist.destroy_process_group()


@pytest.fixture
def setting(layout: MeshRank, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Setting]:
    """Parametrise indirectly with fields of ``RefitConfig``; refits go by disk, which needs no receiver."""
    reference = tmp_path / "hf"
    write_random_model(reference, HF_CONFIG, seed=0)
    arch = load_architecture(reference)
    params = {row.mcore: torch.randn(row.rule.mcore_shape(arch, 1)) for row in family_rows(arch) if not row.is_copy}
    config = RefitConfig(**{"transport": "disk", "deadline_s": 5.0, **getattr(request, "param", {})})
    lost = Lost()
    with fake_servers(2, model_path=str(reference)) as servers:
        refitter = Refitter(
            layout,
            arch,
            lambda: params.items(),
            urls=[server.url for server in servers],
            api_key=KEY,
            config=config,
            run_dir=tmp_path / "run",
            hf_reference=reference,
            watch=Watch(take_lost=lost.take, may_return=lambda: lost.may_return, is_stopping=lambda: lost.is_stopping),
        )
        yield Setting(servers, params, refitter, tmp_path / "run" / "refit", reference, lost)
        refitter.close()
