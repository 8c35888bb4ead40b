"""Dumps of the microbatches behind an update that is not finite, for ``megatron-dypo replay``.

``run.dir/bad_steps/step_000012/replica_00000/`` has ``dump.json``, the config of the run, and one file of samples for
each microbatch (safetensors and JSON, see :mod:`megatron_dypo.batching.wire`). The leader of a replica writes its own
folder, whole or not at all; nothing is gathered. Number and size of the dumps are bounded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_dypo.batching.wire import dump_samples, load_samples
from megatron_dypo.checks import require
from megatron_dypo.fs import commit_folder, durable_file, start_folder
from megatron_dypo.json_text import parse_json
from megatron_dypo.types import Sample

FOLDER = "bad_steps"
DUMP = "dump.json"
CONFIG = "config.yaml"
MAX_STEPS = 8
"""Steps of a run that are dumped; after that the messages are all there is."""
MAX_REPLICAS = 4
"""Replicas that dump microbatches of one step."""
MAX_MICROBATCHES = 4
"""Microbatches of one replica."""
MAX_BYTES = 2**28
"""Bytes of one replica's microbatches."""
_FORMAT = 1

log = logging.getLogger("megatron_dypo")


@dataclass(frozen=True, kw_only=True)
class DumpedMicrobatch:
    """One file of a dump."""

    file: str
    number: int
    """Place of the microbatch in its replica's update, from 0."""
    prompts: Sequence[str]
    """Id of the prompt of each sample."""
    members: Sequence[int]
    """Index of each sample in its group."""


@dataclass(frozen=True, kw_only=True)
class Dump:
    """The content of ``dump.json``."""

    step: int
    replica: int
    problem: str
    """The message of the run."""
    weights: str
    """Checkpoint of the run, or HF folder, that a replay loads."""
    weights_step: int
    """Step of these weights; 0: the initial ones."""
    microbatches: Sequence[DumpedMicrobatch]
    left_out: int = 0
    """Further bad microbatches of this replica."""
    format: int = field(default=_FORMAT)


def step_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of the dumps of a step."""
    return run_dir / FOLDER / f"step_{step:06d}"


def dumped_steps(run_dir: Path) -> int:
    """Return the number of steps that have a dump."""
    return len(list((run_dir / FOLDER).glob("step_*")))


def write_dump(folder: Path, dump: Dump, microbatches: Sequence[Sequence[Sample]], config: str) -> Dump:
    """Write the dump of one replica, whole or not at all, in place of an earlier one; return it with its files.

    Args:
        dump: with the numbers and names of all ``microbatches``; those beyond the bounds are left out.
        config: of the run, as YAML.

    Raises:
        ValueError, OSError: the folder cannot be written.
    """
    contents, size = list[bytes](), 0
    for samples in microbatches[:MAX_MICROBATCHES]:
        content = dump_samples(samples)
        size += len(content)
        if size > MAX_BYTES:
            break
        contents.append(content)
    kept = list(dump.microbatches[: len(contents)])
    dump = Dump(**{**vars(dump), "microbatches": kept, "left_out": len(microbatches) - len(kept)})
    partial = start_folder(folder)
    files = {one.file: content for one, content in zip(kept, contents, strict=True)}
    files |= {DUMP: json.dumps(asdict(dump), indent=1).encode(), CONFIG: config.encode()}
    for name, content in files.items():
        with durable_file(partial / name) as file:
            file.write(content)
    commit_folder(partial, folder)
    return dump


def find_dump(path: Path) -> Path:
    """Return the folder of one replica's dump that ``path`` names: itself, or the first in the folder of a step.

    Raises:
        ValueError: there is none.
    """
    found = [path, *sorted(path.glob("replica_*"))]
    dumps = [folder for folder in found if (folder / DUMP).is_file()]
    require(bool(dumps), f"{path}", f"must be RUN/{FOLDER}/step_N, or the folder of a replica in it, with a {DUMP}")
    return dumps[0]


def read_dump(folder: Path) -> Dump:
    """Read ``dump.json`` of a folder. Raises ValueError with file, field and rule."""
    path = folder / DUMP
    try:
        found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        known = found["format"] == _FORMAT
        microbatches = [DumpedMicrobatch(**one) for one in found["microbatches"]]
        dump = Dump(**{**found, "microbatches": microbatches})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: is no dump of a step: {type(error).__name__}: {error}") from error
    require(known, f"{path}: format={dump.format}", f"must be {_FORMAT}, the format of this version")
    for one in microbatches:
        require(Path(one.file).name == one.file, f"{path}: file={one.file!r}", "must be a name in the dump's folder")
    return dump


def read_microbatch(folder: Path, one: DumpedMicrobatch) -> list[Sample]:
    """Read the samples of a microbatch. Raises ValueError with the file."""
    path = folder / one.file
    try:
        samples = load_samples(path.read_bytes())
    except (OSError, ValueError, TypeError, KeyError, IndexError, SafetensorError) as error:
        raise ValueError(f"{path}: is damaged: {type(error).__name__}: {error}") from error
    require(len(samples) == len(one.prompts), f"{path}: {len(samples)} samples", f"must be {len(one.prompts)}")
    return samples
