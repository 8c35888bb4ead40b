"""Jobs on a real Slurm whose nodes have addresses, host files, /dev/shm and local disks of their own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.slurm_host.host import REPOSITORY, start_slurm
from tests.support.e2e.parity_task import write_task
from tests.support.slurm_run import DEADLINE_S, rank_process, steps_of, submit

SFT = "objective.name=sft"
NODES = ("node1", "node2", "node3")


@pytest.fixture(scope="module")
def three_nodes():
    host = start_slurm(nodes=len(NODES), apart=True)
    yield host
    host.stop()


@pytest.fixture
def slurm(three_nodes):
    """Wait until all nodes are idle, so that a job gets the first ones; put host files back after the test."""
    three_nodes.wait_until_idle()
    whole = three_nodes.hosts("switch").read_text()
    yield three_nodes
    for node in NODES:
        three_nodes.hosts(node).write_text(whole)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Write the config of a tiny task at TP 2; each test gives its runs their own folders."""
    servers = {"servers": {"start_deadline_s": DEADLINE_S}}
    return write_task(tmp_path_factory.mktemp("task"), parallel={"tensor": 2}, rollout=servers)


@contextmanager
def a_program_that_waits(folder: Path):
    """Make a driver's program that says that it was asked and answers after the block; give the PATH that finds it."""
    driver = folder / "bin" / "nvidia-smi"
    driver.parent.mkdir(parents=True)
    driver.write_text(
        f"#!/bin/sh\ntouch {folder}/asked\nuntil [ -e {folder}/go ]; do sleep 0.1; done\necho '0, 0, No, No'\n"
    )
    driver.chmod(0o755)
    try:
        yield f"{driver.parent}:{sys.prefix}/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    finally:
        (folder / "go").touch()


