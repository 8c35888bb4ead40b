"""Make runs for tests of the loop: ranks are threads, servers are fake, the verifier is scripted; no Megatron."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_dypo.batching.wire import dump_samples
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.evaluation import EvalConfig, EvalSetConfig
from megatron_dypo.config.model import ModelConfig
from megatron_dypo.config.objective import ObjectiveConfig, OldLogpConfig
from megatron_dypo.config.rollout import RolloutConfig
from megatron_dypo.config.run import CheckpointConfig, RunConfig
from megatron_dypo.config.training import BatchingConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.data.prompts import DropCounts
from megatron_dypo.data.rows import PromptRow
from megatron_dypo.eval.prompts import EvalItem, EvalPrompt, response_seed
from megatron_dypo.loop.books.ledger import Ledger
from megatron_dypo.loop.books.tally import Tally
from megatron_dypo.loop.collect import collect_in_rounds
from megatron_dypo.loop.collect_from_stream import collect_from_stream
from megatron_dypo.loop.draws import Draws
from megatron_dypo.loop.policy import PolicyScores, UpdateReport
from megatron_dypo.loop.progress import Progress
from megatron_dypo.loop.replica import Books, Follower, Leader
from megatron_dypo.loop.requests import FollowerRequests, LeaderRequests
from megatron_dypo.loop.resume import save_if_due
from megatron_dypo.loop.servers import NoRouter, Servers
from megatron_dypo.loop.setup.background import open_stream
from megatron_dypo.loop.setup.open_journal import open_journal, open_weights
from megatron_dypo.loop.setup.teachers import judged_trace_text
from megatron_dypo.loop.state import Run
from megatron_dypo.loop.train import train_step
from megatron_dypo.metrics.samples import SampleLog
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.metrics import LOSS_METRICS
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.refit.servers import RefitReport
from megatron_dypo.rollout.client import SGLangClient
from megatron_dypo.types import Prompt, Sample, Verdict
from tests.support.fake_sglang import FakeSGLang

T = TypeVar("T")
R = TypeVar("R")

ROUND = 4
"""Prompts of one round of collection."""
PROMPTS = 12
"""Rows of the data."""


@dataclass(frozen=True, kw_only=True)
class OneRank:
    """The ranks of a run with one rank, or of one replica whose peers stay silent."""

    replica: int = 0
    replicas: int = 1
    world_size: int = 1

    @property
    def is_global_leader(self) -> bool:
        return self.replica == 0

    def of_leaders(self, mine: T) -> list[T]:
        return [mine]

    def any_rank(self, mine: bool) -> bool:
        return mine


class Meeting:
    """A meeting point of ranks that are threads: each gives a value and gets all values, by rank."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30.0)
        self._values: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def abort(self) -> None:
        """End every wait here, now and later: a rank is dead."""
        self._barrier.abort()


@dataclass(frozen=True, kw_only=True)
class ThreadRanks:
    """One rank of a run whose ranks are threads; ``ranks_per_replica`` neighbours are a replica, led by the first."""

    meeting: Meeting
    rank: int
    world_size: int
    ranks_per_replica: int = 1

    @property
    def replica(self) -> int:
        return self.rank // self.ranks_per_replica

    @property
    def replicas(self) -> int:
        return self.world_size // self.ranks_per_replica

    @property
    def is_leader(self) -> bool:
        return self.rank % self.ranks_per_replica == 0

    @property
    def is_global_leader(self) -> bool:
        return self.rank == 0

    def of_leaders(self, mine: T) -> list[T]:
        # A message between processes would be a copy too.
        return copy.deepcopy(self.meeting.exchange(self.rank, mine)[:: self.ranks_per_replica])

    def any_rank(self, mine: bool) -> bool:
        return any(self.meeting.exchange(self.rank, mine))


