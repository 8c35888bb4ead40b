"""Draw trainers, servers and architectures for refit plans, and compute naively what SGLang must hold."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.experts import Experts
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.stacked_experts import stored_tensors
from megatron_dypo.refit.plan.refit_plan import Mesh, ServerMesh
from tests.support.architectures import divisors, make_arch
from tests.support.present import present


@dataclass(frozen=True, kw_only=True)
class Case:
    arch: Architecture
    source: Mesh
    servers: tuple[ServerMesh, ...]
    stage_layers: tuple[int, ...]
    """Layers of each stage of the trainer."""


def qwen3_moe_experts(num_experts: int, ffn_hidden_size: int) -> Experts:
    return Experts(
        num_experts=num_experts, per_token=1, ffn_hidden_size=ffn_hidden_size, normalized=False, moe_aux_loss_coef=0.0
    )


QUANTIZABLE = ("llama", "qwen2", "qwen3", "qwen3_moe")
FAMILIES = (*QUANTIZABLE, "deepseek_v3", "glm4_moe", "gpt_oss")
"""Families of cases."""


@st.composite
def cases(draw: st.DrawFn, unit: int = 1, families: tuple[str, ...] = FAMILIES) -> Case:
    """Draw cases in which every size that may be cut is a multiple of ``unit`` on each rank."""
    family = draw(st.sampled_from(families))
    tensor = draw(st.sampled_from([1, 2, 4] if unit == 1 else [1, 2]))
    pipeline, virtual_pipeline = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 1, 2]))
    uneven = [virtual_pipeline * count for count in (1, 3)] if pipeline > 1 else []
    source = Mesh(
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual_pipeline,
        first_stage_layers=draw(st.sampled_from([None, *uneven])),
        last_stage_layers=draw(st.sampled_from([None, *uneven])),
        context=draw(st.sampled_from([1, 1, 2])),
        data=draw(st.sampled_from([1, 2, 3])),
    )
    server_sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 8] if unit == 1 else [1, 2, 4]), min_size=1, max_size=3))
    servers = tuple(ServerMesh(tensor=size) for size in server_sizes)
    if family == "gpt_oss":
        source = dataclasses.replace(source, expert=draw(st.sampled_from(divisors(source.stage_size))))
    if family in ("qwen3_moe", "deepseek_v3", "glm4_moe"):
        expert = draw(st.sampled_from(divisors(source.stage_size)))
        expert_tensor = draw(st.sampled_from(divisors(source.stage_size // expert)[:2]))
        source = dataclasses.replace(source, expert=expert, expert_tensor=expert_tensor)
        servers = tuple(dataclasses.replace(e, expert=draw(st.sampled_from(divisors(e.tensor)))) for e in servers)
    if family not in ("llama", "qwen2"):
        servers = tuple(_with_copies(draw, server, family) for server in servers)
    each = virtual_pipeline * draw(st.integers(1, 2))
    stage_layers = [each] * pipeline
    stage_layers[0] = source.first_stage_layers or each
    stage_layers[-1] = source.last_stage_layers or stage_layers[-1]
    arch = draw(_architectures(family, source, servers, unit, sum(stage_layers)))
    return Case(arch=arch, source=source, servers=servers, stage_layers=tuple(stage_layers))


def _with_copies(draw: st.DrawFn, server: ServerMesh, family: str) -> ServerMesh:
    """Draw copies of attention, and what ranks hold whole."""
    copies = draw(st.sampled_from([1, *divisors(server.tensor)]))
    has_shared = family in ("deepseek_v3", "glm4_moe")
    return dataclasses.replace(
        server,
        attention_data=copies,
        output_by_attention=copies == server.tensor > 1 and draw(st.booleans()),
        whole_dense=has_shared and draw(st.booleans()),
        whole_shared=has_shared and draw(st.booleans()),
    )


@st.composite
def _architectures(
    draw: st.DrawFn,
    family: str,
    source: Mesh,
    servers: tuple[ServerMesh, ...],
    unit: int,
    num_layers: int,
) -> Architecture:
    sizes = [source.tensor, *(server.tensor for server in servers)]
    common = math.lcm(*sizes)
    kv_heads = draw(st.sampled_from([k for k in (1, 2, 3, 4, 6, 8) if all(k % s == 0 or s % k == 0 for s in sizes)]))
    heads = math.lcm(common, kv_heads) * draw(st.integers(1, 2 if unit == 1 else 1))
    splits = math.lcm(source.tensor, source.tensor // math.gcd(source.tensor, heads + 2 * kv_heads))
    head_dim = unit * draw(st.integers(1, 2)) if unit > 1 else splits * draw(st.integers(1, 2))
    assume((heads + 2 * kv_heads) * head_dim % (unit * source.tensor) == 0)
    overrides: dict[str, Any] = {}
    if family == "qwen3_moe":
        num_experts = math.lcm(source.expert, *(server.expert for server in servers))
        width = math.lcm(source.expert_tensor, *(server.tensor // server.expert for server in servers)) * unit
        overrides["experts"] = qwen3_moe_experts(num_experts * draw(st.integers(1, 2)), width * draw(st.integers(1, 2)))
    if family == "glm4_moe":
        overrides |= {"qkv_bias": draw(st.booleans()), "qk_norm": draw(st.booleans())}
    if family == "deepseek_v3":
        kv_heads, latent = heads, make_arch(family).latent
        assert latent is not None
        overrides["latent"] = dataclasses.replace(latent, query_rank=draw(st.sampled_from([None, 11])))
        head_dim = latent.query_dim
    if family in ("deepseek_v3", "glm4_moe"):
        split = math.lcm(source.expert_tensor, *(server.tensor // server.expert for server in servers))
        overrides["experts"] = dataclasses.replace(
            present(make_arch(family).experts),
            num_experts=math.lcm(source.expert, *(server.expert for server in servers)) * draw(st.integers(1, 2)),
            ffn_hidden_size=split,
            shared_width=common * draw(st.integers(1, 2)),
            num_dense_layers=draw(st.integers(0, num_layers - 1)),
        )
    if family == "gpt_oss":
        overrides["experts"] = dataclasses.replace(
            present(make_arch(family).experts),
            num_experts=source.expert * draw(st.integers(1, 2)),
            ffn_hidden_size=common * draw(st.integers(1, 2)),
        )
    return make_arch(
        family,
        num_layers=num_layers,
        hidden_size=draw(st.integers(4, 7)) if unit == 1 else unit * 2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=common * unit * draw(st.integers(1, 2)),
        vocab_size=draw(st.integers(8, 200)),
        tied_embeddings=family not in ("glm4_moe", "gpt_oss") and draw(st.booleans()),
        **overrides,
    )


def numbered_hf_tensors(arch: Architecture) -> dict[str, Tensor]:
    """Return all HF tensors of an architecture; no two of their elements are equal, and none is zero."""
    tensors: dict[str, Tensor] = {}
    start = 1
    for row in family_rows(arch):
        for name, shape in zip(row.hf, row.rule.hf_shapes(arch), strict=True):
            if name not in tensors:
                size = math.prod(shape)
                tensors[name] = torch.arange(start, start + size).reshape(shape)
                start += size
    return tensors


class NaiveServerRank:
    """The tensors that SGLang's loaders make of HF tensors on one rank, written after the loaders, not the plan."""

    def __init__(self, arch: Architecture, server: ServerMesh, server_rank: int, *, split_inputs: bool = True) -> None:
        """Take the tensors. ``split_inputs=False`` is for scales of rows, which have one column: RowParallelLinear does
        not split them."""
        self._arch, self._size, self._rank = arch, server.tensor, server_rank
        self._expert_size, self._split_inputs = server.expert, split_inputs
        self._attention = server.tensor // server.attention_data
        self._output = self._attention if server.output_by_attention else server.tensor
        self._dense = 1 if server.whole_dense else server.tensor
        self._shared = 1 if server.whole_shared else server.tensor

    def linear(self, hf: dict[str, Tensor], prefix: str, kind: str) -> dict[str, Tensor]:
        """Load one kind of tensors as one layer's QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear and
        FusedMoE do."""
        attention = prefix + "self_attn."
        tensors = (self._latent if self._arch.latent else self._qkv)(hf, attention, kind)
        if kind == "bias":
            return tensors
        tensors[f"{attention}o_proj.{kind}"] = self._inputs(hf[f"{attention}o_proj.{kind}"], self._attention)
        if f"{prefix}mlp.gate_proj.{kind}" in hf:
            return {**tensors, **self._mlp(hf, f"{prefix}mlp.", kind, self._dense)}
        shared = f"{prefix}mlp.shared_experts."
        if f"{shared}up_proj.{kind}" in hf:
            tensors |= self._mlp(hf, shared, kind, self._shared)
        if self._arch.family == "gpt_oss":
            return tensors
        return {**tensors, **self._experts(hf, f"{prefix}mlp.experts.", kind)}

    def _qkv(self, hf: dict[str, Tensor], prefix: str, kind: str) -> dict[str, Tensor]:
        query, key, value = (hf[f"{prefix}{name}_proj.{kind}"] for name in "qkv")
        return {
            f"{prefix}qkv_proj.{kind}": torch.cat(
                [self._part(query, self._attention), self._kv_heads(key), self._kv_heads(value)]
            )
        }

    def _latent(self, hf: dict[str, Tensor], prefix: str, kind: str) -> dict[str, Tensor]:
        """Load as deepseek_weight_loader.py does: down-projections are replicated, and fused if both are there."""
        down = hf[f"{prefix}kv_a_proj_with_mqa.{kind}"]
        tensors = {f"{prefix}kv_b_proj.{kind}": self._part(hf[f"{prefix}kv_b_proj.{kind}"], self._attention)}
        if f"{prefix}q_proj.{kind}" in hf:
            tensors[f"{prefix}q_proj.{kind}"] = self._part(hf[f"{prefix}q_proj.{kind}"], self._attention)
            return {**tensors, f"{prefix}kv_a_proj_with_mqa.{kind}": down}
        tensors[f"{prefix}q_b_proj.{kind}"] = self._part(hf[f"{prefix}q_b_proj.{kind}"], self._attention)
        tensors[f"{prefix}fused_qkv_a_proj_with_mqa.{kind}"] = torch.cat([hf[f"{prefix}q_a_proj.{kind}"], down])
        return tensors

    def _mlp(self, hf: dict[str, Tensor], prefix: str, kind: str, size: int) -> dict[str, Tensor]:
        gate, up, down = (hf[f"{prefix}{name}_proj.{kind}"] for name in ("gate", "up", "down"))
        inputs = torch.cat([self._part(gate, size), self._part(up, size)])
        return {f"{prefix}gate_up_proj.{kind}": inputs, f"{prefix}down_proj.{kind}": self._inputs(down, size)}

    def whole(self, hf: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return all tensors of an unquantised model."""
        arch = self._arch
        tensors = {name: tensor for name, tensor in hf.items() if "norm" in name or ".mlp.gate." in name}
        tensors["model.embed_tokens.weight"] = self._vocabulary(hf["model.embed_tokens.weight"], self._attention)
        if not arch.tied_embeddings:
            tensors["lm_head.weight"] = self._vocabulary(hf["lm_head.weight"], self._output)
        elif arch.family == "qwen3_moe":
            tensors["lm_head.weight"] = self._vocabulary(hf["model.embed_tokens.weight"], self._output)
        for layer in range(arch.num_layers):
            for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
                tensors.update(self.linear(hf, f"model.layers.{layer}.", kind))
        return {**tensors, **self._of_gpt_oss(hf)} if arch.family == "gpt_oss" else tensors

    def _of_gpt_oss(self, hf: dict[str, Tensor]) -> dict[str, Tensor]:
        """Load as gpt_oss.py and weight_loader_fused do, from the tensors of a model folder."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in stored_tensors(hf.items(), self._arch):
            owner, _, kind = name.rpartition(".")
            if kind == "sinks":
                tensors[name] = self._part(tensor, self._attention)
            elif ".mlp.router." in name or name.endswith("o_proj.bias"):
                tensors[name] = tensor
            elif kind == "gate_up_proj":
                tensors[f"{owner}.w13_weight"] = tensor.transpose(-2, -1).tensor_split(self._size, 1)[self._rank]
            elif kind == "gate_up_proj_bias":
                tensors[f"{owner}.w13_weight_bias"] = tensor.tensor_split(self._size, 1)[self._rank]
            elif kind == "down_proj":
                tensors[f"{owner}.w2_weight"] = tensor.transpose(-2, -1).tensor_split(self._size, 2)[self._rank]
            elif kind == "down_proj_bias":
                tensors[f"{owner}.w2_weight_bias"] = torch.zeros_like(tensor) if self._rank else tensor
        return tensors

    def _part(self, tensor: Tensor, size: int) -> Tensor:
        """Split over ``size`` neighbouring ranks; the next ones begin anew."""
        return tensor.tensor_split(size)[self._rank % size]

    def _inputs(self, tensor: Tensor, size: int) -> Tensor:
        return tensor.tensor_split(size, 1)[self._rank % size] if self._split_inputs else tensor

    def _kv_heads(self, tensor: Tensor) -> Tensor:
        heads = list(tensor.tensor_split(self._arch.num_key_value_heads))
        if self._attention > len(heads):
            return heads[self._rank % self._attention // (self._attention // len(heads))]
        return self._part(tensor, self._attention)

    def _vocabulary(self, tensor: Tensor, size: int) -> Tensor:
        padded = math.ceil(len(tensor) / 64) * 64
        if padded % size:
            padded = math.ceil(len(tensor) / (64 * size)) * 64 * size
        return self._part(torch.cat([tensor, tensor.new_zeros(padded - len(tensor), tensor.shape[1])]), size)

    def _experts(self, hf: dict[str, Tensor], prefix: str, kind: str) -> dict[str, Tensor]:
        assert self._arch.experts is not None
        split = self._size // self._expert_size
        expert_rank, rank = divmod(self._rank, split)
        owned = torch.arange(self._arch.experts.num_experts).tensor_split(self._expert_size)[expert_rank]
        inputs, outputs = [], []
        for expert in owned.tolist():
            gate, up, down = (hf[f"{prefix}{expert}.{name}_proj.{kind}"] for name in ("gate", "up", "down"))
            inputs.append(torch.cat([gate.tensor_split(split)[rank], up.tensor_split(split)[rank]]))
            outputs.append(down.tensor_split(split, 1)[rank] if self._split_inputs else down)
        return {f"{prefix}w13_{kind}": torch.stack(inputs), f"{prefix}w2_{kind}": torch.stack(outputs)}
