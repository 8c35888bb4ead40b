"""Whole-vocabulary logits of packed rows in any layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

LENGTHS = ((5, 17, 1, 41), (70, 3, 3), (34,), (9, 9, 9, 9))
"""Sequences of each packed row; rows differ in their number of tokens, even for the sake of sequence parallelism."""

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def rows() -> list[list[np.ndarray]]:
    """Return the tokens of each row, by sequence."""
    generator = np.random.default_rng(3)
    return [[generator.integers(3, 131, size=n) for n in lengths] for lengths in LENGTHS]


def rank_logits(paths: list[str], axes: dict[str, Any]) -> list[list[np.ndarray]] | None:
    """Return, on ranks of the last stage, the logits [T, V] of each row for each model, over the whole vocabulary."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    results = [_model_logits(path, parallel, layout) for path in paths]
    close(layout)
    return results if layout.is_last_stage else None


def _model_logits(path: str, parallel: Any, layout: Any) -> list[np.ndarray]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_dypo.config.model import ModelConfig
    from megatron_dypo.mcore.attention import packed_seq_params
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.models.architecture import load_architecture

    arch, model = load_architecture(path), ModelConfig(hf_path=path, dtype="float32")
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)

    def forward(iterator: Any, chunk: Any) -> Any:
        sequences = next(iterator)
        tokens = torch.tensor(np.concatenate(sequences))[None]
        positions = torch.cat([torch.arange(len(s)) for s in sequences])[None]
        boundaries = torch.tensor(np.cumsum([0, *(len(s) for s in sequences)]))
        output = chunk(tokens, positions, None, packed_seq_params=packed_seq_params(boundaries))
        return output, lambda logits, non_loss_data=True: logits

    iterators = [iter(rows()) for _ in chunks]
    shards = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators,
        model=chunks,
        num_microbatches=len(LENGTHS),
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return [_whole_vocabulary(shard, layout)[:, : arch.vocab_size] for shard in shards]


def _whole_vocabulary(logits_1TV: torch.Tensor, layout: Any) -> np.ndarray:
    shards = [torch.empty_like(logits_1TV) for _ in range(layout.tensor)]
    torch.distributed.all_gather(shards, logits_1TV.contiguous(), group=layout.tp_group)
    return torch.cat(shards, dim=-1)[0].detach().numpy()
