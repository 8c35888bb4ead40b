"""Every family on a GPU, of Transformer Engine's layers where they are: log-probs against transformers, gradients
against those of a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dypo.parallel.device import on_gpu
from tests.support.family_scores import trajectories
from tests.support.hf_models import KINDS, MOE_KINDS, import_transformers, make_hf_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not on_gpu(), reason="needs a GPU")]

ROOT = Path(__file__).resolve().parents[2]
NAMES = (*KINDS, *MOE_KINDS)
GAP = {"float32": 0.01, "bfloat16": 0.08}
"""Largest mean gap of log-probs, in nats. Transformer Engine multiplies fp32 numbers in TF32."""
COSINE = {"float32": 0.999, "bfloat16": 0.98}


def scored(out, dtype, paths, *, hide_gpu=False):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if hide_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "tests.support.family_scores", str(out), dtype, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    sys.stderr.write(done.stderr[-8000:])
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {name: make_hf_model(name, root / name) for name in NAMES}


@pytest.fixture(scope="module")
def of_a_cpu(paths, tmp_path_factory):
    return scored(tmp_path_factory.mktemp("cpu") / "out", "float32", paths.values(), hide_gpu=True)


@pytest.fixture(scope="module")
def of_a_gpu(paths, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return {dtype: scored(folder / dtype, dtype, paths.values()) for dtype in GAP}


@torch.no_grad()
def transformers_logp(path):
    oracle = import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for module in oracle.modules():
        if hasattr(module, "limit"):  # experts of gpt-oss: transformers reads the config's limit since 5.19
            module.limit = oracle.config.swiglu_limit
    found = []
    for sample in trajectories(oracle.config.vocab_size):
        tokens = torch.from_numpy(sample.tokens).long()
        logp = oracle(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        found.append(logp[sample.num_prompt_tokens - 1 :])
    return torch.cat(found)


@pytest.mark.parametrize("dtype", GAP)
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_and_gradients_are_those_of_a_cpu(name, dtype, paths, of_a_cpu, of_a_gpu):
    ours, theirs = of_a_gpu[dtype][name], of_a_cpu[name]
    gap = (ours["logp"] - transformers_logp(paths[name])).abs().mean().item()
    cosine = torch.cosine_similarity(ours["scores"].flatten(), theirs["scores"].flatten(), dim=0).item()
    norm = (ours["scores"].norm() / theirs["scores"].norm()).item()
    print(f"{name} {dtype}: gap {gap:.2g} nats, cosine {cosine:.6f}, norm {norm:.4f}")
    assert gap <= GAP[dtype]
    assert cosine >= COSINE[dtype]
    assert norm == pytest.approx(1, abs=0.05)