@contextmanager
def listener(slurm, node: str, port: int):
    """Listen at a port of a node within the block."""
    script = f"import socket, time; s = socket.create_server(('', {port})); print('up', flush=True); time.sleep(10_000)"
    command = [*slurm.enter(node), sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield
        process.kill()


def test_logs_on_a_disk_that_nodes_do_not_share_end_the_job_and_say_so(slurm, task, tmp_path):
    where = {"LOG_ROOT": "/dev/shm/logs", "MARKS_S": "3"}
    job = submit(slurm, task, tmp_path, SFT, nodes=2, rollout_nodes=0, **where)
    assert job.wait(DEADLINE_S) == "FAILED", job.everything()
    assert job.last_line().startswith("dypo: error: preflight: nothing was heard of node2 in /dev/shm/logs/")
    assert job.last_line().endswith("LOG_ROOT must be on a file system that all nodes share")
    assert not (tmp_path / "run").exists()


def test_names_of_nodes_are_looked_up_on_every_node_before_anything_starts(slurm, task, tmp_path):
    whole = slurm.hosts("switch").read_text()
    slurm.hosts("node1").write_text(whole.replace("10.78.0.2 node2", "127.0.1.1 node2"))
    slurm.hosts("node2").write_text(whole)
    first = submit(slurm, task, tmp_path / "first", SFT, nodes=2, rollout_nodes=1)
    first.wait_until(lambda: "is requeued" in first.output(), "a new attempt", DEADLINE_S)
    slurm.call("scancel", first.number)
    assert "bad node node1: node1 looks up node2 as 127.0.1.1, which is node1 itself: correct its" in first.output()
    assert "attempt 0 is requeued without node1" in first.output()

    slurm.wait_until_idle()
    for node in ("node1", "node2"):
        slurm.hosts(node).write_text("127.0.0.1 localhost\n")
    second = submit(slurm, task, tmp_path / "second", SFT, nodes=2, rollout_nodes=1)
    assert second.wait(DEADLINE_S) == "FAILED", second.everything()
    said = "preflight: all nodes are bad; node1: node1 knows no address for node2: set NODE_DOMAIN"
    assert said in second.last_line()
    assert not (tmp_path / "second" / "run").exists()


@pytest.mark.slow
def test_a_request_to_stop_before_the_roles_start_is_one_and_two_in_a_row_are_enough(slurm, task, tmp_path):
    with a_program_that_waits(tmp_path) as path:
        job = submit(slurm, task, tmp_path, SFT, nodes=2, rollout_nodes=0, PATH=path)
        for attempt in range(2):
            job.wait_until((tmp_path / "asked").exists, "a preflight", DEADLINE_S)
            slurm.call("scancel", "--batch", "--signal=USR1", job.number)
            if attempt == 0:
                job.wait_until(lambda: "attempt 0 is requeued" in job.output(), "a new attempt", DEADLINE_S)
                (tmp_path / "asked").unlink()
                job.start_again_now()
        assert job.wait(DEADLINE_S) == "FAILED", job.everything()
    assert "the time limit is near, or the job is preempted: nothing has started yet" in job.output()
    assert "dypo: error: two attempts in a row ended before they made a step" in job.last_line()


@pytest.mark.slow
def test_nodes_with_addresses_of_their_own_train_serve_and_refit(slurm, task, tmp_path):
    script = tmp_path / "dypo_70b.sh"  # sbatch refuses --mem-per-gpu beside --mem; docs/slurm.md says so
    script.write_text((REPOSITORY / "slurm" / "dypo_70b.sh").read_text().replace("#SBATCH --mem=0\n", ""))
    settings = {"script": str(script), "options": ["--mem-per-gpu=1000"]}
    overrides = ["run.steps=20", "refit.transport=p2p"]
    job = submit(slurm, task, tmp_path, *overrides, nodes=3, rollout_nodes=1, **settings)
    job.wait_until(lambda: 2 in steps_of(tmp_path), "step 2", DEADLINE_S)
    ranks = [rank_process(job, rank) for rank in range(4)]
    assert {address for rank in ranks for address in far_ends(rank)} >= {"10.78.0.1", "10.78.0.2", "10.78.0.3"}
    for rank in ranks:
        caches = Path(rank.environ()["TRITON_CACHE_DIR"]).parent
        assert caches == slurm.root / "slurm" / "local" / f"dypo-cache-{os.getuid()}"
        assert not caches.exists(), "on this host, which does not see the disk of a node"
        assert (Path(f"/proc/{rank.pid}/root") / caches.relative_to("/")).is_dir()
        soft, hard = rank.rlimit(resource.RLIMIT_NOFILE)
        assert soft == hard or soft >= 65536
        soft, hard = rank.rlimit(resource.RLIMIT_MEMLOCK)
        assert soft == hard
    attach = str(REPOSITORY / "slurm" / "attach.sh")
    assert slurm.call(attach, job.number).splitlines() == ["node1 trainer", "node2 trainer", "node3 rollout"]
    assert slurm.call(attach, job.number, "node2", "hostname") == "node2"
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert sorted(steps_of(tmp_path)) == list(range(1, 21))
    assert all(record["refit/fenced"] == 0 for record in steps_of(tmp_path).values())
    assert "error" not in job.output(), "srun says nothing alarming of roles that end in order"
    assert job.last_line() == f"dypo: done; logs in {job.logs}/{job.number}.0"


def far_ends(process: psutil.Process) -> set[str]:
    """Return the addresses of other hosts with which a process is connected."""
    path = Path(f"/proc/{process.pid}/net/tcp")  # of the process's own network
    words = [line.split() for line in path.read_text().splitlines()[1:]]
    addresses = [bytes.fromhex(fields[2].partition(":")[0])[::-1] for fields in words if fields[3] == "01"]
    return {".".join(map(str, address)) for address in addresses}


HOST_FILES = {
    "own names are loopback addresses": lambda node, whole: whole.replace(
        f"10.78.0.{node[-1]} {node}", f"127.0.1.1 {node}"
    ),
    "names are IPv6 addresses": lambda node, whole: whole.replace("10.78.0.", "fd78::"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOST_FILES)
def test_nodes_find_each_other_if(slurm, task, tmp_path, kind):
    whole = slurm.hosts("switch").read_text()
    for node in NODES:
        slurm.hosts(node).write_text(HOST_FILES[kind](node, whole))
    job = submit(slurm, task, tmp_path, "run.steps=2", "refit.transport=p2p", nodes=3, rollout_nodes=1)
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert sorted(steps_of(tmp_path)) == [1, 2]


@pytest.mark.slow
def test_a_preemption_with_a_grace_time_saves_and_requeues(slurm, task, tmp_path):
    """The site does not set preempt_send_user_signal: Slurm sends SIGTERM to every process of each step."""
    overrides = ["run.steps=100000", "checkpoint.every=0"]
    settings = {"options": ["--partition=scavenge"], "ROUTER": "1"}
    job = submit(slurm, task, tmp_path, *overrides, nodes=3, rollout_nodes=1, **settings)
    job.wait_until(lambda: 2 in steps_of(tmp_path), "step 2", DEADLINE_S)
    slurm.call("sbatch", "--partition=urgent", "--nodes=3", "--output=/dev/null", "--wrap=true")
    job.start_again_now()
    done = max(steps_of(tmp_path))
    assert "attempt 0 is requeued to go on from the last checkpoint" in job.output()
    assert "error" not in job.output().replace("slurmstepd-node1: error: *** JOB", "")
    job.wait_until(lambda: done + 1 in steps_of(tmp_path), "a step of the next attempt", DEADLINE_S)
    slurm.call("scancel", job.number)
    log = (job.logs / f"{job.number}.1" / "trainer.node1.log").read_text()
    assert f"{done} of 100000 steps are done" in log


@pytest.mark.slow
def test_a_taken_port_of_the_first_node_costs_one_start_and_ports_of_others_do_not_count(slurm, task, tmp_path):
    job = submit(slurm, task, tmp_path, SFT, "run.steps=2", nodes=2, rollout_nodes=0, options=["--hold"])
    port = 10000 + int(job.number) * 7 % 250 * 80
    with listener(slurm, "node1", port), listener(slurm, "node2", port + 4):  # the second start has port + 4
        slurm.call("scontrol", "release", job.number)
        assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert "torchrun could not bring the ranks together: OSError: [Errno 98] Address already in use" in job.output()
    assert job.output().count("the trainer starts again in place") == 1
    assert job.show()["Restarts"] == "0"


@pytest.mark.slow
def test_the_last_line_names_the_cause_on_the_node_where_it_began(slurm, task, tmp_path):
    local = slurm.root / "slurm" / "local" / "train.jsonl"
    subprocess.run([*slurm.enter("node1"), "cp", task.parent / "train.jsonl", local], check=True)
    alone = submit(slurm, task, tmp_path / "alone", SFT, f"data.prompts=[{local}]", nodes=2, rollout_nodes=0)
    assert alone.wait(DEADLINE_S) == "FAILED", alone.everything()
    assert alone.last_line().startswith("dypo: error: trainer on node2 ended with status 65")
    assert f"data.prompts='{local}': no such file" in alone.last_line()

    slurm.wait_until_idle()
    crash = submit(slurm, task, tmp_path / "crash", SFT, "run.steps=100000", nodes=2, rollout_nodes=0)
    crash.wait_until(lambda: 2 in steps_of(tmp_path / "crash"), "step 2", DEADLINE_S)
    rank_process(crash, 3).send_signal(11)
    assert crash.wait(DEADLINE_S) == "FAILED", crash.everything()
    assert crash.last_line().startswith("dypo: error: trainer on node2 ended with status 70")
    assert "bug: rank 3 crashed (SIGSEGV)" in crash.last_line()

    slurm.wait_until_idle()
    flags = ["rollout.servers.extra_args=[--no-such-flag]", "rollout.servers.max_restarts=0"]
    server = submit(slurm, task, tmp_path / "server", *flags, nodes=3, rollout_nodes=2)
    assert server.wait(DEADLINE_S) == "FAILED", server.everything()
    assert server.last_line().startswith("dypo: error: rollout on node")
    assert "unrecognized arguments: --no-such-flag" in server.last_line()
