"""Patches of torch with which Megatron-Core trains on CPUs over gloo.

Megatron-Core's training step always calls ``torch.cuda``. :func:`install` replaces these functions in this process; it
does nothing on a machine with GPUs. Each patch names the upstream lines that it works around, of 0.16.1 unless it says
otherwise, with paths relative to ``megatron/core``. They are tested with each of
:data:`megatron_dypo.supported.CPU_CORES`. FP8 and CUDA graphs are not covered, since they do not run on CPUs.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_dypo.supported import CPU_CORES, newest_core

_CPU = torch.device("cpu")


@functools.cache
def install() -> None:
    """Patch torch and Megatron-Core for this process; a second call does nothing.

    Raises:
        ValueError: another version of Megatron-Core, with which these patches are not tested.
    """
    import megatron.core

    from megatron_dypo.mcore.compat import cpu_megatron

    require_known(megatron.core.__version__)
    _patch_torch_factories()
    _patch_torch_cuda()
    _patch_tensor_methods()
    _patch_gloo_scatter()
    _patch_gloo_uneven()
    cpu_megatron.patch_megatron()


def require_known(version: str) -> None:
    """Raise ValueError unless the patches are tested with this Megatron-Core.

    Args:
        version: ``megatron.core.__version__``. In a git repository 0.19 appends the commit: ``0.19.2+e44f404f``.
    """
    if version.partition("+")[0] not in CPU_CORES:
        raise ValueError(
            f"megatron-core=={version}: on a CPU it must be one of {', '.join(CPU_CORES)} (the CPU patches are tested "
            f"with these): pip install megatron-core=={newest_core(platform.python_version())}"
        )


def _patch_torch_factories() -> None:
    """Make factories ignore ``device="cuda"`` and ``pin_memory=True``, which Megatron passes as literals.

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
    """Replace the ``torch.cuda`` functions that Megatron calls also without a GPU.

    ``current_device``: tensor_parallel/layers.py:261 and every other allocation. ``synchronize``:
    pipeline_parallel/p2p_communication.py:398. RNG: tensor_parallel/random.py:440 and the functions it calls.
    """
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)


def _patch_tensor_methods() -> None:
    """Make ``tensor.cuda()`` return the tensor, and ``tensor.type()`` return a type name of ``torch.cuda``.

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
    """Scatter only contiguous tensors: gloo ignores strides (pytorch#24836), which silently corrupts other tensors.

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
    """Gather and scatter tensors of different sizes, which gloo does not support.

    The ranks that share an expert have different numbers of tokens for it. tensor_parallel/mappings.py:151 gathers
    these over the expert-tensor group; :193 sums the outputs and scatters them.
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
