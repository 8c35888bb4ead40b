"""Guard a command that reads a key from a file (:mod:`megatron_dypo.processes.guard`), and leave no key on the disk.

Arguments of the program: ``KEY_FILE LOG PARENT_PID GRACE_S COMMAND [ARGUMENT …]``; the key is a line of the standard
input. SGLang logs its settings with the key in them. When the command has ended, for any reason and even if the parent
is gone, the key file is removed and the key in the log is overwritten.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from megatron_dypo.processes.guard import guard

_BLOCK = 2**20


def hide_key(text: bytes, key: str) -> bytes:
    """Return ``text`` with stars in place of the key, also where Python or JSON quotes it. The length stays."""
    for spelling in _spellings(key):
        text = text.replace(spelling, b"*" * len(spelling))
    return text


def forget_key(key_file: Path, log: Path, key: str) -> None:
    """Remove the key file, and overwrite the key in the log. Another process may append to the log in the meantime."""
    key_file.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError), log.open("r+b") as file:
        step = _BLOCK - max(map(len, _spellings(key)), default=1) + 1  # a key may lie across two blocks
        begin = 0
        while block := file.read(_BLOCK):
            if (hidden := hide_key(block, key)) != block:
                file.seek(begin)
                file.write(hidden)
            if len(block) < _BLOCK:
                return
            begin += step
            file.seek(begin)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can ever read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def main() -> int:
    """Run the command and return its exit status."""
    key_file, log, (parent, grace_s, *command) = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    key = sys.stdin.buffer.readline().decode().rstrip("\n")  # a fork of the parent may hold the other end open
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    try:
        write_private(key_file, f"api-key: {json.dumps(key)}\n")
        return guard(int(parent), float(grace_s), command)
    finally:
        forget_key(key_file, log, key)


def _spellings(key: str) -> list[bytes]:
    spellings = {key.encode(), repr(key)[1:-1].encode(), json.dumps(key)[1:-1].encode()} - {b""}
    return sorted(spellings, key=len, reverse=True)
