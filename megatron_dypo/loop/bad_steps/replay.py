"""``megatron-dypo replay``: run the microbatches of a dump alone, and report the first values that are not finite."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dypo.config.tree import Config
from megatron_dypo.config.words import first_of
from megatron_dypo.fs import replace_file
from megatron_dypo.loop.bad_steps.dump import Dump, DumpedMicrobatch, read_microbatch
from megatron_dypo.loop.bad_steps.places import Place, bad_inputs, bad_logprobs, shown
from megatron_dypo.loop.megatron_policy import MegatronPolicy
from megatron_dypo.loop.setup.build_policy import build_policy
from megatron_dypo.loop.setup.run_folder import require_whole
from megatron_dypo.mcore.finite import LoneRun, names_not_finite, run_alone
from megatron_dypo.mcore.fp8 import named_values
from megatron_dypo.mcore.start import start_megatron
from megatron_dypo.metrics.writer import Timings
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.parallel.collectives import gather_world
from megatron_dypo.parallel.groups import close
from megatron_dypo.types import Sample

REPORT = "report.json"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The values of one microbatch that are not finite, in the order of their computation; empty: all are finite."""

    file: str
    weights: Sequence[str]
    """Weights of the model."""
    inputs: dict[str, str]
    """Name of a stream that the loss reads → the first tokens in words."""
    activation: str
    """The first module whose output is not finite, and the token if it is known."""
    logprobs: str
    """The first tokens in words."""
    sums: Sequence[str]
    """Terms and other sums of the loss."""
    gradients: Sequence[str]
    """Parameters whose gradient, summed over no other rank, is not finite."""

    def first(self) -> str:
        """Return the first value that is not finite, in words."""
        stages = [
            *(f"weight {name}" for name in self.weights),
            *(f"{name}, which the loss reads, of {places}" for name, places in self.inputs.items()),
            *filter(None, [self.activation and f"the output of {self.activation}"]),
            *filter(None, [self.logprobs and f"log-prob of {self.logprobs}"]),
            *(f"{name} of the loss" for name in self.sums),
            *(f"gradient of {name}" for name in self.gradients),
        ]
        return stages[0] if stages else "none: all values are finite"


def replay(config: Config, folder: Path, dump: Dump, checkpoint: Path | None) -> list[Finding]:
    """Run each microbatch of a dump alone; print and write what is not finite. This process is one rank.

    Args:
        folder: of the dump.
        checkpoint: weights; None: those of ``config.model.hf_path``.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    objective = build_objective(config.objective)
    layout = start_megatron(config.parallel, seed=config.run.seed)
    try:
        require_whole(checkpoint, config)
        policy = build_policy(config, layout, objective, timings=Timings())
        step = 0 if checkpoint is None else policy.load(checkpoint).step
        findings = [_run(policy, read_microbatch(folder, one), one) for one in dump.microbatches]
        if layout.is_global_leader:
            print(render(findings, dump, checkpoint or Path(config.model.hf_path), step), flush=True)
            text = json.dumps({"weights_step": step, "microbatches": [asdict(one) for one in findings]}, indent=1)
            replace_file(Path(config.run.dir) / REPORT, text)
    finally:
        close(layout)
    return findings


def _run(policy: MegatronPolicy, samples: Sequence[Sample], one: DumpedMicrobatch) -> Finding:
    prompts = {sample.order: prompt for sample, prompt in zip(samples, one.prompts, strict=True)}
    weights = gather_world(names_not_finite(named_values(policy.chunks)))
    logprobs = bad_logprobs(samples, policy.replica_logprobs(samples))
    lone = run_alone(policy.lone, samples, watches_activations=True)
    inputs = bad_inputs(samples, policy.objective.streams)
    names = [stream.name for stream in policy.objective.streams if stream.name in inputs]
    return Finding(
        file=one.file,
        weights=_merged(weights),
        inputs={name: shown(inputs[name], prompts) for name in names},
        activation=_first_activation(policy, lone, samples, prompts),
        logprobs=shown(_first_known(gather_world(logprobs)), prompts),
        sums=_merged(gather_world(lone.sums)),
        gradients=_merged(gather_world(lone.gradients)),
    )


def _first_activation(policy: MegatronPolicy, lone: LoneRun, samples: Sequence[Sample], prompts: dict[int, str]) -> str:
    """Return the first bad output of the whole model: of the earliest pipeline stage that has one."""
    own = lone.activations
    place = ""
    if 0 <= own.sample < len(samples):
        sample = samples[own.sample]
        place = f" at token {own.position} of {prompts[sample.order]} (member {sample.member})"
    found = gather_world((policy.layout.pp_rank, own.first, place))
    return next((name + where for _, name, where in sorted(found, key=lambda one: one[0]) if name), "")


def _first_known(found: Sequence[list[Place]]) -> list[Place]:
    return next((places for places in found if places), [])


def _merged(found: Iterable[Sequence[str]]) -> list[str]:
    """Return the names of all ranks, each once, in the order of the ranks."""
    return list(dict.fromkeys(name for names in found for name in names))


def render(findings: Sequence[Finding], dump: Dump, weights: Path, weights_step: int) -> str:
    """Return the report for people."""
    lines = [f"replay of step {dump.step}, replica {dump.replica}, on the weights of {weights}"]
    if weights_step != dump.step - 1:
        lines.append(
            f"note: the update began from the weights of step {dump.step - 1}; these are of step {weights_step}"
        )
    if dump.left_out:
        lines.append(f"note: {dump.left_out} further bad microbatches were not dumped")
    lines.append(f"the run said: {dump.problem}")
    for one in findings:
        inputs = "; ".join(f"{name} of {places}" for name, places in one.inputs.items())
        lines += [f"{one.file}: the first value that is not finite: {one.first()}"]
        parts = {"weights": first_of(one.weights, _SHOWN), "inputs": inputs, "activations": one.activation}
        parts |= {
            "log-probs": one.logprobs,
            "loss": first_of(one.sums, _SHOWN),
            "gradients": first_of(one.gradients, _SHOWN),
        }
        lines += [f"  {part:<12} {text or 'finite'}" for part, text in parts.items()]
    return "\n".join(lines)
