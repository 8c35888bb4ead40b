"""One SGLang server process with its guard, its log and its key file."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from megatron_dypo.ending import Cause
from megatron_dypo.processes.children import program, wait_for_end
from megatron_dypo.processes.guard_with_key import forget_key, hide_key, write_private
from megatron_dypo.processes.identity import identity_of
from megatron_dypo.processes.stalls import look_from_outside
from megatron_dypo.rollout.server.command import store_environment

_TAIL_LINES = 30
_GUARD = "megatron_dypo.processes.guard_with_key:main"


class ServerDiedError(RuntimeError):
    """A server of the run has ended on its own. The message names it and quotes the end of its log."""

    cause = Cause.SERVERS_GONE


class ServerProcess:
    """A server that stops when :meth:`stop` is called or this process dies (:mod:`megatron_dypo.processes.guard`)."""

    def __init__(self, name: str, url: str, log_path: Path, *, grace_s: float = 20.0) -> None:
        self.name, self.url, self.log_path = name, url, log_path
        self.key_file = log_path.with_suffix(".key.yaml")
        self._grace_s = grace_s
        self._guard: subprocess.Popen[bytes] | None = None
        self._api_key = ""
        self._folder: Path | None = None

    def start(self, command: Sequence[str], env: Mapping[str, str], api_key: str) -> None:
        """Start ``command``. It reads the API key from ``key_file`` (SGLang's ``--config``), not from its arguments.

        The guard writes that file, and removes it when the server ends. A server that has ended may be started again;
        its log continues.
        """
        self._api_key = api_key
        if self._guard is None:
            write_private(self.log_path, "")
        folder = self._new_folder()
        with self.log_path.open("ab") as log:
            self._guard = subprocess.Popen(
                program(_GUARD, self.key_file, self.log_path, os.getpid(), self._grace_s, *command, isolated=True),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**store_environment(command, folder), **env},
                umask=0o077,  # SGLang makes Unix sockets in the temporary folder
                start_new_session=True,  # Ctrl-C reaches only the trainer, which then stops its servers in order
            )
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._guard.stdin as stdin:  # a guard that ended is noticed later
            stdin.write(f"{api_key}\n".encode())

    def ending(self) -> str | None:
        """Return how the server ended, by name and status; None while it runs."""
        if self._guard is None or self._guard.poll() is None:
            return None
        return f"{self.name} ({self.url}) ended with status {self._guard.returncode}"

    def stopped_process(self) -> str | None:
        """Return name and number of a process of the server that a signal has stopped; None if all run."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that has ended by now is not stopped
                if process.status() == psutil.STATUS_STOPPED:
                    return f"process {process.pid} ({process.name()})"
        return None

    def stacks(self) -> str:
        """Return the stacks of the server's processes, even of stopped ones; "" without py-spy."""
        seen = {process.pid: look_from_outside(identity_of(process.pid)) for process in self._processes()}
        return "\n".join(f"process {pid}:\n{text}" for pid, text in seen.items() if text)

    def _processes(self) -> list[psutil.Process]:
        """Return the processes of the server, without the guard; none if it has ended."""
        if self._guard is None or self._guard.poll() is not None:
            return []
        try:
            return list(psutil.Process(self._guard.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def check(self) -> None:
        """Raise ServerDiedError if the server has ended; the message quotes its log, without the key."""
        if self.ending() is not None:
            words = hide_key(_tail(self.log_path), self._api_key).decode(errors="replace")
            raise ServerDiedError(f"{self.ending()}; the last lines of {self.log_path}:\n{words}")

    def forget_key(self) -> None:
        """Delete the key file, and overwrite the key in the settings that SGLang logs. Call it once the server runs;
        when the server ends, its guard does it again."""
        forget_key(self.key_file, self.log_path, self._api_key)

    def stop(self) -> None:
        """Ask the guard to stop the server; :meth:`join` waits until it has."""
        if self._guard is not None and self._guard.poll() is None:
            self._guard.terminate()

    def wait(self) -> None:
        """Wait until the server has ended, for any reason."""
        if self._guard is not None:
            wait_for_end(self._guard)

    def join(self) -> None:
        """Wait until the server has ended, and forget its key."""
        if self._guard is not None:
            self._guard.wait()
            self.forget_key()  # a guard that was killed could not
        self._remove_folder()

    def _new_folder(self) -> Path:
        """Make a folder that only this user may enter, for one start of the server."""
        self._remove_folder()
        self._folder = Path(tempfile.mkdtemp(prefix="megatron-dypo-"))
        return self._folder

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


def _tail(path: Path) -> bytes:
    return b"\n".join(path.read_bytes().splitlines()[-_TAIL_LINES:])
