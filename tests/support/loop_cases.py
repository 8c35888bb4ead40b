"""A run for tests of the loop: one rank, fake servers, a verifier that is told what to say; no model and no Megatron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.objective import ObjectiveConfig, ScoreConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.tree import BatchingConfig, Config, EvalConfig, ModelConfig, RunConfig
from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.loop.run import Leader
from megatron_dypo.loop.tally import Tally
from megatron_dypo.metrics.samples import SampleLog
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.types import Prompt, Verdict

ROUND = 4
"""Prompts of one round of collection."""
PROMPTS = 12
"""Rows of the data."""


class Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


class Prompts:
    """An endless stream of prompts over ``PROMPTS`` rows; those whose row is in ``too_long`` are left out."""

    def __init__(self, too_long: Sequence[int] = (), traces: Sequence[int] = range(PROMPTS)) -> None:
        self.too_long, self.traces = set(too_long), set(traces)

    def __len__(self) -> int:
        return PROMPTS

    def take(self, start: int, count: int, shard: int = 0, num_shards: int = 1) -> tuple[list[Prompt], DropCounts]:
        positions = range(start + (shard - start) % num_shards, start + count, num_shards)
        kept = [self.prompt(i) for i in positions if i % PROMPTS not in self.too_long]
        return kept, DropCounts(too_long=tuple(i for i in positions if i % PROMPTS in self.too_long))

    def all(self, limit: int | None = None) -> tuple[list[Prompt], DropCounts]:
        return self.take(0, PROMPTS if limit is None else limit)

    def prompt(self, order: int) -> Prompt:
        row = order % PROMPTS
        return Prompt(
            prompt_id=f"p{row}",
            visit=order // PROMPTS,
            order=order,
            tokens=np.array([7, 100 + row], np.int32),
            text=f"prompt {row}",
            answer=str(row),
            source="even" if row % 2 == 0 else "odd",
            traces={"teacher": np.array([5, 2], np.int32)} if row in self.traces else {},
        )


class Words:
    """A tokenizer whose tokens are numbers."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Oracle:
    """A verifier: the response "101 3 2" is rollout 3 of row 1, and ``judge`` says what is thought of it."""

    def __init__(self, judge: Callable[[int, int], Verdict]) -> None:
        self._judge = judge

    def verify(self, pairs: Sequence[Any], bar: Any = None) -> list[Verdict]:
        words = [getattr(pair, "response", None) or pair[0] for pair in pairs]
        return [self._judge(int(text.split()[0]) - 100, int(text.split()[1])) for text in words]


def right(_row: int, _member: int) -> Verdict:
    return Verdict(is_correct=True, reward=1.0)


def wrong(_row: int, _member: int) -> Verdict:
    return Verdict(is_correct=False, reward=0.0)


def mixed(_row: int, member: int) -> Verdict:
    return Verdict(is_correct=member == 0, reward=float(member == 0))


def silent(_row: int, _member: int) -> Verdict:
    return Verdict(is_correct=False, reward=0.0, error="KeyError: 'x'")


def make_config(
    run_dir: Any, *, rollout: dict[str, Any] | None = None, batching: dict[str, Any] | None = None, **sections: Any
) -> Config:
    return Config(
        run=RunConfig(dir=str(run_dir), steps=9),
        model=ModelConfig(hf_path="none"),
        data=DataConfig(prompts=("none",)),
        rollout=RolloutConfig(
            **{
                "group_size": 2,
                "prompts_per_round": ROUND,
                "max_new_tokens": 16,
                "request_deadline_s": 20.0,
                "retries": 0,
                **(rollout or {}),
            }
        ),
        batching=BatchingConfig(**{"prompts_per_update": ROUND, "max_collect_rounds": 2, **(batching or {})}),
        # The servers' log-probs, so that a collection in the background asks for no model.
        score=ScoreConfig(policy="rollout"),
        **{"eval": EvalConfig(), "objective": ObjectiveConfig(), **sections},
    )


def make_run(
    urls: Sequence[str],
    config: Config,
    *,
    judge: Callable[[int, int], Verdict] = mixed,
    prompts: Any = None,
    group: Any = None,
    data: int = 1,
    dp_rank: int = 0,
) -> Any:
    """The part of a run that a collection needs; ``group`` is that of the leaders, ``data`` of them."""

    def client() -> SGLangClient:
        return SGLangClient(
            urls,
            None,
            cfg=config.rollout,
            decode=lambda tokens: Words().decode(tokens.tolist()),
            stop_token_ids=(2,),
            backoff_s=0.02,
        )

    leader = Leader(
        group=group or Alone(),  # type: ignore[arg-type]
        tokenizer=Words(),  # type: ignore[arg-type]
        stream=prompts or Prompts(),
        held_out={name: Prompts() for name in config.eval.sets},  # type: ignore[misc]
        client=client(),
        verifier=Oracle(judge),  # type: ignore[arg-type]
        sample_log=SampleLog(Path(config.run.dir), shard=dp_rank if data > 1 else None),  # type: ignore[arg-type]
        background_client=client(),
    )
    return SimpleNamespace(
        config=config,
        step=0,
        served_version=0,
        bridge=SimpleNamespace(serving=tuple(urls)),
        router=None,
        objective=build_objective(config.objective),
        leader=leader,
        layout=SimpleNamespace(
            is_global_leader=dp_rank == 0, replica_group=Alone(), data=data, dp_rank=dp_rank, leaders_group=group
        ),
        tally=Tally(),
        timings=Timings(),
        dir=Path(config.run.dir),
    )
