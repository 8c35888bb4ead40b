"""FP8 from running ranks, against the offline conversion: slices of shards that cut blocks, and exports."""

from __future__ import annotations

import filecmp
import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_dypo.models.quantized.folder import quantize_hf
from megatron_dypo.models.quantized.names import Quantization, is_quantized, is_scale, scale_name, scale_shape
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.plan.refit_plan import Transfer, make_plan
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model
from tests.support.slow import slow_unless

LAYOUTS = {
    "tp2": ("qwen2", 2, {"tensor": 2}),
    "tp4": ("llama", 4, {"tensor": 4}),
    "ep2_etp2": ("qwen3_moe", 4, {"expert": 2, "expert_tensor": 2}),
    "tp2_sp_ep2_pp2": ("qwen3_moe", 4, {"tensor": 2, "sequence": True, "expert": 2, "pipeline": 2}),
}
KINDS: tuple[Literal["fp8_block", "fp8_channel"], ...] = ("fp8_block", "fp8_channel")
SIZES = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 24, "moe_intermediate_size": 160}
"""Every split at two or four ranks runs through blocks: of 192 rows of queries, 96 of keys, 320 columns of the MLP."""


def slices_of(name: str, param: torch.Tensor, arch, layout, kind: Quantization) -> list[Transfer]:
    """Return all of a parameter, each piece cut in two at an odd place, and all its scales."""
    from megatron_dypo.models.families.registry import match

    row = match(name, arch)
    rank, size = (layout.etp_rank, layout.expert_tensor) if row.is_expert else (layout.tp_rank, layout.tensor)
    rows, cols = param.view(-1, param.shape[-1] if param.ndim > 1 else 1).shape
    nowhere: dict[str, Any] = {"server": 0, "server_rank": 0, "served_name": "", "served_row": 0, "served_col": 0}
    made = functools.partial(Transfer, **nowhere, source=layout.rank, source_name=row.mcore)
    offset, slices = 0, []
    for piece in row.rule.pieces(arch, rank, size):
        for start, length in ((0, piece.length // 3), (piece.length // 3, piece.length - piece.length // 3)):
            at, hf = offset + start, piece.start + start
            where: dict[str, Any]
            if row.rule.tp_dim == 1:
                where = {"source_row": 0, "source_col": at, "rows": rows, "cols": length, "hf_row": 0, "hf_col": hf}
            else:
                where = {"source_row": at, "source_col": 0, "rows": length, "cols": cols, "hf_row": hf, "hf_col": 0}
            slices.append(made(**where, hf_name=row.hf[piece.source]))
        offset += piece.length
    for hf_name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True):
        if is_quantized(hf_name):
            grid_rows, grid_cols = scale_shape(kind, shape)
            where = {"source_row": 0, "source_col": 0, "rows": grid_rows, "cols": grid_cols, "hf_row": 0, "hf_col": 0}
            slices.append(made(**where, hf_name=scale_name(hf_name, kind), part="scale"))
    return slices


def planned(arch, layout, kind: Quantization) -> list[Transfer]:
    """Return what this rank sends to servers of one and of two ranks; the plan refuses shards that cut blocks."""
    if kind == "fp8_block":
        return []
    axes = ("tensor", "pipeline", "virtual_pipeline", "context", "data", "expert", "expert_tensor")
    source = Mesh(**{axis: getattr(layout, axis) for axis in axes})
    servers = [ServerMesh(tensor=1), ServerMesh(tensor=2)]
    return make_plan(arch, source, servers, quantization=kind).sends(layout.rank)


def rank_task(hf: str, out: str, axes: dict) -> dict[str, list[tuple[Transfer, np.ndarray]]]:
    """Return the bytes of every slice that this rank sends, by kind; export to ``out``, plain and in each kind."""
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.chunks import named_global_parameters
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.models.export import export_hf
    from megatron_dypo.parallel.groups import close
    from megatron_dypo.refit.shard_quantizer import ShardQuantizer

    parallel, model = ParallelConfig(**axes), ModelConfig(hf_path=hf, dtype="bfloat16")
    layout, arch = start_megatron(parallel), load_architecture(hf)
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    named = dict(named_global_parameters(chunks))
    served: dict[str, list[tuple[Transfer, np.ndarray]]] = {}
    kinds: tuple[Quantization, ...] = ("none", *KINDS)
    for kind in kinds:
        export_hf(named.items(), arch, layout, out_dir=Path(out) / kind, reference_hf_path=hf, quantization=kind)
    for kind in KINDS:
        quantizer = ShardQuantizer(named.items(), arch, layout, kind)
        served[kind] = [
            (piece, quantizer.slice(piece).contiguous().view(torch.uint8).numpy())
            for piece in (
                *planned(arch, layout, kind),
                *(piece for name, param in named.items() for piece in slices_of(name, param, arch, layout, kind)),
            )
        ]
    torch.distributed.barrier()
    close(layout)
    return served


@pytest.fixture(scope="module", params=slow_unless(lambda layout: layout != "tp4", LAYOUTS))
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    model, world_size, axes = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    hf = make_hf_model(model, root / "hf", dtype=torch.bfloat16, **SIZES)
    return root, run_ranks(world_size, rank_task, str(hf), str(root / "exports"), axes)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_slice_of_every_rank_is_that_of_the_offline_conversion(ran, kind, tmp_path) -> None:
    root, by_rank = ran
    quantize_hf(root / "exports" / "none", tmp_path / "offline", kind, show_progress=False)
    offline = load(tmp_path / "offline")
    untouched = {name: torch.ones(tensor.shape, dtype=torch.bool) for name, tensor in offline.items()}
    for served in by_rank:
        for piece, got in served[kind]:
            whole = offline[piece.hf_name]
            whole = whole.view(-1, whole.shape[-1] if whole.ndim > 1 else 1)
            where = np.s_[piece.hf_row : piece.hf_row + piece.rows, piece.hf_col : piece.hf_col + piece.cols]
            expected = whole[where].contiguous().view(torch.uint8).numpy()
            np.testing.assert_array_equal(got, expected, err_msg=str(piece))
            untouched[piece.hf_name].view(whole.shape)[where] = False
    assert any(is_scale(name) for name in offline)
    assert not any(mask.any() for mask in untouched.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_export_is_that_of_the_offline_conversion(ran, kind, tmp_path) -> None:
    root, _ = ran
    quantize_hf(root / "exports" / "none", tmp_path / "offline", kind, show_progress=False)
    offline, exported = load(tmp_path / "offline"), load(root / "exports" / kind)
    assert offline.keys() == exported.keys()
    for name, tensor in offline.items():
        assert tensor.dtype == exported[name].dtype
        assert torch.equal(tensor.view(torch.uint8), exported[name].view(torch.uint8)), name
    assert filecmp.cmp(tmp_path / "offline" / "config.json", root / "exports" / kind / "config.json", shallow=False)
