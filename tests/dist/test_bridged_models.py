"""Models whose names and sizes come from Megatron-Bridge: against transformers, in several layouts, and to servers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.bridged_models import KINDS, NEEDS_BRIDGE, SIZES, make_bridged_model
from tests.support.broadcast_server import BroadcastServer
from tests.support.dist.logits import rows
from tests.support.dist.spawn import run_ranks
from tests.support.fake_control import KEY, running
from tests.support.hf_models import import_transformers
from tests.support.slow import slow_unless

pytestmark = NEEDS_BRIDGE
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "sequence": {"tensor": 2, "sequence": True},
    "interleaved": {"pipeline": 2, "virtual_pipeline": 2},
}
IN_EVERY_RUN = [("nemotron", "sequence"), ("nemotron", "interleaved"), ("gemma", "tensor"), ("gemma", "pipeline")]
"""Cases that are not left to the slow tests."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {kind: make_bridged_model(kind, root / kind) for kind in KINDS}


def _built(path: str, axes: dict[str, Any]) -> tuple[Any, Any, Any]:
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.model import build_model, load_initial_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.bridged import architecture_of

    parallel = ParallelConfig(**axes)
    layout = start_megatron(parallel)
    model = ModelConfig(hf_path=path, dtype="float32", family="bridge")
    arch = architecture_of(model)
    chunks = build_model(arch, model, parallel, layout)
    load_initial_weights(chunks, model, arch, layout)
    return layout, arch, chunks


