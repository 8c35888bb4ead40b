"""Build SGLang's model classes for every rank of a server, load an HF folder with their own loaders, and compare each
parameter with what a refit's plan would write there: ``python sglang_layouts.py CASES.json``.

Prints one line of JSON for each case: the number of compared parameters of all ranks, and the differences. It runs as a
program of its own, as SGLang changes torch and reads its settings once. No process group is formed: SGLang takes ranks
and sizes of its groups from the settings, and the groups here only hold them.

Source: SGLang 0.5.23, ``srt/runtime_context.py`` (``publish``, ``ParallelContext``) and ``model_loader/loader.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_dypo.models.architecture import Architecture, load_architecture
from megatron_dypo.models.families.table import LAYER
from megatron_dypo.models.stacked_experts import part_of
from megatron_dypo.refit.plan.flags import mesh_of_flags
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from megatron_dypo.refit.plan.server_tensors import served_tensors
from megatron_dypo.rollout.server import command

GROUPS = ("tp", "attn_tp", "attn_cp", "moe_ep", "moe_tp", "moe_dp", "pp")


class Group:
    """Rank and size of a group that was never formed."""

    def __init__(self, parallel: Any, name: str) -> None:
        self.world_size = getattr(parallel, f"{name}_size")
        self.rank_in_group = self.rank = getattr(parallel, f"{name}_rank") if self.world_size > 1 else 0
        self.is_first_rank = self.is_last_rank = True
        self.cpu_group = self.device_group = None


def launcher() -> Any:
    """Run the launcher of servers on a CPU as far as its stubs, and return it."""
    path = Path(command.__file__).with_name("sglang_cpu.py")
    spec = importlib.util.spec_from_file_location("sglang_cpu", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._serve_latent_attention()
    module._serve_sinks()
    return module


@contextlib.contextmanager
def shared_experts_beside(backend: str) -> Iterator[None]:
    """Let the model classes, and they alone, see another backend of the experts' dispatch. The package of such a
    backend needs a GPU; the shared experts do not use it."""
    from sglang.srt.layers.moe.utils import MoeA2ABackend
    from sglang.srt.models import deepseek_v2, glm4_moe

    before = glm4_moe.get_moe_a2a_backend
    for module in (deepseek_v2, glm4_moe):
        module.get_moe_a2a_backend = lambda: MoeA2ABackend(backend)
    try:
        yield
    finally:
        for module in (deepseek_v2, glm4_moe):
            module.get_moe_a2a_backend = before


def loaded_by_sglang(flags: list[str], folder: str, tensor: int) -> list[dict[str, torch.Tensor]]:
    """Return the parameters of each rank."""
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe.utils import initialize_moe_config
    from sglang.srt.model_loader import loader
    from sglang.srt.server_args import prepare_server_args

    args = prepare_server_args(flags)
    ranks = []
    for rank in range(tensor):
        runtime_context.reset_context()
        runtime_context.publish(args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank))
        initialize_dp_attention(args)
        initialize_moe_config()
        parallel = runtime_context.get_parallel()
        parallel.override_permanently(**{f"{name}_group": Group(parallel, name) for name in GROUPS})
        model = loader._initialize_model(ModelConfig.from_server_args(args), LoadConfig())
        model.load_weights(iter(load_file(Path(folder) / "model.safetensors").items()))
        ranks.append({name: param.detach() for name, param in model.named_parameters()})
    return ranks


def planned(arch: Architecture, mesh: ServerMesh, rank: int, hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the parameters of a rank, put together from HF tensors as the plan says."""
    params = {}
    for tensor in served_tensors(arch, mesh, rank):
        for layer in range(arch.num_layers) if LAYER in tensor.name else (None,):
            if layer is not None and not tensor.is_in(layer, arch):
                continue
            param = torch.zeros(tensor.shape)
            cols = tensor.matrix_columns or (tensor.shape[-1] if len(tensor.shape) > 1 else 1)
            target = param.view(-1, cols)
            for part in tensor.rectangles:
                source = _hf_tensor(part.hf_name.replace(LAYER, str(layer)), arch, hf)
                source = source.reshape(-1, source.shape[-1] if source.ndim > 1 else 1)
                target[part.row : part.row + part.rows, part.col : part.col + part.cols] = source[
                    part.hf_row : part.hf_row + part.rows, part.hf_col : part.hf_col + part.cols
                ]
            params[tensor.name.replace(LAYER, str(layer))] = param
    return params


def _hf_tensor(name: str, arch: Architecture, stored: dict[str, torch.Tensor]) -> torch.Tensor:
    part = part_of(name, arch)
    return stored[name] if part is None else part.take(stored[part.stored][part.expert])


def differences(held: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """List the parameters of a rank that differ in name, shape or any value."""
    problems = [f"{name}: only one side has it" for name in sorted(held.keys() ^ expected.keys())]
    for name in sorted(held.keys() & expected.keys()):
        if held[name].shape != expected[name].shape:
            problems.append(f"{name}: {tuple(held[name].shape)}, planned {tuple(expected[name].shape)}")
        elif not torch.equal(held[name], expected[name].to(held[name].dtype)):
            problems.append(f"{name}: other values")
    return problems


def compare(launcher: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Compare all ranks of one server."""
    folder, tensor, extra = case["folder"], case["tensor"], case["extra_args"]
    flags = [*launcher._FLAGS, "--model-path", folder, "--dtype", "float32", "--tp-size", str(tensor)]
    backend = case.get("backend")
    with shared_experts_beside(backend) if backend else contextlib.nullcontext():
        held = loaded_by_sglang([*flags, "--skip-tokenizer-init", *extra], folder, tensor)
    dispatch = ["--moe-a2a-backend", backend] if backend else []
    arch, mesh = load_architecture(folder), mesh_of_flags(tensor, [*extra, *dispatch])
    hf = load_file(Path(folder) / "model.safetensors")
    problems = [
        f"rank {rank}: {problem}"
        for rank, params in enumerate(held)
        for problem in differences(params, planned(arch, mesh, rank, hf))
    ]
    elements = sum(param.numel() for params in held for param in params.values())
    return {"compared": sum(map(len, held)), "elements": elements, "problems": problems}


def main() -> None:
    torch.set_default_dtype(torch.float32)
    ready = launcher()
    for case in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print("RESULT " + json.dumps(compare(ready, case)), flush=True)


if __name__ == "__main__":
    main()
