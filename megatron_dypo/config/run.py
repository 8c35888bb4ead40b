"""The run's part of the configuration tree: its folder, its length, and what it writes; see
:mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_dypo.checks import require, require_not_negative, require_positive

MAX_SEED = 2**31
"""Upper bound of seeds. Servers and NumPy take 32 bits, and some seeds are the run's seed plus an index."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder and the length of the run."""

    dir: str = "runs/default"
    """Run folder. A run whose folder exists resumes from its last checkpoint."""
    steps: int = 100
    """Optimizer steps of the whole run, including the steps before a resume."""
    seed: int = 1
    """Seed of the shuffling, the draw of teachers and Megatron's random number generators."""
    resume: bool = True
    """Resume from the run folder's checkpoint. ``false``: refuse a run folder that holds one."""
    smoke: bool = False
    """Make one step with random weights at full size in ``<run.dir>/smoke``, say what it took, and end. It needs
    ``config.json`` and the tokenizer of ``model.hf_path``, but no weights, and saves none. It proves that the layout
    fits and runs on this machine, servers and refit included. docs/planning.md says what it does not prove."""
    check_memory: bool = True
    """On GPUs, refuse a run that does not fit into memory according to ``megatron-dypo plan``."""
    watchdog_s: float = 1800.0
    """End the run when a rank makes no progress for this many seconds. 0: wait indefinitely, without warnings. A rank
    that waits for other ranks, or for rollouts that still arrive, does not count as hung. Long before, within three
    usual steps and a minute, a warning names a rank or a server that stalls. A server that does not answer for as long
    is ended by the process that started it, and starts again as if it had died (``rollout.servers.max_restarts``)."""
    shared_files: bool = False
    """Give new files and folders the modes that the umask says. ``false``: only this user can read them (0600, folders
    0700)."""
    allow_changed: tuple[
        Literal["data", "seed", "tokenizer", "model", "reference", "teacher", "verifier", "version"], ...
    ] = ()
    """Inputs that may differ from those of the run that is resumed; a warning then names each difference. ``data``: the
    prompt files, their content or order, columns, teachers and limits; draws then mean other prompts, answers or
    traces. ``seed``: ``run.seed``. ``tokenizer``: its files, template and stop ids. ``model``: config.json.
    ``reference``: the weights of a frozen π_ref. ``teacher``: the model of ``teacher_servers``. ``verifier``: the
    section ``grading`` and the code of your own verifiers. ``version``: the code of this program, and the versions of
    libraries that decide results. docs/resuming.md says what is compared."""

    def __post_init__(self) -> None:
        require_positive(self, "steps")
        require_not_negative(self, "watchdog_s")
        require(bool(self.dir.strip()), f"dir={self.dir!r}", "is required: the run folder")
        require(0 <= self.seed < MAX_SEED, f"seed={self.seed}", "must be in [0, 2^31)")


@dataclass(frozen=True, kw_only=True)
class KeepBestConfig:
    """The one checkpoint that stays because it is the best by a metric."""

    metric: str | None = None
    """A metric of the run, such as ``eval/<set>/accuracy``. Only checkpoints of steps that measured it are compared; of
    equal ones the newest counts. ``null``: none stays for being the best."""
    mode: Literal["max", "min"] = "max"
    """Whether the largest or the smallest value is the best."""

    def __post_init__(self) -> None:
        require(self.metric is None or bool(self.metric.strip()), f"metric={self.metric!r}", "must name a metric")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and how many stay. The format is Megatron's dist_checkpointing."""

    every: int = 50
    """Steps between checkpoints. 0: only the last step, which always saves."""
    keep: int = 2
    """Newest checkpoints to keep. 0: all. ``keep_every`` and ``keep_best`` keep more."""
    keep_every: int = 0
    """Checkpoints of steps that this number divides stay. 0: no step stays for its number."""
    keep_best: KeepBestConfig = field(default_factory=KeepBestConfig)
    async_save: bool = False
    """Write checkpoints while training goes on: a save copies the state into host memory and returns. The next save
    waits for it. After a crash in between, the checkpoint before counts."""
    verify: Literal["manifest", "full"] = "full"
    """Comparison of a checkpoint with its manifest before a resume. ``manifest``: names and sizes of all files, and
    checksums of all but the tensor files. ``full``: the checksums of all files; each rank reads its share, at about
    1.5 GB/s a core. A damaged checkpoint is set aside, and an older one taken."""

    def __post_init__(self) -> None:
        require_not_negative(self, "every", "keep", "keep_every")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Outputs besides ``metrics.jsonl``, which is always written."""

    tensorboard: bool = True
    """Write TensorBoard events to ``<run.dir>/tensorboard``."""
    wandb: bool = False
    """Log to Weights & Biases; needs the extra ``wandb``."""
    wandb_project: str = "megatron_dypo"
    """Project of Weights & Biases."""
    summary_every: int = 1
    """Steps between summary lines in the log."""
    samples_per_step: int = 0
    """Groups per step whose rollouts are written to ``samples/``. 0: all."""

    def __post_init__(self) -> None:
        require_positive(self, "summary_every")
        require_not_negative(self, "samples_per_step")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The export of the model after the last step."""

    hf: bool = True
    """Write the policy as an HF model folder ``<run.dir>/hf``."""
