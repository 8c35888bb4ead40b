"""One trainer rank with a refitter to two fake servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_dypo.config.refit import RefitConfig
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.random_model import write_random_model
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.refitter import Refitter
from megatron_dypo.refit.servers import Watch
from tests.support.fake_control import KEY, FakeServer, fake_servers

HF_CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 24,
    "vocab_size": 31,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def layout() -> Iterator[MeshRank]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    groups = dict.fromkeys(
        ("tp_group", "pp_group", "dp_group", "cp_group", "replica_group", "leaders_group"), dist.group.WORLD
    )
    yield MeshRank(mesh=Mesh(), rank=0, **groups)
    dist.destroy_process_group()


@dataclasses.dataclass
class Lost:
    """What the owner of the servers says of them."""

    deaths: dict[str, str] = dataclasses.field(default_factory=dict)
    may_return: bool = False

    def take(self) -> dict[str, str]:
        deaths, self.deaths = self.deaths, {}
        return deaths


@dataclasses.dataclass
class Setting:
    servers: list[FakeServer]
    params: dict[str, torch.Tensor]
    refitter: Refitter
    refit: Path
    reference: Path
    lost: Lost

    def weights_on_disk(self, version: int) -> dict[str, torch.Tensor]:
        return load_file(self.refit / f"version_{version}" / "model.safetensors")


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
            watch=Watch(take_lost=lost.take, may_return=lambda: lost.may_return),
        )
        yield Setting(servers, params, refitter, tmp_path / "run" / "refit", reference, lost)
        refitter.close()
