"""Everything that makes Megatron-Core 0.16.1 train on CPUs over gloo: all patches, in one file.

Megatron-Core's training step calls ``torch.cuda`` without asking. :func:`install` replaces what it calls, in this
process, and nothing on a machine with GPUs. Each patch names the upstream lines (of 0.16.1) that it works around; paths
are relative to ``megatron/core``. Not covered, since nothing here uses it: fp8, CUDA graphs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

SUPPORTED = "0.16.1"
_CPU = torch.device("cpu")


@functools.cache
def install() -> None:
    """Patch torch and Megatron-Core for this process; a second call does nothing.

    Raises:
        ValueError: another version of Megatron-Core, whose lines these patches do not know.
    """
    import megatron.core

    if megatron.core.__version__ != SUPPORTED:
        raise ValueError(
            f"megatron-core=={megatron.core.__version__}: on a CPU only {SUPPORTED} is supported "
            f"(its CPU patches are written for that version): pip install megatron-core=={SUPPORTED}"
        )
    _patch_torch_factories()
    _patch_torch_cuda()
    _patch_tensor_methods()
    _patch_gloo_scatter()
    _patch_gloo_uneven()
    _patch_rng_tracker()
    _patch_torch_norm()
    _patch_selective_checkpoint()
    _patch_experts()
    _patch_distributed_optimizer()


def _patch_torch_factories() -> None:
    """``device="cuda"`` and ``pin_memory=True`` as literals.

    optimizer/clip_grads.py:90-207; distributed/param_and_grad_buffer.py:768;
    optimizer/optimizer.py:473-485; dist_checkpointing/exchange_utils.py:104,326;
    models/common/embeddings/rope_utils.py:63.
    """

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device")).startswith("cuda"):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return wrapped

    for name in ("empty", "zeros", "ones", "tensor", "empty_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _patch_torch_cuda() -> None:
    """``torch.cuda`` functions called without a GPU in sight.

    ``current_device``: tensor_parallel/layers.py:261 and every other allocation. ``synchronize``:
    pipeline_parallel/p2p_communication.py:398. RNG: tensor_parallel/random.py:440 and the functions it calls.
    """
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)


def _patch_tensor_methods() -> None:
    """``tensor.cuda()`` and comparisons of ``tensor.type()`` with ``"torch.cuda.FloatTensor"``.

    models/common/language_module/language_module.py (tied embeddings); optimizer/optimizer.py:671-699;
    optimizer/distrib_optimizer.py:361-435; optimizer/clip_grads.py:167.
    """
    upstream_type = torch.Tensor.type

    def type_as_on_gpu(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return upstream_type(self, dtype, *args, **kwargs)
        return upstream_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = type_as_on_gpu  # type: ignore[method-assign,assignment]


def _patch_gloo_scatter() -> None:
    """gloo's scatter reads memory and ignores strides (pytorch#24836), and so corrupts silently.

    optimizer/distrib_optimizer.py scatters parameter states on load.
    """
    upstream_scatter = dist.scatter

    @functools.wraps(upstream_scatter)
    def scatter(
        tensor: torch.Tensor, scatter_list: Sequence[torch.Tensor] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        pieces = [piece.contiguous() for piece in scatter_list] if scatter_list else None
        return upstream_scatter(tensor, pieces, *args, **kwargs)

    dist.scatter = scatter


def _patch_gloo_uneven() -> None:
    """gloo gathers and scatters tensors of one size only; the ranks that an expert is split over have uneven tokens for
    it.

    tensor_parallel/mappings.py:151 gathers them over the expert-tensor group, :193 adds the outputs up and scatters
    them.
    """
    upstream_all_gather, upstream_reduce_scatter = dist.all_gather, dist.reduce_scatter

    @functools.wraps(upstream_all_gather)
    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
        if len({piece.shape for piece in tensor_list}) == 1:
            return upstream_all_gather(tensor_list, tensor, group, **kwargs)
        for rank, piece in enumerate(tensor_list):
            if rank == dist.get_rank(group):
                piece.copy_(tensor)
            dist.broadcast(piece, group=group, group_src=rank)
        return None

    @functools.wraps(upstream_reduce_scatter)
    def reduce_scatter(output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if len({piece.shape for piece in input_list}) == 1:
            return upstream_reduce_scatter(output, input_list, *args, **kwargs)
        group = kwargs.get("group")
        for rank, piece in enumerate(input_list):
            total = piece.clone(memory_format=torch.contiguous_format)
            dist.reduce(total, group=group, group_dst=rank)
            if rank == dist.get_rank(group):
                output.copy_(total)
        return None

    dist.all_gather = all_gather  # type: ignore[assignment]
    dist.reduce_scatter = reduce_scatter


def _patch_rng_tracker() -> None:
    """tensor_parallel/random.py:46-107: RNG states of a GPU; here those of the CPU."""
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)
    # It warns on each fork that the CPU's state changed in a GPU context, which is the point here.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _patch_torch_norm() -> None:
    """transformer/torch_norm.py:36 refuses sequence parallelism, for want of marking the weights for the all-reduce."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def new_norm(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> torch.nn.Module:
        norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new_norm)


def _patch_selective_checkpoint() -> None:
    """tensor_parallel/random.py:636: ``fp8=False`` counts as fp8, and then needs Transformer Engine."""
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    upstream_init = CheckpointWithoutOutput.__init__

    def init(self: Any, fp8: Any = None) -> None:
        upstream_init(self, fp8 or None)

    CheckpointWithoutOutput.__init__ = init


def _patch_experts() -> None:
    """Mixture of experts without Transformer Engine and streams.

    transformer/moe/moe_utils.py:1192,1224 reads a name that only an import of Transformer Engine makes.
    transformer/moe/token_dispatcher.py:445,871-899 copies counts to the host on a stream of their own.
    """
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    class Stream:
        """All work on a CPU is in order."""

        def wait_stream(self, other: Any) -> None: ...

        def record_event(self, event: Any = None) -> Any:
            return self

        def synchronize(self) -> None: ...

    only_stream = Stream()

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = on_host
    torch.cuda.Stream = lambda *args, **kwargs: only_stream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda device=None: only_stream  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]


def _patch_distributed_optimizer() -> None:
    """Save and resume of the distributed optimizer over torch's AdamW (Apex' and TE's Adam keep no ``step`` tensor).

    optimizer/distrib_optimizer.py:640-642 needs states that exist only after the first step; :818-825 gives all
    parameters one shared ``step`` tensor, which then advances once for each of them; :936-940 copies ``step`` too, and
    writes into leaves that require gradients.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    upstream_state_dict = DistributedOptimizer.state_dict
    upstream_load_state_dict = DistributedOptimizer.load_state_dict

    def state_dict(self: Any) -> Any:
        if not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return upstream_state_dict(self)

    def load_state_dict(self: Any, state_dict: Any) -> None:
        upstream_load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @torch.no_grad()
    def set_main_param_and_optimizer_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group_index, group_order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group_index]["params"][group_order]
        for key, value in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key in tensors and key != "step":
                value.copy_(tensors[key])

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
