"""Compare the time of training steps with one checkpoint in 10 steps, written at once or during the steps, and without.

    python benchmarks/saving.py

- ``none``: blocks of 10 updates, without a save.
- ``sync``: a save after the first update of each block, written and published before training goes on.
- ``async``: the same save with ``checkpoint.async_save``: the state is copied, training goes on, and the checkpoint is
  published after the block, or earlier if it is written.

One rank with one thread; the updates are those of ``step_overhead.py``'s main shape. The writers run on other cores, so
at least one must be idle. All checkpoints are written to a temporary folder (``--folder``: another file system), with
their fsync and checksums. Each round runs every variant once; times are medians over rounds.

The last line is one JSON object: the time of ``sync`` and of ``async`` over that of ``none``, less 1, and the time of
the copy alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
from step_overhead import SHAPES, SMOKE

STEPS = 10


def answer(rounds: int, folder: str, *, smoke: bool) -> None:
    """Measure in this process, and print the seconds of each variant by round, and of the copies."""
    import overhead_steps

    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.config.run import CheckpointConfig
    from megatron_dypo.mcore import features
    from megatron_dypo.mcore.checkpoints import checkpoint
    from megatron_dypo.mcore.checkpoints.saving import PendingSave
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    features.shield_imports()
    parallel = ParallelConfig()
    layout = start_megatron(parallel)
    bench = overhead_steps.Bench(replace(SHAPES["main"], **SMOKE) if smoke else SHAPES["main"], parallel, layout)
    numbers, copies = itertools.count(1), []

    def begin() -> PendingSave:
        start = time.perf_counter()
        state: dict[str, Any] = {"chunks": bench.chunks, "optimizer": bench.optimizer, "layout": layout}
        pending = checkpoint.begin_save(folder, next(numbers), **state, trainer_state={}, cfg=CheckpointConfig(keep=1))
        copies.append(time.perf_counter() - start)
        return pending

    def block(variant: str) -> None:
        pending = None
        for step in range(1 if smoke else STEPS):
            bench.step("dypo")
            if step == 0 and variant != "none":
                pending = begin()
            if pending is not None and (variant == "sync" or pending.is_written()):
                pending.finish()
                pending = None
        if pending is not None:
            pending.finish()

    bench.step("dypo")
    blocks = {variant: partial(block, variant) for variant in ("none", "sync", "async")}
    measure.interleaved(blocks, 1)
    copies.clear()
    wall, _ = measure.interleaved(blocks, rounds)
    size = sum(path.stat().st_size for path in Path(folder).rglob("*.distcp"))
    print(json.dumps({"wall": wall, "copies": copies, "bytes": size}), flush=True)
    close(layout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="folder of the checkpoints; it must be empty")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes and one round: shows that it runs")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        answer(args.rounds, args.folder, smoke=args.smoke)
        return
    measure.print_header()
    folder = args.folder or tempfile.mkdtemp(prefix="saving-")
    try:
        arguments = ["--measure", "--folder", folder, "--rounds", str(1 if args.smoke else args.rounds)]
        found = measure.run_ranks(str(Path(__file__)), [*arguments, *(["--smoke"] if args.smoke else [])])
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    medians = {variant: statistics.median(values) for variant, values in found["wall"].items()}
    copy_s = statistics.median(found["copies"])
    print(f"checkpoint: {found['bytes'] / 2**20:.0f} MiB; a block of {STEPS} updates, median of {args.rounds} rounds:")
    for variant, seconds in medians.items():
        rounds = ", ".join(f"{value:.2f}" for value in found["wall"][variant])
        print(f"  {variant:6} {seconds:8.2f} s   {seconds / medians['none'] - 1:+7.1%}   rounds: {rounds}")
    print(f"  copy   {copy_s:8.2f} s   {copy_s / medians['none']:+7.1%}")
    measure.print_result(
        {
            "sync_vs_none": medians["sync"] / medians["none"] - 1,
            "async_vs_none": medians["async"] / medians["none"] - 1,
            "copy_vs_none": copy_s / medians["none"],
        }
    )


if __name__ == "__main__":
    main()