def run_in_threads(count: int, work: Callable[[ThreadRanks], R], ranks_per_replica: int = 1) -> list[R]:
    """Run ``work`` on ``count`` ranks, a thread each; return their results, or raise the first error."""
    meeting = Meeting(count)
    ranks = [
        ThreadRanks(meeting=meeting, rank=rank, world_size=count, ranks_per_replica=ranks_per_replica)
        for rank in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, ranks))


class Refits:
    """A refitter of servers that are always there. It records versions, and tells each fake server its version."""

    def __init__(self, urls: Sequence[str] = (), fakes: Sequence[FakeSGLang] = ()) -> None:
        self.serving = tuple(urls) or tuple(fake.url for fake in fakes)
        self.refitted = list[int]()
        self.released = 0
        self._fakes = fakes

    def refit(self, version: int) -> RefitReport:
        self.refitted.append(version)
        for fake in self._fakes:
            fake.version = str(version)
        return RefitReport(
            version=version, seconds=1.0, pause_seconds=0.5, bytes=64, fenced=0, rejoined=0, retries=0
        )  # fmt: skip

    def release(self) -> None:
        self.released += 1


class NextServer:
    """A refitter after whose every refit another server serves."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls, self.refitted = list(urls), list[int]()
        self.serving: tuple[str, ...] = ()

    def refit(self, version: int) -> RefitReport:
        self.refitted.append(version)
        self.serving = (self._urls.pop(0),)
        return RefitReport(
            version=version, seconds=1.0, pause_seconds=0.5, bytes=64, fenced=1, rejoined=1, retries=2
        )  # fmt: skip

    def release(self) -> None:
        """Do nothing: the servers keep their memory."""


class Records:
    """A metrics writer that keeps them in memory."""

    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        assert step not in self.metrics, "one record a step"
        self.metrics[step] = dict(metrics)


class FakePolicy:
    """A policy without a model. Its log-probs show the version of the weights; it records its updates.

    A token has the log-prob −version − 1; under the reference policy −0.5.
    """

    def __init__(self, *, keeps_reference: bool = False, is_leader: bool = True) -> None:
        self.keeps_reference, self._is_leader = keeps_reference, is_leader
        self.version = 0
        self.history = ""
        """Digest of all updates."""
        self.asked: list[tuple[int, list[int]]] = []
        """(Version, draws) of each pass for log-probs."""
        self.updates: list[list[Sample]] = []
        self.saved: dict[int, dict[str, Any]] = {}
        self.pending: Callable[[], object] | None = None
        self.published: list[tuple[int, int]] = []
        """(Step of a checkpoint, version of the weights when it was published)."""
        self.exported: list[Path] = []
        self.refreshed: list[int] = []
        self.bad_updates: set[int] = set()
        """Numbers of updates, from 0, whose gradients are not finite."""
        self.spoilt_at: int | None = None
        """Version of the weights from which on one of them is not finite, though no gradient shows it."""

    def logprobs(self, samples: Sequence[Sample]) -> list[Any]:
        assert self._is_leader or not samples, "a follower holds no samples"
        self.asked.append((self.version, [sample.order for sample in samples]))
        return [np.full(sample.num_response_tokens, -1.0 - self.version, np.float32) for sample in samples]

    def entropies(self, samples: Sequence[Sample]) -> list[Any]:
        """Return entropies that fall from token to token."""
        assert self._is_leader or not samples, "a follower holds no samples"
        return [np.arange(sample.num_response_tokens, 0, -1).astype(np.float32) for sample in samples]

    def own_choice_logprobs(self, samples: Sequence[Sample]) -> list[Any]:
        """Return log-probs that are 0.25 lower than with the experts of the samples."""
        return [logp - np.float32(0.25) for logp in self.logprobs(samples)]

    def logprobs_and_routes(self, samples: Sequence[Sample]) -> tuple[list[Any], list[Any]]:
        """Return routes that show the version."""
        routes = [np.full((len(sample.tokens), 2, 1), self.version, np.uint8) for sample in samples]
        return self.own_choice_logprobs(samples), routes

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Any]:
        return [np.full(sample.num_response_tokens, -0.5, np.float32) for sample in samples]

    def scores(self, samples: Sequence[Sample], *, dimension: int, seed: int) -> PolicyScores:
        """Return vectors that depend on the tokens alone, and the sums of :meth:`logprobs`."""
        assert self._is_leader or not samples, "a follower holds no samples"
        score_Nd = np.empty((len(samples), dimension), np.float32)
        for index, sample in enumerate(samples):
            score_Nd[index] = np.random.default_rng([seed, *sample.tokens.tolist()]).normal(size=dimension)
        logp_N = np.array([-(1.0 + self.version) * sample.num_response_tokens for sample in samples])
        return PolicyScores(score_Nd=score_Nd, logp_N=logp_N)

    def replica_logprobs(self, samples: Sequence[Sample]) -> list[Any]:
        return self.logprobs(samples)

    def update(self, weighted: Sequence[Sample]) -> UpdateReport:
        assert self._is_leader or not weighted, "a follower holds no samples"
        is_applied = len(self.updates) not in self.bad_updates
        self.history = hashlib.sha256(self.history.encode() + dump_samples(weighted)).hexdigest()
        self.updates.append(list(weighted))
        self.version += 1
        return UpdateReport(
            is_applied=is_applied,
            sums=dict.fromkeys([*(metric.of for metric in LOSS_METRICS), "mismatch_abs", "rollout_tokens"], 1.0),
            metrics={"train/grad_norm": 1.0, "train/skipped": float(not is_applied)},
            flops=1.0,
            samples=list(weighted),
        )

    def refresh_reference(self) -> None:
        self.refreshed.append(self.version)

    def weights_digest(self) -> str:
        """Return what stands for the weights: all samples that were learned from, and their token weights."""
        return self.history

    def bad_weight(self) -> str | None:
        return "w" if self.spoilt_at is not None and self.version >= self.spoilt_at else None

    def bad_gradient(self) -> str | None:
        return "w"

    def bad_microbatches(self, report: UpdateReport) -> list[int]:
        return []

    def save(
        self,
        root: Path,
        step: int,
        *,
        trainer_state: Mapping[str, object],
        leader_state: bytes,
        stop_ids: Sequence[int],
        cfg: CheckpointConfig,
        waits: bool = True,
        on_publish: Callable[[], object] = lambda: None,
    ) -> Path:
        self.finish_save(waits=True)
        state = {"trainer_state": json.loads(json.dumps(trainer_state)), "leader_states": [leader_state]}
        folder = root / f"step_{step:06d}"
        self.pending = functools.partial(self._publish, folder, step, state, on_publish)
        if waits:
            self.finish_save(waits=True)
        return folder

    def finish_save(self, *, waits: bool) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            pending()

    def _publish(self, folder: Path, step: int, state: dict[str, Any], on_publish: Callable[[], object]) -> None:
        self.saved[step] = state
        self.published.append((step, self.version))
        # Each rank writes it, since there is no barrier as in a real run; atomically, since other ranks read it.
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{id(self)}.tmp"
        temporary.write_text("{}")
        temporary.replace(folder / "trainer_state.json")
        on_publish()

    def export(self, out_dir: Path, *, stop_ids: Sequence[int]) -> None:
        self.exported.append(out_dir)


class Prompts:
    """An endless stream of prompts over ``PROMPTS`` rows, without the rows in ``too_long``."""

    def __init__(self, too_long: Sequence[int] = (), traces: Sequence[int] = range(PROMPTS)) -> None:
        self.too_long, self.traces = set(too_long), set(traces)

    def __len__(self) -> int:
        return PROMPTS

    def at(self, positions: Sequence[int]) -> tuple[list[Prompt], DropCounts]:
        kept = [self.prompt(i) for i in positions if i % PROMPTS not in self.too_long]
        return kept, DropCounts(too_long=tuple(i for i in positions if i % PROMPTS in self.too_long))

    def id_of(self, position: int) -> str:
        return f"p{position % PROMPTS}"

    def all(self, limit: int | None = None) -> tuple[list[Prompt], DropCounts]:
        return self.at(range(PROMPTS if limit is None else limit))

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


class HeldOutPrompts:
    """The evaluation set ``aime`` over the rows of ``Prompts``, with the settings of ``cfg``."""

    def __init__(self, cfg: EvalConfig, name: str = "aime", too_long: Sequence[int] = ()) -> None:
        self._name, self._settings, self._prompts = name, cfg.settings(name), Prompts(too_long)

    def items(self, replica: int, replicas: int) -> list[EvalItem]:
        rows = range(replica, self._settings.max_prompts or PROMPTS, replicas)
        return [EvalItem(number=row, row=self._row(row), verifier=None) for row in rows]

    def prompts(self, item: EvalItem) -> list[EvalPrompt]:
        if item.number in self._prompts.too_long:
            return []
        count, prompt = self._settings.samples_per_prompt, vars(self._prompts.prompt(item.number))
        return [
            EvalPrompt(
                **{**prompt, "order": item.number * count + sample, "visit": sample},
                set_name=self._name,
                seed=response_seed(1, prompt["prompt_id"], sample),
                plain=prompt["text"],
            )
            for sample in range(count)
        ]

    def _row(self, number: int) -> PromptRow:
        prompt = self._prompts.prompt(number)
        return PromptRow(
            prompt_id=prompt.prompt_id, prompt=prompt.text, answer=prompt.answer, source=prompt.source, traces={}
        )


class Words:
    """A tokenizer whose tokens are numbers."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Oracle:
    """A verifier that asks ``judge``. The response "101 3 2" is rollout 3 of row 1.

    For a teacher's trace the row is negative.
    """

    num_replaced = 0

    def __init__(self, judge: Callable[[int, int], Verdict]) -> None:
        self._judge = judge

    def verify(self, pairs: Sequence[Any], bar: Any = None) -> list[Verdict]:
        words = [pair.response for pair in pairs]
        return [self._judge(int(text.split()[0]) - 100, int(text.split()[1])) for text in words]