def rank_logprobs(path: str, axes: dict[str, Any]) -> list[np.ndarray] | None:
    """Return the log-probs of every token but the first one of each sequence, on ranks of the last stage."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_dypo.mcore.attention import packed_seq_params
    from megatron_dypo.parallel.groups import close

    layout, _, chunks = _built(path, axes)

    def forward(iterator: Any, chunk: Any) -> Any:
        sequences = next(iterator)
        tokens = torch.tensor(np.concatenate(sequences))
        positions = torch.cat([torch.arange(len(s)) for s in sequences])[None]
        boundaries = torch.tensor(np.cumsum([0, *(len(s) for s in sequences)]))
        output = chunk(
            tokens[None],
            positions,
            None,
            packed_seq_params=packed_seq_params(boundaries),
            labels=tokens.roll(-1),
            loss_mask=torch.arange(len(tokens)),
        )
        return output, lambda scored, non_loss_data=True: scored[0].detach().numpy()

    found = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(rows()) for _ in chunks],
        model=chunks,
        num_microbatches=len(rows()),
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    close(layout)
    return found if layout.is_last_stage else None


@pytest.mark.parametrize(
    ("kind", "layout"),
    slow_unless(
        lambda case: case in IN_EVERY_RUN,
        [case for case in itertools.product(KINDS, LAYOUTS) if case != ("gemma", "interleaved")],
    ),
)
def test_logprobs_of_the_loss_equal_those_of_transformers(kind, layout, models) -> None:
    oracle = import_transformers().AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32)
    axes = LAYOUTS[layout]
    num_ranks = max(axes.get("tensor", 1), axes.get("pipeline", 1))
    results = [r for r in run_ranks(num_ranks, rank_logprobs, str(models[kind]), axes) if r is not None]
    assert len(results) == axes.get("tensor", 1)
    for result, (ours, row) in itertools.product(range(len(results)), enumerate(rows())):
        start = 0
        for sequence in row:
            with torch.no_grad():
                logp = oracle(torch.tensor(sequence)[None]).logits[0].log_softmax(-1)
            expected = logp[:-1].gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
            found = results[result][ours][start : start + len(sequence) - 1]
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)
            start += len(sequence)


def rank_refits(path: str, axes: dict[str, Any], urls: list[str], run_dir: str) -> list[int]:
    """Scale every weight, refit by disk and by broadcast, and export; return the bytes of both refits."""
    from megatron_dypo.config.refit import RefitConfig
    from megatron_dypo.mcore.bridged.weights import BridgedWeights
    from megatron_dypo.models.export import export_hf
    from megatron_dypo.parallel.groups import close
    from megatron_dypo.refit.refitter import Refitter

    layout, arch, chunks = _built(path, axes)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(2)  # exact, so that servers must get the trained weights and not those of the folder
    whole = BridgedWeights(path, chunks, layout)
    num_bytes = []
    transports: tuple[Literal["disk", "auto"], ...] = ("disk", "auto")
    for version, transport in enumerate(transports, start=1):
        refitter = Refitter(
            layout,
            arch,
            lambda: [],
            urls=urls,
            api_key=KEY,
            config=RefitConfig(transport=transport, deadline_s=60.0),
            run_dir=Path(run_dir),
            hf_reference=Path(path),
            whole=whole,
        )
        num_bytes.append(refitter.refit(version).bytes)
        refitter.close()
    export_hf([], arch, layout, out_dir=Path(run_dir) / "hf", reference_hf_path=path, whole=whole)
    close(layout)
    return num_bytes


@pytest.mark.parametrize(("kind", "axes"), [("nemotron", {"tensor": 2}), ("gemma", {"pipeline": 2})])
def test_servers_and_the_export_get_each_weight_once(kind, axes, models, tmp_path) -> None:
    expected = {name: 2 * tensor for name, tensor in load_file(models[kind] / "model.safetensors").items()}
    state = {"model_type": kind, "model_path": str(models[kind])}
    # A server that could take p2p and local, which auto must not choose.
    with running([BroadcastServer(**state, loaders=("megatron_dypo.refit.receiver.load",))]) as (server,):
        results = run_ranks(2, rank_refits, str(models[kind]), axes, [server.url], str(tmp_path))
        assert server.version == "2"
    size = sum(4 * tensor.numel() for tensor in expected.values())
    assert results == [[size, size]] * 2
    for folder in (tmp_path / "refit" / "version_1", tmp_path / "hf"):
        written: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            assert not written.keys() & tensors.keys()
            written.update(tensors)
        assert_equal(written, expected)
    assert sorted(server.received) == sorted(expected)
    assert_equal(server.loaded, expected)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def rank_error(path: str, axes: dict[str, Any]) -> str:
    from megatron_dypo.parallel.groups import close

    try:
        layout, _, _ = _built(path, axes)
    except ValueError as error:
        return str(error)
    close(layout)
    return ""


def test_a_tensor_that_no_mapping_reads_is_refused(models, tmp_path) -> None:
    tensors = load_file(models["nemotron"] / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = torch.zeros(2)
    tensors.pop("model.layers.3.self_attn.k_proj.weight")
    _copy(models["nemotron"], tmp_path, tensors)
    (error,) = run_ranks(1, rank_error, str(tmp_path), {})
    assert "tensor model.layers.0.extra.weight: no mapping reads it" in error
    assert "tensor model.layers.3.self_attn.k_proj.weight is missing" in error
    assert "\n" not in error


def test_interleaved_stages_of_a_tied_model_are_refused(models) -> None:
    for error in run_ranks(2, rank_error, str(models["gemma"]), LAYOUTS["interleaved"]):
        assert error.startswith("parallel.virtual_pipeline=2: must be null with model.family=bridge")


def test_a_tensor_of_another_shape_is_refused(models, tmp_path) -> None:
    tensors = load_file(models["nemotron"] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(4, 64)
    _copy(models["nemotron"], tmp_path, tensors)
    (error,) = run_ranks(1, rank_error, str(tmp_path), {})
    assert "model.layers.1.mlp.up_proj.weight: 256 numbers, the model has 6144" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPTNeoForCausalLM"]}, "Megatron-Bridge does not take this model"),
        ({"norm_eps": 0.5, "rms_norm_eps": 1e-3}, "provider has layernorm_epsilon=0.5: config.json says 0.001"),
        ({"attention_dropout": 0.5, "hidden_dropout": 0.0}, ""),
        ({"hidden_act": "silu"}, "provider has activation_func=squared_relu: config.json says hidden_act='silu'"),
        ({"vocab_size": 133}, "parallel.tensor=2: does not divide vocab_size=133"),
    ],
)
def test_a_model_that_would_be_computed_otherwise_is_refused(changes, message, models, tmp_path) -> None:
    config = json.loads((models["nemotron"] / "config.json").read_text())
    _copy(models["nemotron"], tmp_path, load_file(models["nemotron"] / "model.safetensors"), {**config, **changes})
    for error in run_ranks(2, rank_error, str(tmp_path), {"tensor": 2}):
        assert message in error
        assert bool(message) == bool(error)
        assert "\n" not in error


def test_an_output_layer_that_the_embedding_is_not_is_refused_where_the_provider_ties_them(models, tmp_path) -> None:
    config = json.loads((models["gemma"] / "config.json").read_text())
    _copy(
        models["gemma"],
        tmp_path,
        load_file(models["gemma"] / "model.safetensors"),
        config | {"tie_word_embeddings": False},
    )
    (error,) = run_ranks(1, rank_error, str(tmp_path), {})
    assert error.endswith("provider has share_embeddings_and_output_weights=True: config.json says False")


def test_a_config_of_older_transformers_is_the_same_model(models, tmp_path) -> None:
    config = json.loads((models["nemotron"] / "config.json").read_text())
    config |= config.pop("rope_parameters")
    assert {config.pop("rope_type"), config["partial_rotary_factor"]} == {"default", 0.5}
    _copy(models["nemotron"], tmp_path, load_file(models["nemotron"] / "model.safetensors"), config)
    expected, found = (run_ranks(1, rank_logprobs, str(path), {})[0] for path in (models["nemotron"], tmp_path))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def rank_option(path: str, options: dict[str, Any]) -> str:
    from megatron_dypo.config.model import ModelConfig, ParallelConfig
    from megatron_dypo.mcore.features import probe
    from megatron_dypo.mcore.model import transformer_config
    from megatron_dypo.models.bridged import architecture_of

    model = ModelConfig(hf_path=path, family="bridge", megatron=options)
    try:
        transformer_config(architecture_of(model), model, ParallelConfig(), probe())
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention_backend": "local"},
            "model.megatron.attention_backend=local: must be another with model.family=bridge",
        ),
        ({"num_layers": 2}, "model.megatron.num_layers=2: cannot be set here"),
        ({"cpu_offloading": True, "cpu_offloading_num_layers": 99}, "model.megatron={'cpu_offloading': True, "),
        ({"attention_backend": "unfused"}, ""),
    ],
)
def test_an_option_that_it_cannot_take_is_refused_in_one_line(options, message, models) -> None:
    (error,) = run_ranks(1, rank_option, str(models["nemotron"]), options)
    assert error.startswith(message)
    assert bool(message) == bool(error)
    assert "\n" not in error


def rank_own_parts(path: str) -> tuple[str, str]:
    """Return how layers of a model's own are refused, and how its output layer would be."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.bridged.build import build_bridged_chunk
    from megatron_dypo.mcore.bridged.provider import open_bridge, read_provider
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.bridged import load_bridged
    from megatron_dypo.parallel.groups import close

    layout = start_megatron(ParallelConfig())
    with pytest.raises(ValueError, match="gemma2") as layers:
        read_provider(path, load_bridged(path))
    provider = open_bridge(path).to_megatron_provider(load_weights=False)
    provider.window_size = None
    provider.finalize()
    sizes: dict[str, Any] = {"num_tokens": 132, "logprob_memory": None, "stage": None}
    with pytest.raises(ValueError, match="Gemma2") as output:
        build_bridged_chunk(provider, has_te=False, pre_process=True, post_process=True, **sizes)
    close(layout)
    return str(layers.value), str(output.value)


def test_layers_and_output_layers_that_only_their_family_has_are_refused(tmp_path) -> None:
    config = import_transformers().Gemma2Config(**SIZES, head_dim=16, architectures=["Gemma2ForCausalLM"])
    config.save_pretrained(tmp_path)
    ((layers, output),) = run_ranks(1, rank_own_parts, str(tmp_path))
    assert "provider has window_size=(" in layers or "has layers of its own (gemma2_layer_spec)" in layers
    assert "Gemma2ModelProvider has an output layer of its own (" in output
    assert "\n" not in layers + output


def _copy(model: Path, folder: Path, tensors: dict[str, torch.Tensor], config: Any = None) -> None:
    text = json.dumps(config) if config else (model / "config.json").read_text()
    (folder / "config.json").write_text(text)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
