"""Make a few steps of plain language-model training on fixed microbatches, for tests of optimizer and checkpoints."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

VOCAB = 131
NUM_ROWS, LENGTHS = 4, (8, 16, 4, 12)  # as context parallelism of 2 needs them


@dataclass
class Session:
    """A model with its optimizer on this rank."""

    layout: Any
    arch: Any
    chunks: list[Any]
    optimizer: Any

    def train(self, first: int, last: int) -> list[tuple[float, float]]:
        """Make updates ``first`` to ``last``, each on its own rows; return (gradient norm, learning rate) of each."""
        results = []
        for update in range(first, last + 1):
            self.optimizer.zero_grad()
            self.run(update)
            result = self.optimizer.step()
            assert result.ok
            results.append((result.grad_norm, result.lr))
        return results

    def run(self, update: int, *, forward_only: bool = False) -> list[torch.Tensor]:
        """Run forward and backward passes of one update's rows; return the summed losses on the last stage."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        mine = rows(update)[self.layout.dp_rank :: self.layout.data]
        return get_forward_backward_func()(
            forward_step_func=functools.partial(_forward, self.layout),
            data_iterator=[iter(mine) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(mine),
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def weights(self) -> dict[str, np.ndarray]:
        """Return whole HF tensors of this stage on its first rank, experts on the first ranks that own them."""
        from megatron_dypo.mcore.chunks import named_global_parameters
        from megatron_dypo.models.gather import iter_hf_tensors, sent_params

        layout = self.layout
        params = sent_params(named_global_parameters(self.chunks), self.arch, layout)
        tensors = iter_hf_tensors(params, self.arch, layout)
        return {name: tensor.float().numpy().copy() for name, tensor in tensors}


def rows(update: int) -> list[np.ndarray]:
    """Return [NUM_ROWS][T] tokens of packed rows, a pure function of the update's number."""
    generator = np.random.default_rng(update)
    return [generator.integers(3, VOCAB, size=sum(LENGTHS)) for _ in range(NUM_ROWS)]


def start(
    path: str,
    layout: Any,
    parallel: Any,
    dtype: Literal["float32", "bfloat16"] = "float32",
    recompute: Any = "none",
    megatron: Any = None,
    megatron_of_optimizer: Any = None,
    **optimizer: Any,
) -> Session:
    """Make a model with its initial weights and a fresh optimizer."""
    from megatron_dypo.config.model import ModelConfig
    from megatron_dypo.config.training import OptimizerConfig
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.optimizer import build_optimizer
    from megatron_dypo.models.architecture import load_architecture

    config = OptimizerConfig(
        **{
            "lr": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "eps": 1e-5,
            "megatron": megatron_of_optimizer or {},
            **optimizer,
        }
    )
    arch, model = (
        load_architecture(path),
        ModelConfig(hf_path=path, dtype=dtype, recompute=recompute, megatron=megatron or {}),
    )
    chunks = build_model(
        arch,
        model,
        parallel,
        layout,
        distributed_optimizer=config.distributed,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
    )
    load_initial_weights(chunks, model, arch, layout)
    return Session(layout, arch, chunks, build_optimizer(chunks, config, dtype=dtype, total_steps=8))


def _forward(layout: Any, iterator: Any, chunk: Any) -> Any:
    from megatron_dypo.batching.zigzag import zigzag_indices
    from megatron_dypo.mcore.attention import packed_seq_params

    tokens = torch.tensor(next(iterator))
    boundaries = np.cumsum([0, *LENGTHS])
    held = torch.from_numpy(zigzag_indices(boundaries, layout.cp_rank, layout.context))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    output = chunk(
        tokens[held][None],
        positions[held][None],
        None,
        packed_seq_params=packed_seq_params(torch.from_numpy(boundaries)),
        labels=tokens.roll(-1)[held],
        loss_mask=torch.arange(len(held)),
    )

    def loss(scored: tuple[torch.Tensor, torch.Tensor]) -> Any:
        total = -scored[0].sum() / (NUM_ROWS * len(tokens))
        return total, torch.tensor(1, dtype=torch.int), total.detach().clone()

    return output, loss
