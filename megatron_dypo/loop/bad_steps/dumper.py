"""The decision which microbatches of a bad step are dumped, by which replica. Called by all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_dypo.config.reading.load import dump_config
from megatron_dypo.config.tree import Config
from megatron_dypo.loop.bad_steps.dump import (
    MAX_REPLICAS,
    MAX_STEPS,
    Dump,
    DumpedMicrobatch,
    dumped_steps,
    step_folder,
    write_dump,
)
from megatron_dypo.loop.policy import Policy, UpdateReport
from megatron_dypo.loop.ranks import Ranks
from megatron_dypo.loop.replica import Follower, Replica
from megatron_dypo.mcore.checkpoints.folder import CHECKPOINTS, find_latest, step_of


@dataclass(frozen=True, kw_only=True)
class Dumper:
    """Writes the microbatches behind an update that is not finite; see :mod:`.dump`."""

    config: Config
    """The config of the run, which a dump repeats."""

    def dump(
        self,
        step: int,
        report: UpdateReport,
        policy: Policy,
        replica: Replica,
        ranks: Ranks,
        *,
        problem: str,
        has_bad_weights: bool,
    ) -> str:
        """Dump the microbatches of ``step`` that are bad on their own; say in words what was done. Collective.

        A weight that is not finite spoils every microbatch, so one of the first replica's shows it. A disk that is full
        loses the dump, not the run.
        """
        run_dir = Path(self.config.run.dir)
        folder = step_folder(run_dir, step)
        if ranks.of_leaders(dumped_steps(run_dir))[0] >= MAX_STEPS:
            return f"not dumped: {folder.parent} holds {MAX_STEPS} steps already"
        if has_bad_weights:
            bad = [index for index, members in enumerate(report.bins) if members][:1]
        else:
            bad = policy.bad_microbatches(report)
        counts = ranks.of_leaders(len(bad))
        writers = [number for number, count in enumerate(counts) if count][: 1 if has_bad_weights else MAX_REPLICAS]
        if not writers:
            return "no microbatch is bad on its own, only their sum, so none is dumped"
        error = ""
        if ranks.replica in writers and not isinstance(replica, Follower):
            try:
                self._write(folder / f"replica_{ranks.replica:05d}", step, report, replica, ranks, bad, problem)
            except (OSError, ValueError) as reason:
                error = str(reason)
        errors = [text for text in ranks.of_leaders(error) if text]
        return f"not dumped: {errors[0]}" if errors else f"dumped for `megatron-dypo replay {folder}`"

    def _write(
        self,
        folder: Path,
        step: int,
        report: UpdateReport,
        replica: Replica,
        ranks: Ranks,
        bad: list[int],
        problem: str,
    ) -> None:
        latest = find_latest(Path(self.config.run.dir) / CHECKPOINTS)
        microbatches = [[report.samples[i] for i in report.bins[index]] for index in bad]
        described = [
            DumpedMicrobatch(
                file=f"microbatch_{index:05d}.safetensors",
                number=index,
                prompts=[replica.id_of(sample.order) for sample in samples],
                members=[sample.member for sample in samples],
            )
            for index, samples in zip(bad, microbatches, strict=True)
        ]
        dump = Dump(
            step=step,
            replica=ranks.replica,
            problem=problem,
            weights=str((latest or Path(self.config.model.hf_path)).absolute()),
            weights_step=step_of(latest) if latest else 0,
            microbatches=described,
        )
        write_dump(folder, dump, microbatches, dump_config(self.config))
