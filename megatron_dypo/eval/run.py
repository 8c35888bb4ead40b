"""``megatron-dypo eval`` from input to summary: sets, servers, responses, records, figures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dypo.config.eval_command import EvalCommandConfig
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.data.row_check.cache import tokenizer_files
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from megatron_dypo.ending import Cause, RunEnded
from megatron_dypo.eval.asking import EndpointFailedError, Replies, ask_all
from megatron_dypo.eval.judging import check_sets, grading_of_sets, judge, score_item, verifiers_of_sets
from megatron_dypo.eval.model import weights_identity
from megatron_dypo.eval.page import PAGE_FILE, render_page
from megatron_dypo.eval.prompts import EvalPrompt, EvalSet, open_sets
from megatron_dypo.eval.records import SUMMARY_FILE, Record, RecordFile
from megatron_dypo.eval.scores import SetScore, set_summary
from megatron_dypo.eval.serving import Serving, Target, serving
from megatron_dypo.fs import replace_file
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.metrics.progress import Progress, progress
from megatron_dypo.rollout.balance import NoServerError
from megatron_dypo.rollout.server.process import ServerDiedError
from megatron_dypo.rollout.server.servers import NotHealthyError

_log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class _Evaluation:
    """The open parts of an evaluation."""

    sets: Mapping[str, EvalSet]
    files: Mapping[str, RecordFile]
    grading: GradingConfig
    verifier: Verifier

    def pending(self, bar: Progress | None = None) -> Iterator[EvalPrompt]:
        """Yield the prompts of responses without a record; ``bar`` counts those that are too long."""
        for name, one in self.sets.items():
            done = {(record.item, record.sample) for record in self.files[name].records}
            samples = one.settings.samples_per_prompt
            for item in one.items():
                missing = [sample for sample in range(samples) if (item.row.prompt_id, sample) not in done]
                prompts = one.prompts(item) if missing else []
                if missing and not prompts and bar is not None:
                    bar.update(len(missing))
                yield from (prompts[sample] for sample in missing if prompts)

    def counts(self) -> tuple[int, int]:
        """Return the number of all requested responses, and of those with a record."""
        asked = sum(len(one) * one.settings.samples_per_prompt for one in self.sets.values())
        return asked, sum(len(records) for one in self.sets for _, records in self.records(one))

    def records(self, name: str) -> Iterator[tuple[Any, list[Record]]]:
        """Yield each item of a set with the records of its responses."""
        one, found = self.sets[name], dict[str, list[Record]]()
        for record in self.files[name].records:
            if record.sample < one.settings.samples_per_prompt:
                found.setdefault(record.item, []).append(record)
        for item in one.items():
            yield item, found.get(item.row.prompt_id, [])

    def record(self, replies: Replies) -> None:
        """Judge responses and write their records."""
        by_set: dict[str, list[Record]] = {}
        for record in judge(replies, self.verifier, self.grading):
            by_set.setdefault(record.set, []).append(record)
        for name, records in by_set.items():
            self.files[name].append(records)

    def score(self, name: str) -> SetScore:
        """Return the counts of a set."""
        asked = self.sets[name].settings.samples_per_prompt
        pairs = self.records(name)
        return SetScore(items=tuple(score_item(item, found, asked=asked, cfg=self.grading) for item, found in pairs))


def evaluate_model(target: Target, cfg: EvalCommandConfig, out: Path, *, show_progress: bool = True) -> dict[str, Any]:
    """Evaluate a model on all sets, and write records, ``summary.json`` and ``report.html`` to ``out``.

    A response with a record in ``out`` is not requested again, so an interrupted evaluation continues.

    Returns:
        The content of ``summary.json``.

    Raises:
        ValueError: an input breaks a rule, or ``out`` has records of another setting.
        RunEnded: no server is left, or the endpoint gives no usable response. Earlier responses are recorded.
    """
    with contextlib.ExitStack() as stack:
        tokenizer = _open_tokenizer(target, cfg)
        sets = open_sets(
            cfg.eval, cfg.data, tokenizer, stack, seed=cfg.seed, cache_dir=out, show_progress=show_progress
        )
        grading = grading_of_sets(cfg.grading, cfg.eval)
        named = frozenset[str]().union(*(one.dataset.verifiers for one in sets.values()))
        verifier = stack.enter_context(Verifier(grading, named, named_by=verifiers_of_sets(cfg.grading, cfg.eval)))
        check_sets(sets, grading, verifier)
        common = _setting(target, cfg, tokenizer)
        files = {
            name: stack.enter_context(RecordFile(out, name, {**common, **_setting_of_set(one)}))
            for name, one in sets.items()
        }
        evaluation = _Evaluation(sets=sets, files=files, grading=grading, verifier=verifier)
        _answer(evaluation, target, cfg, tokenizer, out, show_progress)
        summary = _summary(evaluation, target)
        replace_file(out / SUMMARY_FILE, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        render_page(summary, {name: files[name].records for name in sets}, out / PAGE_FILE)
    return summary


def _open_tokenizer(target: Target, cfg: EvalCommandConfig) -> Tokenizer | None:
    """Load the tokenizer, unless the endpoint renders prompts."""
    if target.folder is None or target.api == "chat":
        return None
    return load_tokenizer(
        target.folder,
        chat_template=cfg.data.chat_template,
        chat_template_args=cfg.data.chat_template_args,
        stop_token_ids=cfg.rollout.stop_token_ids,
    )


def _answer(
    evaluation: _Evaluation,
    target: Target,
    cfg: EvalCommandConfig,
    tokenizer: Tokenizer | None,
    out: Path,
    show_progress: bool,
) -> None:
    """Ask for all responses without a record. If there are none, no server is started or contacted."""
    asked, done = evaluation.counts()
    if done:
        _log.info("%s: %d of %d responses have a record and are not asked for again", out, done, asked)
    if next(evaluation.pending(), None) is None:
        return
    settings = {name: one.settings for name, one in evaluation.sets.items()}
    try:
        with (
            serving(target, cfg, settings, tokenizer, out / "logs") as served,
            progress(asked - done, "eval", "responses", enabled=show_progress) as bar,
        ):
            _ask(evaluation, served, cfg.rollout.max_in_flight, bar)
    except (NoServerError, EndpointFailedError, ServerDiedError, NotHealthyError) as error:
        done = evaluation.counts()[1]
        raise RunEnded(
            Cause.SERVERS_GONE,
            f"{error}\n{done} of {asked} responses are recorded in {out}: start the same command again to go on",
        ) from error


def _ask(evaluation: _Evaluation, served: Serving, in_flight: int, bar: Progress) -> None:
    while True:
        try:
            ask_all(
                evaluation.pending(bar),
                served.endpoint,
                in_flight=in_flight,
                record=evaluation.record,
                bar=bar,
                watch=served.watch,
            )
        except NoServerError:
            if not served.await_return():
                raise
            _log.warning("a server is back: asking for the responses that are left")
        else:
            return


def _setting(target: Target, cfg: EvalCommandConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the part of the setting that all sets share."""
    rollout, grading = cfg.rollout, dataclasses.asdict(cfg.grading)
    judged_by = ("verifier", "by_source", "answer_format", "thinking", "fail_truncated")
    return {
        "model": target.model if target.folder is None or target.urls else weights_identity(target.folder),
        "api": target.api,
        "seed": cfg.seed,
        "max_new_tokens": rollout.max_new_tokens,
        "top_p": rollout.top_p,
        "top_k": rollout.top_k,
        "stop_token_ids": list(tokenizer.eos_ids) if tokenizer is not None else [],
        "tokenizer": tokenizer_files(tokenizer) if tokenizer is not None else {},
        "chat_template": cfg.data.chat_template,
        "chat_template_args": dict(cfg.data.chat_template_args),
        **{f"grading.{key}": grading[key] for key in judged_by},
    }


def _setting_of_set(one: EvalSet) -> dict[str, Any]:
    """Return the part of the setting that belongs to one set."""
    (file,) = one.dataset.fingerprint()
    return {
        "file_sha256": file["sha256"],
        "columns": one.columns,
        "verifier": one.settings.verifier,
        "temperature": one.settings.temperature,
        "shuffle_options": one.settings.shuffle_options,
    }


def _summary(evaluation: _Evaluation, target: Target) -> dict[str, Any]:
    sets = {
        name: set_summary(evaluation.score(name), one.settings.samples_per_prompt)
        for name, one in evaluation.sets.items()
    }
    for name, figures in sets.items():
        if figures["lost"] or figures["without_verdict"]:
            _log.warning(
                "%s: %d responses never came and %d have no verdict: they are in no figure",
                *(name, figures["lost"], figures["without_verdict"]),
            )
    return {"model": target.model, "sets": sets}
