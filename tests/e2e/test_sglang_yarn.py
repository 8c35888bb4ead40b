"""SGLang serves a model with scaled positions from the same config.json, and gives transformers' log-probs."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dypo.models.architecture import load_architecture
from tests.support.hf_models import import_transformers, make_hf_model

ROPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LENGTH = 90
"""Tokens of a sequence; the model has 32 original positions."""


def log_probs(url: str, api_key: str, tokens: list[int]) -> np.ndarray:
    """Return [LENGTH − 1] the log-probs of all tokens but the first."""
    sampling = {"max_new_tokens": 1, "temperature": 1.0}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    request = urllib.request.Request(
        f"{url}/generate",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    return np.array([entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]])


@pytest.mark.slow
def test_a_yarn_model_is_served_as_transformers_has_it(sglang_servers: Any, tmp_path: Path) -> None:
    folder = make_hf_model("qwen2", tmp_path / "yarn")
    config = json.loads((folder / "config.json").read_text())
    config = {
        **config,
        "rope_parameters": None,
        "rope_theta": 10_000.0,
        "rope_scaling": ROPE,
    }  # as Qwen's users write it
    (folder / "config.json").write_text(json.dumps(config))
    assert load_architecture(folder).check_serving(LENGTH) is None
    pool = sglang_servers(folder)
    tokens = np.random.default_rng(5).integers(3, 131, LENGTH).tolist()
    model = import_transformers().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logp_LV = model(torch.tensor(tokens)[None]).logits[0].log_softmax(-1)
    expected = logp_LV[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0].numpy()
    served = log_probs(pool.urls[0], pool.api_key, tokens)
    np.testing.assert_allclose(served, expected, rtol=0, atol=1e-4)
