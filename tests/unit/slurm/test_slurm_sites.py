"""What differs between clusters: names of nodes, limits, memory options, GPUs of a node, caches, the login node."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.folders import STRANGE_FOLDERS, make_strange_folder
from tests.support.slurm_job import REPOSITORY, Job

NODE = REPOSITORY / "slurm" / "node.sh"


@pytest.mark.parametrize(("domain", "name"), [("", "node3"), ("hpc.example.org", "node3.hpc.example.org")])
def test_addresses_have_the_domain_of_the_nodes(job: Job, domain: str, name: str) -> None:
    script = "ROLLOUT=(node3) NODES_PER_SERVER=1 SERVERS_PER_NODE=1 DYPO_PORT=10000; server_urls"
    assert job(script, NODE_DOMAIN=domain) == (0, f"http://{name}:10020\n")


@pytest.mark.parametrize(("soft", "hard", "after"), [(100, 400, 400), (100, 900, 600), (700, 900, 700)])
def test_limits_are_raised_and_never_lowered(job: Job, soft: int, hard: int, after: int) -> None:
    script = f"ulimit -S -n {soft}; ulimit -H -n {hard}; raise_limit -n 600; ulimit -S -n"
    assert job(script) == (0, f"{after}\n")


def test_an_unlimited_limit_is_asked_for_and_the_hard_one_taken(job: Job) -> None:
    script = "ulimit -S -l 64; ulimit -H -l 128; raise_limit -l unlimited; ulimit -S -l"
    assert job(script) == (0, "128\n")


@pytest.mark.parametrize("given", ["SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU"])
def test_memory_by_cpu_or_gpu_takes_the_place_of_the_scripts_memory_by_node(job: Job, given: str) -> None:
    script = 'read_settings; echo "${SLURM_MEM_PER_NODE:-none}"'
    settings = {"CONFIG": "examples/llama3_70b/config.yaml", "IMAGE": "registry#dypo:1", "SLURM_MEM_PER_NODE": "0"}
    assert job(script, **settings) == (0, "0\n")
    assert job(script, **settings, **{given: "1000"}) == (0, "none\n")


def test_fewer_cpus_than_ranks_are_told(job: Job) -> None:
    settings = {"CONFIG": "examples/llama3_70b/config.yaml", "IMAGE": "registry#dypo:1", "SLURM_CPUS_ON_NODE": "1"}
    assert "warning: 1 CPUs for 8 ranks on a node" in job("read_settings", **settings)[1]


def test_the_folder_of_logs_has_its_full_name(job: Job) -> None:
    settings = {"CONFIG": "examples/llama3_70b/config.yaml", "IMAGE": "registry#dypo:1", "LOG_ROOT": "logs/../here"}
    done = job('cd /; read_settings; echo "$LOG_ROOT"', **settings)
    assert done == (0, "/here\n")


def test_a_dry_run_without_the_packages_says_which_python_it_used(job: Job) -> None:
    said = "ModuleNotFoundError: No module named 'typer'"
    assert job(f'explain_missing_module <<<"{said}"')[1] == ""
    assert "with the Python of this host: set VENV" in job(f'explain_missing_module <<<"{said}"', DRY_RUN="1")[1]
    assert job('explain_missing_module <<<"a key"', DRY_RUN="1")[1] == ""


@pytest.mark.parametrize(
    ("gpus", "answer"), [(1, "1 of 2 GPUs answer"), (2, "node1 is well"), (3, "node1 is well")], ids=str
)
def test_a_node_with_more_gpus_than_are_used_is_well(job: Job, tmp_path: Path, gpus: int, answer: str) -> None:
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\n" + "".join(f'echo "{index}, 0, No, No"\n' for index in range(gpus)))
    driver.chmod(0o755)
    (job.logs / "canary").write_text("12\n")
    settings = {"DYPO_LOGS": str(job.logs), "SLURM_JOB_ID": "12", "SLURMD_NODENAME": "node1", "GPUS_PER_NODE": "2"}
    settings |= {"PREFLIGHT": "quick", "DYPO_TRAIN_NODES": "node1", "DYPO_ROLLOUT_NODES": ""}
    environment = {**os.environ, **settings, "PATH": f"{driver.parent}:{os.environ['PATH']}"}
    done = subprocess.run([NODE, "preflight"], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == answer + "\n"
    assert ("has 3 GPUs, GPUS_PER_NODE=2 are used" in done.stderr) is (gpus == 3)
    mark = job.logs / ("bad" if gpus < 2 else "well") / "node1"
    assert mark.is_file()


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("exit 0", "node1 is well"),
        ("echo device 1 computes another product", "device 1 computes another product"),
        ("exit 3", "the check of its GPUs ended with status 3; see "),
    ],
    ids=["well", "sick", "failed"],
)
def test_a_node_computes_before_it_is_well(job: Job, tmp_path: Path, program: str, answer: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("nvidia-smi", "echo '0, 0, No, No'"), ("python", f'echo "$@" >{tmp_path}/asked; {program}')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (job.logs / "canary").write_text("12\n")
    settings = {"DYPO_LOGS": str(job.logs), "SLURM_JOB_ID": "12", "SLURMD_NODENAME": "node1", "GPUS_PER_NODE": "1"}
    settings |= {"DYPO_TRAIN_NODES": "node1", "DYPO_ROLLOUT_NODES": ""}
    settings |= {"PREFLIGHT": "full", "DYPO_PYTHON": str(folder / "python")}
    environment = {**os.environ, **settings, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([NODE, "preflight"], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(answer)
    assert (tmp_path / "asked").read_text() == "-m megatron_dypo.launch.preflight --devices 1\n"
    mark = job.logs / ("well" if answer.endswith("well") else "bad") / "node1"
    assert mark.is_file()


def test_compilers_of_kernels_write_to_a_private_folder_of_the_node(job: Job, tmp_path: Path) -> None:
    (job.logs / "canary").write_text("12\n")
    settings = {"DYPO_LOGS": str(job.logs), "SLURM_JOB_ID": "12", "SLURMD_NODENAME": "node1", "GPUS_PER_NODE": "2"}
    settings |= {"SLURM_TMPDIR": str(tmp_path), "DYPO_TRAIN_NODES": "node1", "TORCHINDUCTOR_CACHE_DIR": "/mine"}
    command = [str(NODE), "trainer", "env"]
    outside = {
        name: value for name, value in os.environ.items() if not name.endswith(("_CACHE_DIR", "_WORKSPACE_BASE"))
    }
    done = subprocess.run(command, env={**outside, **settings}, capture_output=True, text=True, timeout=60, check=True)
    values = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    cache = tmp_path / f"dypo-cache-{os.getuid()}"
    assert values["TRITON_CACHE_DIR"] == f"{cache}/triton"
    assert values["FLASHINFER_WORKSPACE_BASE"] == f"{cache}/flashinfer"
    assert values["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", STRANGE_FOLDERS)
def test_compilers_of_kernels_take_no_folder_that_another_user_could_write_to(tmp_path: Path, kind: str) -> None:
    usual = tmp_path / f"dypo-cache-{os.getuid()}"
    make_strange_folder(usual, kind)
    show = 'stat -c \'%a %u\' "$(dirname "$TRITON_CACHE_DIR")"; echo $TRITON_CACHE_DIR; exit 0'
    settings = {"SLURM_TMPDIR": str(tmp_path), "SLURMD_NODENAME": "node1"}
    outside = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
    command = [str(NODE), "router", "bash", "-c", show]
    done = subprocess.run(command, env={**outside, **settings}, capture_output=True, text=True, timeout=60, check=True)
    access, used = done.stdout.splitlines()
    assert access == f"700 {os.getuid()}"
    assert Path(used).parent.parent == tmp_path
    assert Path(used).parent != usual
    assert f"{usual} is not a folder that only this user may write to" in done.stderr
    assert list(tmp_path.glob("dypo-cache-*.*")) == []  # the folder of one process ends with it
    assert not any(usual.iterdir())


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_compilers_of_kernels_keep_the_folder_of_an_earlier_job(tmp_path: Path, mode: int) -> None:
    usual = tmp_path / f"dypo-cache-{os.getuid()}"
    usual.mkdir(mode=mode)
    settings = {"SLURM_TMPDIR": str(tmp_path), "SLURMD_NODENAME": "node1", "PATH": os.environ["PATH"]}
    done = subprocess.run([NODE, "router", "env"], env=settings, capture_output=True, text=True, timeout=60, check=True)
    assert f"TRITON_CACHE_DIR={usual}/triton\n" in done.stdout
    assert done.stderr == ""
    assert usual.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("role", "grows"), [("trainer", True), ("rollout", False)])
def test_only_the_trainers_memory_is_in_segments_that_grow(tmp_path: Path, role: str, grows: bool) -> None:
    for folder in ("ends", "ended"):
        (tmp_path / folder).mkdir()
    show = tmp_path / "show"
    show.write_text("#!/bin/sh\nenv\n")
    show.chmod(0o755)
    lists = {"DYPO_TRAIN_NODES": "node1", "DYPO_ROLLOUT_NODES": "node1", "SLURMD_NODENAME": "node1"}
    sizes = {"NODES_PER_SERVER": "1", "SERVERS_PER_NODE": "1", "DYPO_PORT": "10000", "DYPO_LOGS": str(tmp_path)}
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), **lists, **sizes}
    done = subprocess.run(["bash", NODE, role, show], env=environment, capture_output=True, text=True, check=True)
    assert ("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in done.stdout) == grows


LOOKUPS = {
    "node1=10.0.0.1 node2=10.0.0.2 node3=fd78::3": "node1 is well",
    "node1=127.0.1.1 node2=10.0.0.2 node3=127.0.0.3,10.0.0.3": "node1 is well",
    "node1=127.0.0.1 node2=127.0.0.1 node3=127.0.0.1": "node1 is well",
    "node1=127.0.1.1 node2=127.0.0.1 node3=10.0.0.3": "node1 looks up node2 as 127.0.0.1, which is node1 itself",
    "node1=10.0.0.1 node2=10.0.0.2 node3=::1": "node1 looks up node3 as ::1, which is node1 itself",
    "node1=10.0.0.1 node2=10.0.0.2": "node1 knows no address for node3: set NODE_DOMAIN",
}


@pytest.mark.parametrize("hosts", LOOKUPS)
def test_a_node_that_would_not_find_another_by_its_name_is_bad(job: Job, tmp_path: Path, hosts: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    lines = "".join(f"{n}) echo {a} | tr , '\\n' ;;\n" for n, a in (item.split("=") for item in hosts.split()))
    for name, text in (
        ("getent", f"case $2 in\n{lines}*) exit 2 ;; esac"),
        ("sleep", "exit 0"),
        ("nvidia-smi", "exit 1"),
    ):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho '0, 0, No, No'\n")
    (job.logs / "canary").write_text("12\n")
    settings = {"DYPO_LOGS": str(job.logs), "SLURM_JOB_ID": "12", "SLURMD_NODENAME": "node1", "GPUS_PER_NODE": "1"}
    settings |= {"DYPO_TRAIN_NODES": "node1 node2", "DYPO_ROLLOUT_NODES": "node3", "PREFLIGHT": "quick"}
    environment = {**os.environ, **settings, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([NODE, "preflight"], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(LOOKUPS[hosts])


@pytest.mark.parametrize(
    ("role", "program", "marks"),
    [
        ("trainer", "trap 'exit 75' TERM", {"stopped": ""}),
        ("trainer", ":", {"stopped": ""}),
        ("trainer", "trap 'exit 77' TERM", {}),
        ("rollout", "trap 'exit 0' TERM", {"ended/node1": "0\n"}),
        ("router", "trap 'exit 1' TERM", {}),
    ],
    ids=["a trainer", "a trainer that has just started", "a trainer that is lost", "servers", "a router"],
)
def test_a_role_that_slurm_tells_to_end_leaves_its_marks(
    job: Job, tmp_path: Path, role: str, program: str, marks: dict[str, str]
) -> None:
    """Slurm sends SIGTERM to every process of a step."""
    settings = {
        "DYPO_LOGS": str(job.logs),
        "SLURMD_NODENAME": "node1",
        "TMPDIR": str(tmp_path),
        "NODES_PER_SERVER": "1",
    }
    settings |= {"DYPO_TRAIN_NODES": "node1", "DYPO_ROLLOUT_NODES": "node1", "SERVERS_PER_NODE": "1", "DYPO_PORT": "1"}
    script = f"{program}; echo started; while :; do sleep 0.1; done"
    with subprocess.Popen(
        [NODE, role, "bash", "-c", script],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        os.killpg(process.pid, signal.SIGTERM)
        status = process.wait(60)
    assert status == (77 if "77" in program else 0)
    found = {str(path.relative_to(job.logs)): path.read_text() for path in job.logs.rglob("*") if path.is_file()}
    assert found == marks


@pytest.mark.parametrize(("steady_s", "starts"), [("1800", 4), ("0", 6)])
def test_a_router_is_started_again_three_times_in_a_row(tmp_path: Path, steady_s: str, starts: int) -> None:
    """It ends with 9 up to its sixth start, which ends with 0."""
    count = tmp_path / "starts"
    script = f"echo >>{count}; [ $(wc -l <{count}) -ge 6 ] || exit 9"
    settings = {"TMPDIR": str(tmp_path), "SLURMD_NODENAME": "node1", "STEADY_S": steady_s}
    done = subprocess.run(
        [NODE, "router", "bash", "-c", script], env={**os.environ, **settings}, timeout=60, check=False
    )
    assert len(count.read_text().splitlines()) == starts
    assert done.returncode == (0 if starts == 6 else 9)
