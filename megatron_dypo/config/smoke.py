"""The config of a smoke run (``run.smoke``): one step with random weights, at the sizes of the real run."""

from __future__ import annotations

from dataclasses import replace

from megatron_dypo.config.evaluation import EvalConfig
from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.config.probe import ProbeConfig
from megatron_dypo.config.run import CheckpointConfig, ExportConfig
from megatron_dypo.config.tree import Config

FOLDER = "smoke"
VERIFIER = "megatron_dypo.grading.smoke:judge"
"""Judges by a hash of the response, so that a random model has groups with right and wrong responses."""
_DUMMY = ("--load-format", "dummy")


def smoke_config(config: Config) -> Config:
    """Return the config of the smoke run; ``config`` itself unless ``run.smoke`` is set.

    Model, layout, batching, lengths, optimizer, servers and refit stay. The run has one step and a folder of its own,
    saves, exports and evaluates nothing, and needs no weights: servers start with dummy weights (``--load-format`` of
    SGLang) and get the trainer's random ones.
    """
    if not config.run.smoke:
        return config
    servers = config.rollout.servers
    return replace(
        config,
        run=replace(config.run, dir=f"{config.run.dir}/{FOLDER}", steps=1),
        model=replace(config.model, mcore_path=None),
        data=replace(config.data, fields=replace(config.data.fields, verifier=""), drop_wrong_traces=False),
        rollout=replace(
            config.rollout, journal=False, servers=replace(servers, extra_args=(*servers.extra_args, *_DUMMY))
        ),
        grading=GradingConfig(verifier=VERIFIER, workers=config.grading.workers, fail_truncated=False),
        objective=replace(
            config.objective,
            sft_steps=0,
            rl_only_steps=0,
            alpha=0.5 if config.objective.alpha == "auto" else config.objective.alpha,
        ),
        optimizer=replace(config.optimizer, warmup_steps=0),
        eval=EvalConfig(),
        probe=ProbeConfig(),
        profile=replace(config.profile, steps=tuple(step for step in config.profile.steps if step == 1)),
        checkpoint=CheckpointConfig(every=0),
        logging=replace(config.logging, wandb=False, tensorboard=False),
        export=ExportConfig(hf=False),
    )
