"""The model's part of the configuration tree, and how its ranks share it; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dypo.checks import require, require_not_negative, require_positive
from megatron_dypo.config.fp8 import Fp8Config
from megatron_dypo.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy: its weights, its precision and its memory."""

    hf_path: str = ""
    """HF model folder with ``config.json``, safetensors and tokenizer files."""
    family: Literal["auto", "bridge"] = "auto"
    """Where the names and sizes of the model come from. ``auto``: from this package's tables, by ``model_type``.
    ``bridge``: for a dense model that has no table, from the package ``megatron-bridge``, with ``refit.transport``
    ``broadcast`` or ``disk`` (docs/hf_models.md)."""
    mcore_path: str | None = None
    """Folder with initial weights in Megatron's dist_checkpointing format. ``hf_path`` then gives only architecture and
    tokenizer. ``null``: take the weights of ``hf_path``."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the parameters in forward and backward passes. The optimizer's main parameters are always fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping (Megatron's ``recompute_granularity``)."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """Parts of a layer that ``recompute: selective`` computes again, such as ``[core_attn, layernorm, moe_act]``. The
    installed Megatron says which there are."""
    logprob_memory_mib: float | None = None
    """Scratch memory for logits in MiB. It sets how many response tokens are processed per chunk (at least one); it
    changes speed, not results. ``null``: the size of this rank's output weight in fp32, and at least 256."""
    moe_aux_loss_coef: float | None = None
    """Mixture of experts: weight of the load-balancing loss. ``null``: ``router_aux_loss_coef`` of the HF config."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """More fields of Megatron's ``TransformerConfig``, such as ``{attention_backend: flash}``. Names and types are
    those of the installed version. Fields that other keys or the model's files decide are refused
    (docs/megatron_options.md)."""

    def __post_init__(self) -> None:
        require(bool(self.hf_path), "hf_path=''", "is required: an HF model folder")
        require(
            not self.fp8.is_on or self.dtype == "bfloat16",
            f"fp8.recipe={self.fp8.recipe}",
            f"needs dtype=bfloat16 around it, got {self.dtype}",
        )
        require(
            self.recompute_modules == ("core_attn",) or self.recompute == "selective",
            f"recompute_modules={list(self.recompute_modules)}",
            f"needs recompute=selective, got {self.recompute}",
        )
        require(bool(self.recompute_modules), "recompute_modules=[]", "name at least one; recompute=none has none")
        if self.moe_aux_loss_coef is not None:
            require_not_negative(self, "moe_aux_loss_coef")
        if self.logprob_memory_mib is not None:
            require_positive(self, "logprob_memory_mib")

    @property
    def element_size(self) -> int:
        """Bytes of one value of type ``dtype``."""
        return {"float32": 4, "bfloat16": 2}[self.dtype]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes of the training mesh. Data parallelism follows from the number of ranks."""

    num_processes: int | None = None
    """Ranks to start when the run is not under torchrun. ``null``: the fewest that the axes allow."""
    tensor: int = 1
    """Tensor parallelism: ranks that share the matrices of each layer."""
    pipeline: int = 1
    """Pipeline parallelism: stages that the layers are spread over."""
    virtual_pipeline: int | None = None
    """Model chunks on each pipeline rank (interleaved schedule). ``null``: one."""
    first_stage_layers: int | None = None
    """Layers of the first pipeline stage, in all its chunks (Megatron's ``num_layers_in_first_pipeline_stage``). The
    stages between the first and the last share the rest evenly. ``null``: as many as those stages."""
    last_stage_layers: int | None = None
    """Layers of the last pipeline stage, which also has the output layer. ``null``: as many as the stages before it."""
    context: int = 1
    """Context parallelism: ranks that share each microbatch. Each holds two parts of every sequence (zig-zag)."""
    expert: int = 1
    """Ranks that a layer's experts are spread over, out of the tensor × context × data ranks of a pipeline stage."""
    expert_tensor: int = 1
    """Ranks that each expert is split over (Megatron's expert tensor parallelism), neighbours in the same stage. 1
    keeps experts whole, at any ``tensor``."""
    sequence: bool = False
    """Sequence parallelism (Megatron's ``--sequence-parallel``); needs tensor > 1."""
    expert_dispatcher: Literal["alltoall", "deepep", "hybridep"] = "alltoall"
    """How tokens get to their experts. ``alltoall``: by NCCL or gloo. ``deepep``, ``hybridep``: by DeepEP's kernels
    (Megatron's ``flex`` dispatcher); these need GPUs, the package ``deep_ep``, and more than one rank of experts."""
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """More fields of Megatron's ``DistributedDataParallelConfig``, such as ``{bucket_size: 40000000}``. Names and types
    are those of the installed version. Fields that other keys decide are refused (docs/megatron_options.md)."""

    def __post_init__(self) -> None:
        require_positive(self, "tensor", "pipeline", "context", "expert", "expert_tensor")
        require(not self.sequence or self.tensor > 1, "sequence=true", f"needs tensor > 1, got {self.tensor}")
        require(
            self.expert_dispatcher == "alltoall" or self.expert * self.expert_tensor > 1,
            f"expert_dispatcher={self.expert_dispatcher}",
            f"needs expert × expert_tensor > 1, got {self.expert} × {self.expert_tensor}",
        )
        if self.virtual_pipeline is not None:
            require(self.virtual_pipeline > 1, f"virtual_pipeline={self.virtual_pipeline}", "must be at least 2")
            require(self.pipeline > 1, f"virtual_pipeline={self.virtual_pipeline}", "needs pipeline > 1")
        if self.num_processes is not None:
            self._check_world("num_processes", self.num_processes)
        _ = self.mesh()  # whose rules hold here

    def mesh(self, world_size: int | None = None) -> Mesh:
        """Return the mesh of ``world_size`` ranks, which gives data parallelism what the other axes leave.

        Args:
            world_size: number of ranks. None: :attr:`local_ranks`, for a caller that does not use data parallelism.

        Raises:
            ValueError: e.g. ``world_size=6: must be a multiple of tensor × pipeline × context = 2 × 2 × 1 = 4``.
        """
        world_size = self.local_ranks if world_size is None else world_size
        self._check_world("world_size", world_size)
        return Mesh(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual_pipeline=self.virtual_pipeline or 1,
            context=self.context,
            data=world_size // (self.tensor * self.pipeline * self.context),
            expert=self.expert,
            expert_tensor=self.expert_tensor,
            first_stage_layers=self.first_stage_layers,
            last_stage_layers=self.last_stage_layers,
        )

    @property
    def fewest_ranks(self) -> int:
        """The smallest world that the axes can be laid out on; every other one is a multiple of it."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert * self.expert_tensor)

    @property
    def local_ranks(self) -> int:
        """Ranks to start on this machine."""
        return self.num_processes or self.fewest_ranks

    def _check_world(self, name: str, size: int) -> None:
        replica = self.tensor * self.pipeline * self.context
        require(
            size > 0 and size % replica == 0,
            f"{name}={size}",
            f"must be a multiple of tensor × pipeline × context = "
            f"{self.tensor} × {self.pipeline} × {self.context} = {replica}",
        )
