"""Runs the check of rows, with several processes if the files are large."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.files import RowPart
from megatron_dypo.data.row_check.check import PartCheck, RowsChecked, check_part, join_parts
from megatron_dypo.data.source import RowParser, RowSource
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.metrics.progress import progress
from megatron_dypo.processes.children import blocked, end_with_parent

_PART_BYTES = 4 * 2**20
_BYTES_PER_PROCESS = 16 * 2**20
"""Bytes for each process. Less data is checked in the time that another process needs to start."""
_MAX_PROCESSES = 8


def check_rows(
    source: RowSource,
    tokenizer: Tokenizer | None,
    data: DataConfig,
    *,
    show_progress: bool = False,
    num_processes: int | None = None,
) -> RowsChecked:
    """Check every row of ``source``. Without a tokenizer nothing is rendered or counted.

    If ``num_processes`` is None, it follows from the size of the files and the number of cores. Raises ValueError if a
    Parquet row group is damaged or a file changes during the check. Bad rows are in the result.
    """
    if num_processes is None:
        wanted = 1 + sum(source.sizes) // _BYTES_PER_PROCESS
        num_processes = 1 if tokenizer is None else min(wanted, _MAX_PROCESSES, _num_cores())
    with progress(len(source), "checking prompt rows", "rows", enabled=show_progress) as bar:
        parts = source.parts(_PART_BYTES)
        if num_processes == 1 or len(parts) == 1:
            found = [check_part(part, parser, tokenizer, data, bar.update) for parser, part in parts]
        else:
            found = []
            for checked in _in_processes(parts, tokenizer, data, min(num_processes, len(parts))):
                found.append(checked)
                bar.update(len(checked))
    source.require_unchanged()
    return join_parts(found, source)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


_work: tuple[Tokenizer | None, DataConfig] | None = None
"""The state of a process of the pool, set when it starts."""


def _in_processes(
    parts: Sequence[tuple[RowParser, RowPart]], tokenizer: Tokenizer | None, data: DataConfig, num_processes: int
) -> Iterator[PartCheck]:
    # Spawn, since a fork of a process with threads (torch's, pyarrow's) may hang.
    context = multiprocessing.get_context("spawn")
    work = (os.getpid(), tokenizer, data)
    with ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=work) as pool:
        try:
            # The processes start here. They must not get the signals, which are for the run; the run ends them.
            with blocked((signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)):
                results = pool.map(_check, parts)
            yield from results
        except ValueError as error:
            # Raise it as an error of this process, without the other's traceback.
            raise ValueError(str(error)) from None
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that checked rows of the prompt files died: the kernel may have killed it for memory, or "
                "the script that opens them runs without `if __name__ == '__main__'`"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(parent: int, tokenizer: Tokenizer | None, data: DataConfig) -> None:
    end_with_parent(parent)
    global _work
    _work = tokenizer, data


def _check(job: tuple[RowParser, RowPart]) -> PartCheck:
    assert _work is not None
    parser, part = job
    return check_part(part, parser, *_work)