def right(_row: int, _member: int) -> Verdict:
    return Verdict(is_correct=True, reward=1.0)


def wrong(_row: int, _member: int) -> Verdict:
    return Verdict(is_correct=False, reward=0.0)


def mixed(_row: int, member: int) -> Verdict:
    return Verdict(is_correct=member == 0, reward=float(member == 0))


def silent(_row: int, _member: int) -> Verdict:
    return Verdict(is_correct=False, reward=0.0, error="KeyError: 'x'")


def aime(**options: Any) -> EvalConfig:
    """Return the section ``eval`` with one set."""
    return EvalConfig(sets={"aime": EvalSetConfig(path="data/aime.jsonl")}, **options)


def make_config(
    run_dir: Any,
    *,
    steps: int = 9,
    rollout: dict[str, Any] | None = None,
    batching: dict[str, Any] | None = None,
    **sections: Any,
) -> Config:
    return Config(
        run=RunConfig(dir=str(run_dir), steps=steps),
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
        **{
            "eval": EvalConfig(),
            "objective": ObjectiveConfig(),
            # Log-probs are the servers': a collection in the background then needs no pass of the policy.
            "old_logp": OldLogpConfig(source="server"),
            **sections,
        },
    )


def make_client(urls: Sequence[str], config: Config, check: Callable[[], None] | None = None) -> SGLangClient:
    """Make a client that retries quickly."""
    return SGLangClient(
        urls,
        None,
        cfg=config.rollout,
        decode=lambda tokens: Words().decode(tokens.tolist()),
        stop_token_ids=(2,),
        check=check,
        backoff_s=0.02,
    )


