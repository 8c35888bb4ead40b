"""The whole check of ``megatron-dypo check``: everything that a run reads, before it runs."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.check.inputs import check_model, check_rest, check_weights, load_tokenizer_of
from megatron_dypo.check.lengths import Longest
from megatron_dypo.check.model_size import num_parameters
from megatron_dypo.check.overlap import find_overlap
from megatron_dypo.check.prompt_files import check_dataset, longest_used
from megatron_dypo.check.report import ModelFacts, Report, SetFacts
from megatron_dypo.check.tokenizer import first_prompt, round_trip, stops
from megatron_dypo.check.verifiers import Trial, try_verifiers
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.data.dataset import PromptDataset, open_prompts
from megatron_dypo.data.statistics import prompt_statistics
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.eval.judging import check_columns, check_rows, grading_of_sets, verifiers_of_sets
from megatron_dypo.eval.prompts import EvalSet, held_out_data
from megatron_dypo.grading.naming import row_verifier_problem, unused_sources
from megatron_dypo.grading.trial import check_importable
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.loop.setup.open_data import check_against_verifier
from megatron_dypo.loop.setup.teachers import judge_teachers
from megatron_dypo.metrics.findings import Findings
from megatron_dypo.models.architecture import Architecture

TRACES_PER_TEACHER = 200
"""Traces of each teacher that are judged without ``--all``. The interval is then at most ±7 points."""


def survey(config: Config, *, judge_all: bool = False, show_progress: bool = True) -> Report:
    """Check everything. A problem ends only the checks that depend on it.

    If ``run.dir`` exists, the row check and the verdicts are stored there, and the run uses them. The check never makes
    the folder.
    """
    found, report = Findings(), Report()
    arch = check_model(config, found)
    check_weights(config, found)
    tokenizer = load_tokenizer_of(config, arch, found)
    report.model = _facts(config, arch, tokenizer)
    can_verify = False
    with found.noting():
        check_importable(
            grading_of_sets(config.grading, config.eval), named_by=verifiers_of_sets(config.grading, config.eval)
        )
        can_verify = True
    longest = Longest()
    with ExitStack() as stack:
        data = _open(config, tokenizer, found, stack, show_progress) if tokenizer is not None else None
        if tokenizer is None:
            _check_without_tokenizer(config, found)
        elif data is not None:
            longest = data.longest(config)
            limit = None if judge_all else TRACES_PER_TEACHER
            _describe(config, data, tokenizer, report, found, show_progress)
            if can_verify:
                _verify(config, data, tokenizer, report, found, limit, show_progress)
    check_rest(config, arch, longest, found)
    report.problems = list(dict.fromkeys([*found.problems, *found.missing]))  # a row may break one rule twice
    report.warnings = list(dict.fromkeys(found.notes))
    return report


@dataclass(kw_only=True)
class _Data:
    train: PromptDataset | None
    held_out: dict[str, EvalSet]
    """Name of an evaluation set → its rows."""

    def longest(self, config: Config) -> Longest:
        prompt, trace = (None, None) if self.train is None else longest_used(self.train, config.data)
        held_out = [longest_used(one.dataset, config.data)[0] for one in self.held_out.values()]
        is_whole = len(self.held_out) == len(config.eval.sets)
        return Longest(prompt=prompt, trace=trace, held_out=max(held_out, default=0) if is_whole else None)


def _facts(config: Config, arch: Architecture | None, tokenizer: Tokenizer | None) -> ModelFacts | None:
    if arch is None:
        return None
    return ModelFacts(
        family=arch.family,
        num_parameters=num_parameters(config.model, arch),
        vocab_size=arch.vocab_size,
        tokenizer_ids=None if tokenizer is None else tokenizer.vocab_size,
        max_position_embeddings=arch.max_position_embeddings,
        stops=() if tokenizer is None else stops(tokenizer),
    )


def _open(config: Config, tokenizer: Tokenizer, found: Findings, stack: ExitStack, show_progress: bool) -> _Data:
    """Open all sets whose files exist, and check every row."""
    folder = Path(config.run.dir)
    cache = folder if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) else None
    data = _Data(train=None, held_out={})
    if all(Path(path).exists() for path in config.data.prompts):  # others are noted as missing
        with found.noting():
            train = open_prompts(
                config.data.prompts, config.data, tokenizer, cache_dir=cache, show_progress=show_progress
            )
            data.train = stack.enter_context(closing(train))
    for name, settings in config.eval.sets.items():
        if not Path(settings.path).exists():
            continue
        with found.noting(f"eval.sets.{name}"):
            held_out = EvalSet(
                *(name, config.eval, config.data, tokenizer),
                seed=config.run.seed,
                cache_dir=cache,
                show_progress=show_progress,
            )
            data.held_out[name] = stack.enter_context(closing(held_out))
    return data


def _check_without_tokenizer(config: Config, found: Findings) -> None:
    """Check the rows as far as possible without rendering them."""
    paths = [path for path in config.data.prompts if Path(path).exists()]
    if paths:
        with found.noting():
            PromptDataset(paths, data=config.data).close()


def _describe(
    config: Config, data: _Data, tokenizer: Tokenizer, report: Report, found: Findings, show_progress: bool
) -> None:
    files: dict[str, tuple[tuple[str, ...], PromptDataset]] = {}
    if data.train is not None:
        files["data.prompts"] = (config.data.prompts, data.train)
    files |= {f"eval.sets.{name}": ((one.settings.path,), one.dataset) for name, one in data.held_out.items()}
    for name, (paths, dataset) in files.items():
        report.sets.append(SetFacts(name=name, files=paths, prompts=prompt_statistics(dataset, config.data)))
    if data.train is None:
        return
    check_dataset(config, data.train, tokenizer, found)
    found.notes += unused_sources(config.grading, data.train.sources)
    report.first_prompt = first_prompt(config, data.train, tokenizer)
    report.round_trip = round_trip(data.train, tokenizer, seed=config.run.seed)
    if report.round_trip.example is not None:
        found.notes.append(
            f"{config.model.hf_path}: the tokenizer changes {report.round_trip.num_changed} of "
            f"{report.round_trip.num_texts} texts: {report.round_trip.example}"
        )
    for name, one in data.held_out.items():
        overlap = find_overlap(f"eval.sets.{name}", data.train, one.dataset, show_progress=show_progress)
        report.overlaps.append(overlap)
        if overlap.num_shared:
            found.notes.append(
                f"{overlap.name}: {overlap.num_shared} of its {overlap.num_rows} prompts are in data.prompts too, such "
                f"as {overlap.examples[0]}: its accuracy is not that of unseen prompts"
            )


def _verify(
    config: Config,
    data: _Data,
    tokenizer: Tokenizer,
    report: Report,
    found: Findings,
    limit: int | None,
    show_progress: bool,
) -> None:
    """Try the verifiers on rows of each set, and let them judge the teachers' traces."""
    grading = grading_of_sets(config.grading, config.eval)
    data = _judgeable(config, data, grading, found)
    named = frozenset[str]().union(*(one.dataset.verifiers for one in data.held_out.values()))
    named |= data.train.verifiers if data.train is not None else frozenset()
    with Verifier(grading, named, named_by=verifiers_of_sets(config.grading, config.eval)) as verifier:
        if data.train is not None:
            with found.noting():
                check_against_verifier(config, data.train, verifier)
                rows = Trial(name="data.prompts", dataset=data.train, data=config.data, grading=config.grading)
                report.verifiers += try_verifiers(rows, verifier, tokenizer, found)
                report.teachers = judge_teachers(
                    *(config, data.train, verifier, tokenizer, found),
                    limit_per_teacher=limit,
                    show_progress=show_progress,
                )
        for name, one in data.held_out.items():
            with found.noting(f"eval.sets.{name}"):
                check_columns(one, grading, verifier)
                report.verifiers += try_verifiers(_trial(one, config, grading), verifier, tokenizer, found)


def _judgeable(config: Config, data: _Data, grading: GradingConfig, found: Findings) -> _Data:
    """Return the sets whose rows may be given to their verifiers; note why others may not."""
    train = data.train
    if train is not None and any(row_verifier_problem(config.grading, own) for own in train.verifiers):
        train = None  # a problem already
    held_out = {}
    for name, one in data.held_out.items():
        with found.noting(f"eval.sets.{name}"):
            check_rows(one, grading)
            held_out[name] = one
    return _Data(train=train, held_out=held_out)


def _trial(one: EvalSet, config: Config, grading: GradingConfig) -> Trial:
    return Trial(
        name=f"eval.sets.{one.name}",
        dataset=one.dataset,
        data=held_out_data(config.data, one.settings),
        grading=grading,
        verifier=one.settings.verifier,
        limit=one.settings.max_prompts,
    )
