"""What a run checks of its inputs before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.tree import Config, ModelConfig
from megatron_dypo.launch import check_inputs

MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "sliding_window": 128,
}


def config_of(folder: Path, **lengths: int) -> Config:
    (folder / "config.json").write_text(json.dumps(MISTRAL))
    (folder / "model.safetensors").touch()
    (folder / "prompts.jsonl").touch()
    return Config(
        model=ModelConfig(hf_path=str(folder)),
        data=DataConfig(
            prompts=(str(folder / "prompts.jsonl"),),
            max_prompt_tokens=lengths["prompt"],
            max_trace_tokens=lengths["trace"],
        ),
        rollout=RolloutConfig(max_new_tokens=lengths["response"]),
    )


def test_sequences_that_fit_a_sliding_window_are_accepted(tmp_path):
    assert check_inputs(config_of(tmp_path, prompt=28, response=100, trace=90)) == []


@pytest.mark.parametrize(("response", "trace"), [(101, 1), (1, 101)])
def test_a_sliding_window_that_cuts_responses_or_traces_is_refused(response, trace, tmp_path):
    with pytest.raises(ValueError, match=r"data\.max_trace_tokens = 129: must not exceed sliding_window=128"):
        check_inputs(config_of(tmp_path, prompt=28, response=response, trace=trace))


def test_a_folder_with_sizes_and_without_weights_is_noted(tmp_path):
    config = config_of(tmp_path, prompt=28, response=100, trace=90)
    (tmp_path / "model.safetensors").unlink()
    assert check_inputs(config) == [f"model.hf_path='{tmp_path}': no *.safetensors there, which a plan does without"]