def make_run(
    urls: Sequence[str],
    config: Config,
    *,
    judge: Callable[[int, int], Verdict] = mixed,
    prompts: Any = None,
    ranks: Any = None,
    refitter: Any = None,
    policy: Any = None,
    check: Callable[[], None] | None = None,
    restored: Any = None,
) -> Run:
    """Make the run of one rank of ``ranks``, which leads a replica unless ``ranks`` says otherwise.

    ``check`` raises when the servers are lost for good. ``restored`` is the checkpoint whose weights' digests and
    journal count.
    """
    ranks = ranks or OneRank()
    is_leader = getattr(ranks, "is_leader", True)
    timings, tally, progress = Timings(), Tally(), Progress()
    objective = build_objective(config.objective)
    replica: Leader | Follower = Follower()
    requests: LeaderRequests | FollowerRequests = FollowerRequests()
    policy = policy or FakePolicy(is_leader=is_leader)
    weights = open_weights(config, policy, restored)
    if is_leader:
        replica = make_leader(config, ranks, prompts or Prompts())
        verifier: Any = Oracle(judge)
        trace_text = judged_trace_text(objective, lambda tokens: " ".join(map(str, tokens)), config.run.seed)
        journal = open_journal(config, ranks, weights, lambda tokens: Words().decode(tokens.tolist()), {})
        stream = open_stream(
            make_client(urls, config, check),
            replica.draws,
            verifier,
            objective,
            config,
            current_step=lambda: progress.step,
            trace_text=trace_text,
            journal=journal,
        )
        requests = LeaderRequests(
            client=make_client(urls, config, check),
            stream=stream,
            verifier=verifier,
            fail_truncated=config.grading.fail_truncated,
            trace_text=trace_text,
            show_progress=ranks.is_global_leader,
            journal=journal,
        )
    servers = Servers(
        refitter=refitter or Refits(urls),
        requests=requests,
        router=NoRouter(),
        ranks=ranks,
        tally=tally,
        timings=timings,
        weights=weights,
    )
    return Run(
        config=config,
        ranks=ranks,
        policy=policy,
        objective=objective,
        replica=replica,
        servers=servers,
        writer=Records(),
        progress=progress,
        timings=timings,
        tally=tally,
    )


