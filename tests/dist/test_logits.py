"""Logits of our Megatron models against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import KINDS, import_transformers, make_hf_model

LENGTHS = ((5, 17, 1, 41), (70, 3, 3), (34,), (9, 9, 9, 9))
"""Sequences of each packed row; rows differ in their number of tokens, even for the sake of sequence parallelism."""

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SCALED = {
    "qwen2_yarn": ("qwen2", YARN),
    "qwen3_yarn": ("qwen3", {**YARN, "attention_factor": 1.5, "beta_fast": 8, "beta_slow": 2, "truncate": False}),
    "llama_yarn": ("llama", {**YARN, "mscale": 0.707, "mscale_all_dim": 1.5}),
    "llama_linear": ("llama", {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
}
"""Kinds with scaled positions; two of the rows have sequences longer than the original positions."""


def rows() -> list[list[np.ndarray]]:
    generator = np.random.default_rng(3)
    return [[generator.integers(3, 131, size=n) for n in lengths] for lengths in LENGTHS]


def rank_logits(paths: list[str], axes: dict) -> list[list[np.ndarray]] | None:
    """For each model its whole-vocabulary logits [T, V] of each row, from the ranks of the last stage."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    results = [_model_logits(path, parallel, layout) for path in paths]
    close(layout)
    return results if layout.is_last_stage else None


def _model_logits(path: str, parallel, layout) -> list[np.ndarray]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_dypo.models.architecture import load_architecture
    from megatron_dypo.config.model import ModelConfig
    from megatron_dypo.mcore.attention import packed_seq_params
    from megatron_dypo.mcore.model import build_model, load_initial_weights

    arch, model = load_architecture(path), ModelConfig(hf_path=path, dtype="float32")
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)

    def forward(iterator, chunk):
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


def _whole_vocabulary(logits_1TV: torch.Tensor, layout) -> np.ndarray:
    shards = [torch.empty_like(logits_1TV) for _ in range(layout.tensor)]
    torch.distributed.all_gather(shards, logits_1TV.contiguous(), group=layout.tp_group)
    return torch.cat(shards, dim=-1)[0].detach().numpy()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    plain = {kind: make_hf_model(kind, root / kind) for kind in KINDS}
    scaled = {
        name: make_hf_model(kind, root / name, rope_parameters=dict(rope)) for name, (kind, rope) in SCALED.items()
    }
    return plain | scaled


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, list[np.ndarray]]:
    """transformers' logits, one sequence at a time."""
    logits = {}
    for kind, path in models.items():
        oracle = import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            logits[kind] = [
                np.concatenate([oracle(torch.tensor(s)[None]).logits[0].numpy() for s in row]) for row in rows()
            ]
    return logits


@pytest.mark.parametrize(
    ("world_size", "axes"),
    [
        (1, {}),
        (2, {"tensor": 2}),
        (2, {"pipeline": 2}),
        (2, {"pipeline": 2, "virtual_pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2, "first_stage_layers": 3}),
        (2, {"tensor": 2, "sequence": True}),
    ],
)
def test_packed_logits_equal_transformers(world_size, axes, models, expected) -> None:
    results = run_ranks(world_size, rank_logits, [str(path) for path in models.values()], axes)
    last_stage = [result for result in results if result is not None]
    assert len(last_stage) == axes.get("tensor", 1)
    for result in last_stage:
        for kind, logits in zip(models, result, strict=True):
            for ours, theirs in zip(logits, expected[kind], strict=True):
                np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0, err_msg=kind)


def test_without_its_scaling_a_model_has_other_logits(models, expected) -> None:
    """The tolerance above tells them apart: on short sequences too, by the attention factor."""
    load = import_transformers().AutoModelForCausalLM.from_pretrained
    for name in SCALED:
        plain = load(models[name], dtype=torch.float32, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
        with torch.no_grad():
            logits = plain(torch.tensor(rows()[0][1])[None]).logits[0].numpy()
        start = LENGTHS[0][0]
        assert np.abs(logits - expected[name][0][start : start + LENGTHS[0][1]]).max() > 1e-2, name
