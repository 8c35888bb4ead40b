"""Responses → records: the verifier of each row, the verdict, and the answer that the response states."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_dypo.config.evaluation import EvalConfig
from megatron_dypo.config.grading import BUILT_IN_VERIFIERS, GradingConfig
from megatron_dypo.eval.prompts import EvalItem, EvalPrompt, EvalSet
from megatron_dypo.eval.records import Record
from megatron_dypo.eval.replies import Reply
from megatron_dypo.eval.scores import ItemScore, count_records
from megatron_dypo.grading.answers.style import AnswerStyle
from megatron_dypo.grading.naming import row_verifier_problem, verifier_of
from megatron_dypo.grading.pairs import pair_of
from megatron_dypo.grading.stated import stated_answer, states_answers
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.types import GradedGroup, Verdict

_TRUNCATED = Verdict(is_correct=False, reward=0.0)


def judge(replies: Sequence[tuple[EvalPrompt, Reply]], verifier: Verifier, cfg: GradingConfig) -> list[Record]:
    """Return the records of responses. With ``cfg.fail_truncated`` truncated responses are wrong and not verified."""
    is_judged = [not (cfg.fail_truncated and reply.truncated) for _, reply in replies]
    pairs = [pair_of(prompt, reply.text) for (prompt, reply), judged in zip(replies, is_judged, strict=True) if judged]
    verdicts = iter(verifier.verify(pairs))
    return [
        make_record(prompt, reply, next(verdicts) if judged else _TRUNCATED, cfg)
        for (prompt, reply), judged in zip(replies, is_judged, strict=True)
    ]


def records_of(group: GradedGroup, cfg: GradingConfig) -> list[Record]:
    """Return the records of a group that a run has sampled and judged."""
    assert isinstance(group.prompt, EvalPrompt)
    pairs = zip(group.rollouts, group.verdicts, strict=True)
    return [
        make_record(
            group.prompt,
            Reply(text=rollout.text, num_tokens=len(rollout.tokens), truncated=rollout.finish == "length"),
            verdict,
            cfg,
        )
        for rollout, verdict in pairs
    ]


def make_record(prompt: EvalPrompt, reply: Reply, verdict: Verdict, cfg: GradingConfig) -> Record:
    """Return the record of one response with its verdict."""
    return Record(
        set=prompt.set_name,
        item=prompt.prompt_id,
        sample=prompt.visit,
        seed=prompt.seed,
        source=prompt.source,
        correct=None if verdict.error is not None else verdict.is_correct,
        truncated=reply.truncated,
        num_tokens=reply.num_tokens,
        response=reply.text,
        answer=_answer(prompt, reply, verdict, cfg),
        error=verdict.error,
    )


def grading_of_sets(grading: GradingConfig, cfg: EvalConfig) -> GradingConfig:
    """Return ``grading`` with the verifiers that sets name for their rows."""
    more = tuple(verifiers_of_sets(grading, cfg))
    return replace(grading, row_verifiers=(*grading.row_verifiers, *more)) if more else grading


def verifiers_of_sets(grading: GradingConfig, cfg: EvalConfig) -> dict[str, str]:
    """Return verifier → key for the verifiers that only sets name."""
    known = {*BUILT_IN_VERIFIERS, *(name for _, name in grading.named_verifiers())}
    return {name: key for key, name in cfg.verifiers().items() if name not in known}


def check_sets(sets: Mapping[str, EvalSet], grading: GradingConfig, verifier: Verifier) -> None:
    """Check the rows of evaluation sets against the verifiers that will judge them, before anything is sampled.

    Args:
        grading: with the verifiers that sets name (:func:`grading_of_sets`).
        verifier: running.

    Raises:
        ValueError: as :func:`check_rows` and :func:`check_columns`.
    """
    for one in sets.values():
        check_rows(one, grading)
        check_columns(one, grading, verifier)


def check_columns(one: EvalSet, grading: GradingConfig, verifier: Verifier) -> None:
    """Raise ValueError where a verifier of the set asks for the row's other columns, which ``data.keep_row`` leaves
    out."""
    own = one.settings.verifier
    used = one.dataset.verifiers.union({own} if own else {name for _, name in grading.named_verifiers()})
    takers = set() if one.keeps_row else set(verifier.takers_of(("row", "extra_info")))
    if asking := sorted(takers & used):
        raise ValueError(
            f"eval.sets.{one.name}: data.keep_row=false: {', '.join(asking)} asks for the row's other columns: set it "
            "to true"
        )


def check_rows(one: EvalSet, grading: GradingConfig) -> None:
    """Hold the rows of an evaluation set against what its verifiers take, without running one.

    Raises:
        ValueError: options that are to be shuffled cannot be found; a row names a verifier that it may not; or an
            answer is an object and its verifier reads text only.
    """
    one.check_options()
    problems = [row_verifier_problem(grading, own) for own in sorted(one.dataset.verifiers)]
    if found := [problem for problem in problems if problem]:
        raise ValueError("\n".join(f"eval.sets.{one.name}: {problem}" for problem in found))
    try:
        one.dataset.require_text_answers(functools.partial(_takes_objects, grading, one.settings.verifier))
    except ValueError as error:
        raise ValueError(f"eval.sets.{one.name}: {error}") from error


def _takes_objects(grading: GradingConfig, of_set: str | None, own: str | None, source: str) -> bool:
    return verifier_of(grading, own=own or of_set, source=source) not in BUILT_IN_VERIFIERS


def score_item(item: EvalItem, records: Sequence[Record], *, asked: int, cfg: GradingConfig) -> ItemScore:
    """Count the records of one item; ``asked`` responses were requested."""
    verifier = verifier_of(cfg, own=item.verifier, source=item.row.source)
    return count_records(records, source=item.row.source, asked=asked, has_votes=states_answers(verifier))


def _answer(prompt: EvalPrompt, reply: Reply, verdict: Verdict, cfg: GradingConfig) -> str | None:
    """Return the answer that a response with a verdict states, with the labels of the file. A truncated response that
    counts as wrong states none."""
    if verdict.error is not None or (cfg.fail_truncated and reply.truncated):
        return None
    style = AnswerStyle(answer_format=cfg.answer_format, thinking=cfg.thinking)
    name = verifier_of(cfg, own=prompt.verifier, source=prompt.source)
    answer = stated_answer(name, reply.text, prompt.answer, style)
    return answer if answer is None or prompt.options is None else prompt.options.label_in_file(answer)
