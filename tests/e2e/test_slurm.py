"""`sbatch slurm/dypo_*.sh` on a real Slurm of five virtual nodes, with real ranks and real SGLang on the CPU."""

from __future__ import annotations

import stat
import subprocess
import sys
import time

import psutil
import pytest

from megatron_dypo.metrics.attempts import read_attempts
from megatron_dypo.rollout.server.probe import http_status
from tests.slurm_host.host import REPOSITORY, require, start_slurm
from tests.support.e2e.parity_task import write_task
from tests.support.hf_models import make_hf_model
from tests.support.slurm_run import DEADLINE_S, job_process, kill_server, rank_process, servers, steps_of, submit


@pytest.fixture(scope="module")
def five_nodes():
    host = start_slurm(nodes=5)
    yield host
    host.stop()


@pytest.fixture
def slurm(five_nodes):
    """Wait until all nodes are idle, so that a job gets the first ones."""
    five_nodes.wait_until_idle()
    return five_nodes


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Write the config of a tiny task at TP 2; each test gives its runs their own folders."""
    servers = {"servers": {"start_deadline_s": DEADLINE_S}}
    return write_task(tmp_path_factory.mktemp("task"), parallel={"tensor": 2}, rollout=servers)


def run_without_a_fault(slurm, task, folder, *overrides):
    """Train on two nodes, to compare a run with it that something happens to."""
    whole = submit(slurm, task, folder, *overrides, nodes=2, rollout_nodes=0)
    assert whole.wait(DEADLINE_S) == "COMPLETED", whole.everything()


def starts_of(folder):
    return [line["time"] for line in read_attempts(folder / "run") if line["event"] == "start"]


def num_starts(folder):
    return len(starts_of(folder))


def step_since_the_last_start(folder):
    """Return the time of the first step that the last start of a run made; None if it made none yet."""
    times = [record["time"] for record in steps_of(folder).values()]
    return min((moment for moment in times if starts_of(folder) and moment > starts_of(folder)[-1]), default=None)


def assert_same_steps(whole, parts):
    """Check that a run that was interrupted learnt bit for bit the same in every step as an uninterrupted run."""
    expected, resumed = steps_of(whole), steps_of(parts)
    assert expected.keys() == resumed.keys()
    for step in expected:
        for name in ("train/loss", "train/grad_norm", "train/lr", "train/sft_nll"):
            assert expected[step][name] == resumed[step][name], (step, name)


def names(folder):
    return sorted(path.name for path in folder.glob("*.log"))


MISTAKES = [
    ({}, ["data.prompts=[/absent.jsonl]"], "data.prompts='/absent.jsonl': no such file"),
    (
        {},
        ["parallel.context=3"],
        "parallel.num_processes=4: must be a multiple of tensor × pipeline × context = 2 × 1 × 3 = 6",
    ),
    ({}, ["rollout.servers.tensor_parallel=3"], "a server takes 2 nodes of 2 GPUs"),
    ({"CONFIG": "absent.yaml"}, [], "CONFIG=absent.yaml: no such file"),
    ({"VENV": "/absent"}, [], "VENV=/absent: no bin/python in it"),
    ({"VENV": ""}, [], "set IMAGE (a container image"),
    ({"IMAGE": "/absent.sqsh"}, [], "IMAGE=/absent.sqsh: no such file"),
    ({"ROLLOUT_NODES": "3"}, [], "ROLLOUT_NODES=3 of 3 nodes leaves none to train"),
    ({"DYPO_HOME": "/absent"}, [], "DYPO_HOME=/absent has no slurm/common.sh"),
]


@pytest.mark.slow
def test_a_mistake_ends_a_job_before_anything_starts_with_one_line_that_says_what_to_fix(slurm, task, tmp_path):
    jobs = []
    for index, (environment, overrides, _) in enumerate(MISTAKES):
        folder = tmp_path / str(index)
        jobs.append(submit(slurm, task, folder, *overrides, **{"nodes": 3, "rollout_nodes": 1, **environment}))
    for job, (_, _, message) in zip(jobs, MISTAKES, strict=True):
        assert job.wait(DEADLINE_S) == "FAILED", job.everything()
        assert job.last_line().startswith("dypo: error: ")
        assert message in job.last_line()
        assert not (job.output_file.parent / "run").exists()


def test_a_70b_job_trains_a_tiny_model_on_two_trainer_nodes_and_a_rollout_node(slurm, task, tmp_path):
    job = submit(slurm, task, tmp_path, "run.steps=3", nodes=3, rollout_nodes=1)
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert job.last_line() == f"dypo: done; logs in {job.logs}/{job.number}.0"
    assert sorted(steps_of(tmp_path)) == [1, 2, 3]
    assert all(record["rollout/num_prompts"] > 0 for record in steps_of(tmp_path).values())
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
    preflights = [f"preflight.node{number}.log" for number in (1, 2, 3)]
    assert names(job.logs / "latest") == [*preflights, "rollout.node3.log", "trainer.node1.log", "trainer.node2.log"]
    assert names(job.logs / "latest" / "rollout.node3") == ["sglang_0.log"]
    ranks = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert ranks == [f"rank_{rank:05d}.log" for rank in range(4)]
    assert stat.S_IMODE((job.logs / f"{job.number}.0").stat().st_mode) == 0o700


@pytest.mark.slow
def test_a_job_with_a_router_uses_all_servers_shows_nobody_their_key_and_outlives_it(slurm, task, tmp_path):
    job = submit(slurm, task, tmp_path, "run.steps=6", nodes=3, rollout_nodes=2, ROUTER="1")
    job.wait_until(lambda: 2 in steps_of(tmp_path), "step 2", DEADLINE_S)
    router = job_process(job, "megatron_dypo.cli", "route")
    key = router.environ()["DYPO_SGLANG_API_KEY"]
    url = f"http://node2:{int(router.environ()['DYPO_PORT']) + 1}"
    assert [http_status(f"{url}/workers", known) for known in (key, None)] == [200, 401]
    for process in psutil.process_iter(["cmdline"]):
        assert key not in " ".join(process.info["cmdline"] or []), process
    router.kill()
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert sorted(steps_of(tmp_path)) == list(range(1, 7))
    assert "starting it again" in (job.logs / "latest" / "router.node2.log").read_text()
    for node in ("node2", "node3"):
        assert "Prefill batch" in (job.logs / "latest" / f"rollout.{node}" / "sglang_0.log").read_text()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_colocated_nodes_train_on_their_first_gpu_and_serve_on_the_other(slurm, task, tmp_path):
    job = submit(slurm, task, tmp_path, "run.steps=3", nodes=2, rollout_nodes=2, COLOCATED="1")
    job.wait_until(lambda: 1 in steps_of(tmp_path), "step 1", DEADLINE_S)
    serving = job_process(job, "megatron_dypo.cli", "serve")
    training = job_process(job, "-m", "megatron_dypo.launch.torchrun")
    assert "rollout.servers.base_gpu=1" in serving.cmdline()
    assert "--nproc-per-node=1" in training.cmdline()
    assert [process.environ()["CUDA_VISIBLE_DEVICES"] for process in (serving, training)] == ["0,1", "0,1"]
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert sorted(steps_of(tmp_path)) == [1, 2, 3]
    roles = (job.logs / "latest" / "roles").read_text().split("\n")
    assert roles == ["node1 trainer", "node2 trainer", "node1 rollout", "node2 rollout", ""]
    for node in ("node1", "node2"):
        assert "Prefill batch" in (job.logs / "latest" / f"rollout.{node}" / "sglang_0.log").read_text()


@pytest.mark.slow
def test_an_engine_that_needs_more_gpus_than_a_node_has_spans_two(slurm, task, tmp_path):
    # On a CPU SGLang enlarges some widths to a multiple of 32 on each rank; this model's widths are such multiples.
    model = make_hf_model("qwen3", tmp_path / "model", intermediate_size=128)
    sizes = [f"model.hf_path={model}", "parallel.tensor=1", "rollout.servers.tensor_parallel=2"]
    sizes += ["run.steps=3", "refit.transport=p2p"]  # the transport between real hosts
    one_gpu = {"options": ["--gpus-per-node=1"], "GPUS_PER_NODE": "1"}
    job = submit(slurm, task, tmp_path, *sizes, nodes=3, rollout_nodes=2, **one_gpu)
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert sorted(steps_of(tmp_path)) == [1, 2, 3]
    logs = [(job.logs / "latest" / f"rollout.node{node}" / "sglang_0.log").read_text() for node in (2, 3)]
    assert " TP0] Prefill batch" in logs[0]
    assert " TP1] Load weight end" in logs[1]
    assert " TP1]" not in logs[0]


@pytest.mark.slow
def test_a_job_that_reaches_its_time_limit_goes_on_as_if_it_had_not(slurm, task, tmp_path):
    # Slurm checks limits every half minute: steps must be long, so that some remain at that time.
    size = ["rollout.prompts_per_round=768", "batching.prompts_per_update=768", "run.steps=40"]
    overrides = ["objective.name=sft", "checkpoint.every=0", *size]
    run_without_a_fault(slurm, task, tmp_path / "whole", *overrides)

    folder = tmp_path / "parts"
    job = submit(slurm, task, folder, *overrides, nodes=2, rollout_nodes=0)
    job.wait_until(lambda: 2 in steps_of(folder), "step 2", DEADLINE_S)
    slurm.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
    job.start_again_now(TimeLimit="20")
    done = max(steps_of(folder))
    assert done < 40
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert "attempt 0 is requeued to go on from the last checkpoint" in job.output()
    first, second = ((job.logs / f"{job.number}.{n}" / "trainer.node1.log").read_text() for n in (0, 1))
    assert f"{done} of 40 steps are done" in first.split("stopped on request")[-1]
    assert f"{done} of 40 steps are done" in second
    assert_same_steps(tmp_path / "whole", folder)


@pytest.mark.slow
def test_a_job_that_loses_a_trainer_node_goes_on_with_another_as_if_it_had_not(slurm, task, tmp_path):
    overrides = ["objective.name=sft", "checkpoint.every=2", "run.steps=24"]
    run_without_a_fault(slurm, task, tmp_path / "whole", *overrides)

    folder = tmp_path / "parts"
    job = submit(slurm, task, folder, *overrides, nodes=2, rollout_nodes=0)
    job.wait_until(lambda: 3 in steps_of(folder), "step 3", DEADLINE_S)
    slurm.call("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    try:
        job.start_again_now()
        assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    finally:
        slurm.call("scontrol", "update", "NodeName=node2", "State=RESUME")
    roles = [(job.logs / f"{job.number}.{attempt}" / "roles").read_text() for attempt in (0, 1)]
    assert "node2 trainer" in roles[0]
    assert "node2" not in roles[1]
    first = roles[1].split()[0]
    assert "of 24 steps are done" in (job.logs / f"{job.number}.1" / f"trainer.{first}.log").read_text()
    assert_same_steps(tmp_path / "whole", folder)


@pytest.mark.slow
def test_a_trainer_that_loses_a_rank_goes_on_in_place_as_if_it_had_not(slurm, task, tmp_path):
    overrides = ["objective.name=sft", "checkpoint.every=2", "run.steps=24"]
    run_without_a_fault(slurm, task, tmp_path / "whole", *overrides)

    folder = tmp_path / "parts"
    job = submit(slurm, task, folder, *overrides, nodes=2, rollout_nodes=0)
    job.wait_until(lambda: 3 in steps_of(folder), "step 3", DEADLINE_S)
    rank_process(job, 3).kill()
    job.wait_until(lambda: 9 in steps_of(folder), "step 9", DEADLINE_S)
    job_process(job, "-m", "megatron_dypo.launch.torchrun").kill()  # now a launcher, which says nothing
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert job.output().count("dypo: the trainer starts again in place") == 2, job.everything()
    assert "rank 3 was killed by SIGKILL" in job.output()
    assert job.show()["Restarts"] == "0"
    assert_same_steps(tmp_path / "whole", folder)


@pytest.mark.slow
def test_servers_stay_up_while_the_trainer_starts_again(slurm, task, tmp_path):
    job = submit(slurm, task, tmp_path, "run.steps=8", nodes=3, rollout_nodes=1)
    job.wait_until(lambda: 2 in steps_of(tmp_path), "step 2", DEADLINE_S)
    (before,) = servers(job, "node3")
    rank_process(job, 0).kill()
    job.wait_until(lambda: "starts again in place" in job.output(), "a new start", DEADLINE_S)
    job.wait_until(lambda: 5 in steps_of(tmp_path), "step 5", DEADLINE_S)
    assert servers(job, "node3") == [before], "the same process"
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert sorted(steps_of(tmp_path)) == list(range(1, 9))
    assert "starting it again" not in (job.logs / "latest" / "rollout.node3.log").read_text()


@pytest.mark.slow
def test_a_start_in_place_takes_at_most_half_of_the_time_of_a_requeue(slurm, task, tmp_path):
    """The time from a fault to the next step, by turns in one job: the trainer is killed, the job is requeued.

    Slurm holds a requeued job back for two minutes, and the servers start anew.
    """
    job = submit(slurm, task, tmp_path, "run.steps=100000", nodes=3, rollout_nodes=1)
    faults = {
        "in place": lambda: rank_process(job, 0).kill(),
        "requeue": lambda: slurm.call("scontrol", "requeue", job.number),
    }
    took: dict[str, list[float]] = {name: [] for name in faults}
    for _ in range(2):
        for name, fault in faults.items():
            job.wait_until(lambda: step_since_the_last_start(tmp_path), "a step", DEADLINE_S)
            starts, began = num_starts(tmp_path), time.time()
            fault()
            job.wait_until(lambda: num_starts(tmp_path) > starts, "a new start", DEADLINE_S)  # noqa: B023
            job.wait_until(lambda: step_since_the_last_start(tmp_path), "a step", DEADLINE_S)
            took[name].append(step_since_the_last_start(tmp_path) - began)
    slurm.call("scancel", job.number)
    print(f"seconds until the next step: {took}")
    assert sum(took["in place"]) <= 0.5 * sum(took["requeue"]), took


@pytest.mark.slow
def test_a_spare_node_trains_in_place_of_one_that_is_lost(slurm, task, tmp_path):
    overrides = ["objective.name=sft", "checkpoint.every=2", "run.steps=24"]
    run_without_a_fault(slurm, task, tmp_path / "whole", *overrides)

    folder, spare = tmp_path / "parts", {"options": ["--no-kill"], "SPARE_NODES": "1"}
    job = submit(slurm, task, folder, *overrides, nodes=3, rollout_nodes=0, **spare)
    job.wait_until(lambda: 3 in steps_of(folder), "step 3", DEADLINE_S)
    slurm.call("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    try:
        assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    finally:
        slurm.call("scontrol", "update", "NodeName=node2", "State=RESUME")
    assert "dypo: node2 is lost; node3 trains in its place" in job.output(), job.everything()
    assert job.show()["Restarts"] == "0"
    assert_same_steps(tmp_path / "whole", folder)


@pytest.mark.slow
def test_a_rollout_server_that_is_killed_comes_back_and_the_run_goes_on(slurm, task, tmp_path):
    job = submit(slurm, task, tmp_path, "run.steps=8", nodes=3, rollout_nodes=1)
    job.wait_until(lambda: 1 in steps_of(tmp_path), "step 1", DEADLINE_S)
    kill_server(job, "node3")
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert sorted(steps_of(tmp_path)) == list(range(1, 9))
    assert "starting it again (1 of 3 times)" in (job.logs / "latest" / "rollout.node3.log").read_text()
    assert "answers again and rejoins" in (job.logs / "latest" / "trainer.node1.log").read_text()


@pytest.mark.slow
def test_servers_that_keep_dying_requeue_a_job_that_got_further_and_end_one_that_did_not(slurm, task, tmp_path):
    limits = ["run.steps=500", "checkpoint.every=0", "rollout.servers.max_restarts=0"]
    job = submit(slurm, task, tmp_path, *limits, nodes=4, rollout_nodes=2, GRACE_S="240")
    job.wait_until(lambda: 1 in steps_of(tmp_path), "step 1", DEADLINE_S)
    kill_server(job, "node4")
    job.wait_until(lambda: "attempt 0 is requeued" in job.output(), "the requeue", DEADLINE_S)
    assert "dypo: rollout on node4 ended with status 69" in job.output()
    assert "stopped on request" in (job.logs / "latest" / "trainer.node1.log").read_text()
    assert (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").is_file()
    again = job.logs / f"{job.number}.1" / "rollout.node4.log"
    job.wait_until(lambda: again.is_file() and "http://node4:" in again.read_text(), "the next attempt", DEADLINE_S)
    job.wait_until(lambda: bool(servers(job, "node4")), "its server", DEADLINE_S)
    kill_server(job, "node4")
    assert job.wait(DEADLINE_S) == "FAILED", job.everything()
    assert job.last_line().startswith("dypo: error: rollout on node4 ended with status 69")
    assert job.last_line().endswith("submit again to resume")


@pytest.mark.slow
def test_a_node_with_a_sick_gpu_is_named_left_out_and_replaced(slurm, task, tmp_path):
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text(
        '#!/bin/sh\nremapped=No; [ "$(hostname)" != node1 ] || remapped=Yes\n'
        'echo "0, 0, No, No"; echo "1, 0, $remapped, No"\n'
    )
    driver.chmod(0o755)
    path = f"{driver.parent}:{sys.prefix}/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    overrides = ["objective.name=sft", "run.steps=1"]
    job = submit(slurm, task, tmp_path, *overrides, nodes=2, rollout_nodes=0, PATH=path)
    job.start_again_now()
    assert "dypo: bad node node1: GPU 1 has memory errors: 1, 0, Yes, No" in job.output()
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert job.show()["ExcNodeList"] == "node1"
    assert "node1 GPU 1 has memory errors" in (tmp_path / "logs" / "bad_nodes.txt").read_text()


@pytest.fixture(scope="module")
def slurm_with_containers(tmp_path_factory):
    """Start a Slurm whose srun accepts pyxis' flags and starts no container."""
    folder = tmp_path_factory.mktemp("containers")
    plugin, source = folder / "pyxis.so", REPOSITORY / "tests" / "slurm_host" / "noop_pyxis.c"
    build = subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", plugin, source], capture_output=True, text=True, check=False
    )
    require(build.returncode == 0, f"needs gcc and libslurm-dev: {build.stderr}")
    host = start_slurm(nodes=2, spank=plugin)
    yield host
    host.stop()


@pytest.mark.slow
def test_a_job_in_containers_runs_every_step_with_the_image(slurm_with_containers, task, tmp_path):
    settings = {"VENV": "", "IMAGE": "registry#dypo:1", "PATH": f"{sys.prefix}/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    overrides = ["objective.name=sft", "run.steps=1"]
    job = submit(slurm_with_containers, task, tmp_path, *overrides, nodes=2, rollout_nodes=0, **settings)
    assert job.wait(DEADLINE_S) == "COMPLETED", job.everything()
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()
