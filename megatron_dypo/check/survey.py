"""The whole check of ``megatron-dypo check``: everything that a run reads, before it runs."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.check.inputs import check_model, check_rest, check_weights, load_tokenizer_of
from megatron_dypo.check.lengths import Longest
from megatron_dypo.check.overlap import find_overlap
from megatron_dypo.check.prompt_files import check_dataset, longest_used
from megatron_dypo.check.report import ModelFacts, Report, SetFacts
from megatron_dypo.check.tokenizer import first_prompt, round_trip, stops
from megatron_dypo.check.verifiers import try_verifiers
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.data.dataset import PromptDataset, open_prompts
from megatron_dypo.data.statistics import prompt_statistics
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.eval.judging import grading_of_sets, verifiers_of_sets
from megatron_dypo.eval.prompts import held_out_data
from megatron_dypo.grading.naming import unused_sources
from megatron_dypo.grading.trial import check_importable
from megatron_dypo.loop.setup.teachers import judge_teachers
from megatron_dypo.metrics.findings import Findings
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.planning.parameters import whole_model

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
    report.model = _facts(arch, tokenizer)
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
                _verify(config, data.train, tokenizer, report, found, limit, show_progress)
    check_rest(config, arch, longest, found)
    report.problems = list(dict.fromkeys([*found.problems, *found.missing]))  # a row may break one rule twice
    report.warnings = list(dict.fromkeys(found.notes))
    return report


@dataclass(kw_only=True)
class _Data:
    train: PromptDataset | None
    held_out: dict[str, PromptDataset]
    """Key of an evaluation set → its rows."""

    def longest(self, config: Config) -> Longest:
        prompt, trace = (None, None) if self.train is None else longest_used(self.train, config.data)
        held_out = [longest_used(dataset, config.data)[0] for dataset in self.held_out.values()]
        is_whole = len(self.held_out) == len(config.eval.sets)
        return Longest(prompt=prompt, trace=trace, held_out=max(held_out, default=0) if is_whole else None)


def _facts(arch: Architecture | None, tokenizer: Tokenizer | None) -> ModelFacts | None:
    if arch is None:
        return None
    return ModelFacts(
        family=arch.family,
        num_parameters=whole_model(arch).total,
        vocab_size=arch.vocab_size,
        tokenizer_ids=None if tokenizer is None else tokenizer.vocab_size,
        max_position_embeddings=arch.max_position_embeddings,
        stops=() if tokenizer is None else stops(tokenizer),
    )


def _open(config: Config, tokenizer: Tokenizer, found: Findings, stack: ExitStack, show_progress: bool) -> _Data:
    """Open all sets whose files exist, and check every row."""
    folder = Path(config.run.dir)
    cache = folder if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) else None

    def opened(paths: tuple[str, ...], data: DataConfig, where: str, *, held_out: bool) -> PromptDataset | None:
        if not all(Path(path).exists() for path in paths):
            return None  # noted as missing
        with found.noting(where):
            dataset = open_prompts(
                paths, data, tokenizer, cache_dir=cache, show_progress=show_progress, held_out=held_out
            )
            return stack.enter_context(closing(dataset))
        return None

    train = opened(config.data.prompts, config.data, "", held_out=False)
    held_out = {}
    for name in config.eval.sets:
        where, settings = f"eval.sets.{name}", config.eval.settings(name)
        dataset = opened((settings.path,), held_out_data(config.data, settings), where, held_out=True)
        if dataset is not None:
            held_out[where] = dataset
    return _Data(train=train, held_out=held_out)


def _check_without_tokenizer(config: Config, found: Findings) -> None:
    """Check the rows as far as possible without rendering them."""
    paths = [path for path in config.data.prompts if Path(path).exists()]
    if paths:
        with found.noting():
            PromptDataset(paths, data=config.data).close()


def _describe(
    config: Config, data: _Data, tokenizer: Tokenizer, report: Report, found: Findings, show_progress: bool
) -> None:
    sets = {**({"data.prompts": data.train} if data.train else {}), **data.held_out}
    for name, dataset in sets.items():
        files = config.data.prompts
        if name != "data.prompts":
            files = (config.eval.sets[name.removeprefix("eval.sets.")].path,)
        report.sets.append(SetFacts(name=name, files=tuple(files), prompts=prompt_statistics(dataset, config.data)))
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
    for name, dataset in data.held_out.items():
        overlap = find_overlap(name, data.train, dataset, show_progress=show_progress)
        report.overlaps.append(overlap)
        if overlap.num_shared:
            found.notes.append(
                f"{name}: {overlap.num_shared} of its {overlap.num_rows} prompts are in data.prompts too, such as "
                f"{overlap.examples[0]}: its accuracy is not that of unseen prompts"
            )


def _verify(
    config: Config,
    dataset: PromptDataset | None,
    tokenizer: Tokenizer,
    report: Report,
    found: Findings,
    limit: int | None,
    show_progress: bool,
) -> None:
    if dataset is None:
        return
    with found.noting():
        report.verifiers = try_verifiers(config, dataset, tokenizer, found)
        report.teachers = judge_teachers(
            config, dataset, tokenizer, found, limit_per_teacher=limit, show_progress=show_progress
        )
