"""A server's log-probs after a refit by each transport, against those of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.dist.spawn import run_ranks
from tests.support.e2e.refitting_ranks import Servers, Trainer, ask
from tests.support.hf_models import import_transformers

TOKENS = list(range(3, 40))
NEW_TOKENS = 4
BODY = {
    "input_ids": TOKENS,
    "sampling_params": {"max_new_tokens": NEW_TOKENS},
    "return_logprob": True,
    "logprob_start_len": 0,
}
SEEDS = {"broadcast": 1, "p2p": 2, "local": 3, "disk": 4}
"""Transport → seed of the model that it brings."""
AXES: dict[str, Any] = {"tensor": 2, "sequence": True, "expert": 2}


def assert_served(servers: Servers, make: Callable[[Path, int], Path], folder: Path) -> None:
    """Refit a model of its own by each transport; the first server must sample from it.

    Args:
        make: writes a model of a seed into a folder, and returns that.
    """
    models = {name: make(folder / name, seed) for name, seed in SEEDS.items()}
    seen = run_ranks(2, rank_refits, servers, {name: str(path) for name, path in models.items()})[0]
    for transport, model in models.items():
        meta = seen[transport]
        new = [entry[1] for entry in meta["output_token_logprobs"]]
        served = [entry[0] for entry in (*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"])]
        np.testing.assert_allclose(served, logps_of(model, [*TOKENS, *new]), atol=1e-5, rtol=0, err_msg=transport)


def rank_refits(servers: Servers, models: dict[str, str]) -> dict[str, Any]:
    """Refit the model of each transport; return, on rank 0, the server's answer about :data:`TOKENS` after each."""
    from megatron_dypo.parallel.groups import close

    trainer, seen = Trainer(servers, **AXES), {}
    for version, (transport, model) in enumerate(models.items(), start=1):
        trainer.become(model)
        refitter = trainer.refitter(transport=transport)
        refitter.refit(version)
        refitter.close()
        if trainer.layout.rank == 0:
            seen[transport] = ask(servers, servers.urls[0], "/generate", BODY)["meta_info"]
    close(trainer.layout)
    return seen


@torch.no_grad()
def logps_of(model: Path, tokens: list[int]) -> np.ndarray:
    """Return transformers' log-probs of the tokens after the first."""
    oracle = import_transformers().AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logp_LV = torch.log_softmax(oracle(torch.tensor(tokens)[None]).logits[0], dim=-1)
    return logp_LV[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].numpy()
