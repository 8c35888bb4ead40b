"""The process that runs tests on mutants, each in a forked child. Its working directory is a copy of the tree.

It reads a JSON task a line, and answers with a JSON result a line. It imports the heavy libraries once. Only the
children import the package and its tests, so that each child sees the current file.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

PRELOADED = (
    "_hypothesis_pytestplugin",
    "pytest_timeout",
    "megatron.core.models.common.embeddings.rope_utils",
    "numpy",
    "torch",
    "torch.utils.flop_counter",
    "hypothesis",
    "hypothesis.strategies",
    "pytest",
    "pydantic",
    "yaml",
    "safetensors.numpy",
    "megatron.core.dist_checkpointing",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "torch.distributed.checkpoint",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "aiohttp.web",
)
_MEMORY = 24 * 2**30
_EPOCH = 2_000_000_000
"""Python knows stale bytecode by a file's time in seconds and its size: each version of a file gets its own time."""


def main() -> None:
    """Serve tasks until the input ends."""
    os.environ["TESTS_START_METHOD"] = "fork"  # ranks then import nothing again (tests.support.dist.spawn)
    for name in PRELOADED:
        importlib.import_module(name)
    for number, line in enumerate(sys.stdin):
        task = json.loads(line)
        path = Path(task["path"]) if task["path"] else None
        original = path.read_bytes() if path else b""
        try:
            if path:
                path.write_bytes(task["source"].encode())
                os.utime(path, (_EPOCH + number, _EPOCH + number))
            result = _run(task["tests"], task["cpu_s"])
        finally:
            if path:
                path.write_bytes(original)
                os.utime(path, (_EPOCH - 1, _EPOCH - 1))
        print(json.dumps(result), flush=True)


def _run(tests: list[str], cpu_s: float) -> dict[str, object]:
    output = Path("mutation-output.txt")
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    child = os.fork()
    if child == 0:
        _child(tests, cpu_s, output)
    is_late = False
    status = _ended(child)
    while status is None:
        if time.monotonic() - started > 6 * cpu_s:  # the child waits instead of computing
            os.killpg(child, signal.SIGKILL)
            is_late = True
        time.sleep(0.02)
        status = _ended(child)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code = os.waitstatus_to_exitcode(status)
    tail = output.read_text(errors="replace").strip().splitlines()[-30:]
    return {"code": code, "is_late": is_late or code in (-signal.SIGXCPU, -signal.SIGKILL), "cpu_s": used, "tail": tail}


def _ended(child: int) -> int | None:
    """Return the child's wait status; None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return status if pid else None


def _child(tests: list[str], cpu_s: float, output: Path) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, int(cpu_s) + 2))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import pytest

    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "--hypothesis-seed=0"]
    code = 70
    try:
        code = int(pytest.main([*options, *tests]))
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