def collect_groups(run: Run) -> None:
    """Collect for the run's next step."""
    collector, step = run.collector, run.progress.step
    (collect_from_stream if collector.uses_stream(step) else collect_in_rounds)(collector, step)


def make_step(run: Run) -> None:
    """Make one step of the loop, with the checkpoint that is due after it."""
    metrics = train_step(run.progress, run.collector, run.updater, run.evaluator, run.prober, run.recorder)
    save_if_due(run.checkpointer, run.progress, metrics)


def leader_of(run: Run) -> Leader:
    """Return the data side of a run's replica."""
    assert isinstance(run.replica, Leader)
    return run.replica


def requests_of(run: Run) -> LeaderRequests:
    """Return the requests of a run's replica."""
    assert isinstance(run.servers, Servers)
    assert isinstance(run.servers.requests, LeaderRequests)
    return run.servers.requests


def serve(run: Run, url: str) -> None:
    """Send future requests to ``url``, whatever weights it serves."""
    requests = requests_of(run)
    requests.client.use_servers([url])


def make_leader(config: Config, ranks: Any, prompts: Any) -> Leader:
    """Make the data side of one replica."""
    ledger, run_dir = Ledger(), Path(config.run.dir)
    return Leader(
        draws=Draws(source=prompts, ledger=ledger, replica=ranks.replica, replicas=ranks.replicas),
        tokenizer=Words(),
        held_out={name: HeldOutPrompts(config.eval, name) for name in config.eval.sets},
        sample_log=SampleLog(run_dir, shard=ranks.replica if ranks.replicas > 1 else None),
        run_dir=run_dir,
        books=Books(ledger=ledger),
    )
