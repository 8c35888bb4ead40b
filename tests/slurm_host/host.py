"""Slurm jobs on this host, for tests: real daemons, several virtual nodes (see one_host_slurm.sh)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("one_host_slurm.sh")
_NEEDED = ("slurmctld", "slurmd", "munged", "unshare")
_FIRST_PORTS = range(6000, 10_000, 1000)
"""Below the ports of the jobs."""


class SlurmHost:
    """A running Slurm and a folder for what its jobs write."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self._environment = root, environment

    def call(self, *command: str) -> str:
        """Return the standard output of a Slurm command, which must succeed."""
        done = subprocess.run(
            [*self._login(), *command],
            env=self._environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def hosts(self, node: str) -> Path:
        """Return the file that a node of its own address has as /etc/hosts; rewrite it in place."""
        return self.root / "slurm" / f"hosts.{node}"

    def enter(self, node: str) -> list[str]:
        """Return the words that run a command on a node of its own address, beside Slurm."""
        return ["nsenter", "--target", self._pid(f"slurmd.{node}"), "--net", "--mount", "--uts"]

    def _login(self) -> list[str]:
        """Return the words that run a command where slurmctld is."""
        return ["nsenter", "--target", self._pid("switch"), "--net"] if self._environment.get("FS_APART") else []

    def _pid(self, name: str) -> str:
        return (self.root / "slurm" / "pid" / f"{name}.pid").read_text().strip()

    def wait_until_idle(self, deadline_s: float = 180.0) -> None:
        """Wait until a job may get any node. A job that ended badly holds its nodes for a while."""
        deadline = time.monotonic() + deadline_s
        while set(states := self.call("sinfo", "--noheader", "--Node", "--format=%t").split()) != {"idle"}:
            assert time.monotonic() < deadline, f"nodes after {deadline_s:g} s: {states}"
            time.sleep(0.2)

    def submit(self, folder: Path, script: str, *overrides: str, nodes: int, options=(), **environment: str) -> Job:
        """Run ``sbatch slurm/<script>`` on nodes of 2 GPUs in this interpreter's environment; logs go to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "DYPO_HOME": str(REPOSITORY),
            "VENV": sys.prefix,
            "LOG_ROOT": str(folder / "logs"),
            "GPUS_PER_NODE": "2",
            **environment,
        }
        exported = ",".join(["ALL", *(f"{name}={value}" for name, value in settings.items())])
        name = f"{Path(script).stem}-{folder.name}"
        sbatch = ["sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=2", f"--job-name={name}"]
        output = folder / "job.out"
        where = [f"--export={exported}", f"--output={output}", *options, str(REPOSITORY / "slurm" / script)]
        return Job(self, self.call(*sbatch, *where, *overrides), output, folder / "logs" / name)

    def stop(self) -> None:
        if (self.root / "slurm" / "pid" / "slurmctld.pid").is_file():
            cancel = [*self._login(), "scancel", "--user=root"]
            subprocess.run(cancel, env=self._environment, timeout=60, check=False)
        subprocess.run([_SCRIPT, "down"], env=self._environment, timeout=60, check=True)
        shutil.rmtree(self.root, ignore_errors=True)  # daemons that are ending still write there


class Job:
    """A submitted job. It keeps its number when it is requeued."""

    def __init__(self, host: SlurmHost, number: str, output: Path, logs: Path) -> None:
        self.host, self.number, self.output_file, self.logs = host, number, output, logs

    def show(self) -> dict[str, str]:
        text = self.host.call("scontrol", "show", "job", self.number)
        return dict(item.partition("=")[::2] for item in text.split() if "=" in item)

    def output(self) -> str:
        return self.output_file.read_text() if self.output_file.is_file() else ""

    def last_line(self) -> str:
        return self.output().strip().splitlines()[-1]

    def everything(self) -> str:
        """Return the texts that a person would read when a test fails."""
        logs = [f"== {path}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(self.logs.glob("*/*.log"))]
        return "\n".join([self.output(), *logs])

    def wait_until(self, condition: Callable[[], bool], what: str, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while not condition():
            state = self.show()["JobState"]
            assert state not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), f"{state}\n{self.everything()}"
            assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}\n{self.everything()}"
            time.sleep(0.1)

    def wait(self, deadline_s: float) -> str:
        """Wait for the job's end; return its state."""
        deadline = time.monotonic() + deadline_s
        while (state := self.show()["JobState"]) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            assert time.monotonic() < deadline, f"{state} after {deadline_s:g} s\n{self.everything()}"
            time.sleep(0.1)
        return state

    def start_again_now(self, deadline_s: float = 120.0, **changes: str) -> None:
        """Wait until the job is back in the queue, change it, and let it start without Slurm's two minutes of delay.

        It must not start within the second in which it was requeued: nodes still refuse its old credential.
        """
        deadline = time.monotonic() + deadline_s
        while (state := self.show())["JobState"] != "PENDING" or state["Restarts"] == "0":
            assert time.monotonic() < deadline, f"not requeued\n{self.everything()}"
            time.sleep(0.1)
        for name, value in {**changes, "StartTime": "now+3seconds"}.items():
            self.host.call("scontrol", "update", f"JobId={self.number}", f"{name}={value}")


def require(condition: bool, what: str) -> None:
    """Skip the test if something is missing; fail if ``DYPO_REQUIRE_SLURM`` is set."""
    if condition:
        return
    if os.environ.get("DYPO_REQUIRE_SLURM"):
        pytest.fail(what)
    pytest.skip(what)


def start_slurm(*, nodes: int, spank: Path | None = None, apart: bool = False) -> SlurmHost:
    """Start a Slurm; skip the test if this host has none.

    Args:
        apart: each node has addresses, host file, /dev/shm and local disk of its own; else skip the test.
    """
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    require(not missing, f"needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    require(os.geteuid() == 0, "needs root, for Slurm's daemons")
    if apart and not can_set_nodes_apart():
        pytest.skip("this user cannot make network namespaces and connect them")
    root = Path(tempfile.mkdtemp(prefix="slurm-host-"))  # not pytest's folder: munge wants others to pass through
    root.chmod(0o755)
    settings = {
        "FS_ROOT": str(root / "slurm"),
        "FS_NODES": str(nodes),
        "FS_PORT": str(_free_ports()),
        "FS_SPANK": str(spank or ""),
        "FS_APART": "1" if apart else "",
        "SLURM_CONF": str(root / "slurm" / "slurm.conf"),
    }
    host = SlurmHost(root, {**os.environ, **settings})
    try:
        up = subprocess.run(
            [_SCRIPT, "up"], env={**os.environ, **settings}, capture_output=True, text=True, timeout=90, check=False
        )
    except BaseException:
        host.stop()
        raise
    if up.returncode:
        host.stop()
        pytest.fail(f"Slurm did not start: {up.stdout}{up.stderr}")
    return host


def can_set_nodes_apart() -> bool:
    """Return whether this user may make the namespaces and interfaces of nodes with addresses of their own."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    links = (
        'ip link add switch type "bridge" && ip link add eth0 type veth peer name node1 && mount -t tmpfs node1 /mnt'
    )
    test = ["unshare", "--net", "--mount", "--uts", "sh", "-c", links]
    return subprocess.run(test, capture_output=True, check=False).returncode == 0


def _free_ports() -> int:
    for first in _FIRST_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex(("127.0.0.1", first + 1)):
                return first
    raise AssertionError(f"another Slurm at each of {list(_FIRST_PORTS)}")
