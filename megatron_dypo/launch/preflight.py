"""The check of this host's devices before a job starts: ``python -m megatron_dypo.launch.preflight --devices 8``.

Each device, in a process of its own, multiplies the same two matrices many times. A product that differs from another
one in any bit is a device that computes wrongly; a device that takes much longer than the others of its host is
throttled. Then all devices sum a vector by the backend that training uses (NCCL on GPUs); the sum must be exact.

The program prints one line for the first fault, and nothing for a host that is well. It makes no check of memory and
none between hosts: ``slurm/node.sh`` asks the driver for memory errors before it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

PRODUCTS = 20
"""Products of each device."""
SLOW = 1.5
"""Times the median of the host that a product may take."""
_SIZE_ON_GPU, _SIZE_ON_CPU = 8192, 256
_SUMMED = 2**22
_SEED = 1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one device."""

    digests: list[str]
    """Digest of each product; all are equal on a device that computes rightly."""
    seconds: float
    """The fastest product."""
    is_sum_exact: bool


def main(
    devices: Annotated[int, typer.Option(help="Number of devices of this host.")],
    deadline_s: Annotated[float, typer.Option(help="Longest time of the whole check.")] = 120.0,
    device: Annotated[int, typer.Option(hidden=True)] = -1,
    store: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the first fault of this host's devices, or nothing."""
    if store is not None:
        print(json.dumps(asdict(check_device(device, devices, store, deadline_s))), flush=True)
        return
    if fault := find_fault(devices, deadline_s):
        print(fault)


def find_fault(devices: int, deadline_s: float) -> str:
    """Check all devices at once; return the first fault in words, "" if there is none."""
    deadline = time.monotonic() + deadline_s
    with tempfile.TemporaryDirectory(prefix="dypo-preflight-") as folder:
        words = ("-m", "megatron_dypo.launch.preflight", "--devices", str(devices), "--deadline-s", str(deadline_s))
        started = [_Device(index, [*words, "--store", f"{folder}/store"], Path(folder)) for index in range(devices)]
        findings, silent, failed = dict[int, Finding](), list[int](), dict[int, str]()
        for index, process in enumerate(started):
            status = process.wait(max(0.1, deadline - time.monotonic()))
            if status is None:
                silent.append(index)
            elif status:
                failed[index] = (process.errors().strip().splitlines() or [f"status {status}"])[-1]
            else:
                findings[index] = process.finding()
    # A device that failed lets the others wait for it in the sum.
    if failed:
        index, words_of_it = next(iter(failed.items()))
        return f"device {index} failed: {words_of_it}"
    if silent:
        return f"{_named(silent)} gave no answer in {deadline_s:g} s"
    return judge(findings)


class _Device:
    """The process of one device. It writes to files: a pipe that nobody reads yet would hold it up, and the others too,
    which wait for it in their sum."""

    def __init__(self, index: int, words: Sequence[str], folder: Path) -> None:
        self._out, self._err = folder / f"device_{index}.out", folder / f"device_{index}.err"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, *words, "--device", str(index)],
                stdout=out,
                stderr=err,
                env={**os.environ, "LOCAL_RANK": str(index)},
            )

    def wait(self, seconds: float) -> int | None:
        """Return the exit status; None if the process has not ended in that time, and is killed."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None

    def finding(self) -> Finding:
        """Return what the process found; its libraries may log to the same output."""
        lines = self._out.read_text(errors="replace").splitlines()
        return Finding(**json.loads(next(line for line in reversed(lines) if line.startswith("{"))))

    def errors(self) -> str:
        return self._err.read_text(errors="replace")


def judge(findings: dict[int, Finding]) -> str:
    """Return the first fault that the devices' findings show, "" if there is none."""
    usual = Counter(digest for one in findings.values() for digest in one.digests).most_common(1)[0][0]
    if wrong := [index for index, one in findings.items() if set(one.digests) != {usual}]:
        return f"{_named(wrong)} computes another product of the same matrices than the others, or than itself"
    if wrong := [index for index, one in findings.items() if not one.is_sum_exact]:
        return f"the sum over all devices is wrong on {_named(wrong)}"
    median = statistics.median(one.seconds for one in findings.values())
    if slow := [index for index, one in findings.items() if one.seconds > SLOW * median]:
        times = findings[slow[0]].seconds / median
        return f"{_named(slow)} takes {times:.1f} times as long for a product as the median of this host"
    return ""


def check_device(index: int, count: int, store: Path, deadline_s: float) -> Finding:
    """Do the work of one device's process."""
    import torch
    import torch.distributed as dist

    from megatron_dypo.parallel import device

    device.bind()
    where, on_gpu = device.device(), device.on_gpu()
    size, dtype = (_SIZE_ON_GPU, torch.bfloat16) if on_gpu else (_SIZE_ON_CPU, torch.float32)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(_SEED)
    first, second = (torch.randn(size, size, generator=generator).to(where, dtype) for _ in range(2))
    digests, times = [], []
    for _ in range(PRODUCTS):
        device.synchronize()
        began = time.perf_counter()
        product = first @ second
        device.synchronize()
        times.append(time.perf_counter() - began)
        bits = product.view(torch.int16 if on_gpu else torch.int32).cpu().numpy()
        digests.append(hashlib.blake2b(bits.tobytes(), digest_size=8).hexdigest())
    dist.init_process_group(
        device.backend(),
        store=dist.FileStore(str(store), count),
        rank=index,
        world_size=count,
        timeout=datetime.timedelta(seconds=deadline_s),
    )
    summed = torch.full((_SUMMED,), float(index + 1), device=where)
    dist.all_reduce(summed)
    is_exact = bool((summed == count * (count + 1) / 2).all())
    dist.barrier()
    dist.destroy_process_group()
    return Finding(digests=digests, seconds=min(times), is_sum_exact=is_exact)


def _named(indices: Sequence[int]) -> str:
    return ("device " if len(indices) == 1 else "devices ") + ", ".join(map(str, indices))


if __name__ == "__main__":
    typer.run(main)
