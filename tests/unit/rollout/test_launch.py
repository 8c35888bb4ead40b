"""The command line, the environment and the port of a server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dypo.config.rollout import ServersConfig
from megatron_dypo.parallel import interfaces
from megatron_dypo.rollout.server import command as command_module
from megatron_dypo.rollout.server.command import (
    WEIGHT_LOADER,
    lease_port,
    lease_spread_ports,
    link_package,
    server_command,
    server_environment,
    store_environment,
)

PACKAGE = Path("/run/python_path")


def command(
    device: str, index: int = 0, dtype: str = "float32", spread_port: int | None = None, **fields: Any
) -> list[str]:
    return server_command(
        ServersConfig(**fields),
        index=index,
        port=31234,
        model_path=Path("/models/m"),
        dtype=dtype,
        seed=10,
        device=device,
        key_file=Path("/run/key.yaml"),
        spread_port=spread_port,
    )


def value(arguments: list[str], flag: str) -> str:
    assert arguments.count(flag) == 1
    return arguments[arguments.index(flag) + 1]


def test_on_a_cpu_the_launcher_runs_by_path_under_the_servers_interpreter() -> None:
    arguments = command("cpu", python="/other/bin/python")
    assert arguments[0] == "/other/bin/python"
    assert Path(arguments[1]).name == "sglang_cpu.py"
    assert value(arguments, "--max-total-tokens") == "20000"
    assert {"--sleep-on-idle", "--skip-server-warmup"} <= set(arguments)


def test_on_an_accelerator_stock_sglang_runs_and_servers_share_out_the_gpus() -> None:
    arguments = command("gpu", index=2, tensor_parallel=4, base_gpu=8, mem_fraction=0.7, dtype="bfloat16")
    assert arguments[0] == sys.executable
    assert Path(arguments[1]).name == "sglang_keyed.py"
    assert value(arguments, "--base-gpu-id") == "16"
    assert value(arguments, "--tp-size") == "4"
    assert value(arguments, "--mem-fraction-static") == "0.7"
    assert value(arguments, "--dtype") == "bfloat16"
    assert "--max-total-tokens" not in arguments


def test_each_server_has_a_seed_of_its_own() -> None:
    assert [value(command("cpu", index=i), "--random-seed") for i in range(3)] == ["10", "11", "12"]


def test_extra_arguments_come_last() -> None:
    assert command("cpu", extra_args=("--page-size", "9"))[-2:] == ["--page-size", "9"]


def test_a_type_that_the_trainer_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype='float16': must be one of float32, bfloat16"):
        command("cpu", dtype="float16")


def test_a_server_does_not_see_torchruns_variables() -> None:
    ranks = {f"{group}{name}" for group in ("", "LOCAL_", "GROUP_", "ROLE_") for name in ("RANK", "WORLD_SIZE")}
    torchrun = {*ranks, "MASTER_ADDR", "MASTER_PORT", "ROLE_NAME", "TORCHELASTIC_RUN_ID"}
    inherited = dict.fromkeys([*torchrun, "LOCAL_SCRATCH", "HOME"], "x")
    env = server_environment(inherited, 1, "cpu", [0], PACKAGE, host="127.0.0.1")
    assert not env.keys() & torchrun
    assert {"LOCAL_SCRATCH", "HOME"} <= env.keys()


def test_a_server_sees_no_key_in_its_environment() -> None:
    inherited = {"DYPO_SGLANG_API_KEY": "k", "OPENAI_API_KEY": "k", "MEGATRON_DYPO_STORE_KEY": "k", "HF_TOKEN": "t"}
    env = server_environment(inherited, 1, "cpu", [0], PACKAGE, host="127.0.0.1")
    assert "k" not in env.values()
    assert env["HF_TOKEN"] == "t"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_the_groups_of_a_server_at_a_loopback_address_stay_on_the_host(host: str) -> None:
    env = server_environment({}, 1, "gpu", [0], PACKAGE, host=host)
    assert (env["GLOO_SOCKET_IFNAME"], env["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
    chosen = server_environment({"GLOO_SOCKET_IFNAME": "eth1"}, 1, "gpu", [0], PACKAGE, host=host)
    assert chosen["GLOO_SOCKET_IFNAME"] == "eth1", "the user's choice stays"


def test_a_server_for_other_hosts_makes_groups_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interfaces, "_knows_itself_by_loopback", lambda: False)
    env = server_environment({}, 1, "gpu", [0], PACKAGE, host="node1")
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & env.keys()
    monkeypatch.setattr(interfaces, "_knows_itself_by_loopback", lambda: True)
    monkeypatch.setattr(interfaces, "_interfaces", lambda: iter([("10.0.0.1", "eth0")]))
    env = server_environment({}, 1, "gpu", [0], PACKAGE, host="node1")
    assert env["GLOO_SOCKET_IFNAME"] == "eth0"


def test_the_processes_of_a_server_meet_in_a_file() -> None:
    name = "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"
    assert store_environment(command("gpu"), Path("/private")) == {name: "file:///private/store"}
    assert store_environment([*command("gpu"), "--decode-log-interval", "9"], Path("/private")) != {}


@pytest.mark.parametrize(
    "flags",
    [["--nnodes", "2", "--dist-init-addr", "node1:5"], ["--dp-size=2"], ["--dp", "2"], ["--data-parallel", "2"]],
)
def test_a_server_whose_processes_cannot_meet_in_one_file_keeps_sglangs_store(flags: list[str]) -> None:
    assert store_environment([*command("gpu"), *flags], Path("/private")) == {}


def test_a_server_on_a_gpu_does_not_get_the_trainers_growing_segments_which_its_memory_saver_refuses() -> None:
    growing = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64,expandable_segments:True",
    }
    env = server_environment(growing, 1, "gpu", [0], PACKAGE, host="127.0.0.1")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in env
    assert env["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"


def test_a_trainer_that_is_lost_does_not_end_its_servers_through_the_watchdog_of_their_groups() -> None:
    env = server_environment({}, 1, "gpu", [0], PACKAGE, host="127.0.0.1")
    assert (env["TORCH_NCCL_ASYNC_ERROR_HANDLING"], env["TORCH_NCCL_ENABLE_MONITORING"]) == ("0", "0")


def test_log_probs_are_untempered_whatever_the_trainers_environment_says() -> None:
    env = server_environment({"SGLANG_RETURN_ORIGINAL_LOGPROB": "0"}, 1, "gpu", [0], PACKAGE, host="127.0.0.1")
    assert env["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "1"


def test_a_server_can_import_what_it_loads_weights_with_and_nothing_else_of_ours(tmp_path: Path) -> None:
    assert value(command("cpu"), "--custom-weight-loader") == WEIGHT_LOADER
    module, function = WEIGHT_LOADER.rsplit(".", 1)
    env = server_environment(
        {"PYTHONPATH": "/theirs"}, 1, "cpu", [0], link_package(tmp_path / "path"), host="127.0.0.1"
    )
    assert env["PYTHONPATH"] == f"{tmp_path / 'path'}:/theirs"
    assert [entry.name for entry in (tmp_path / "path").iterdir()] == ["megatron_dypo"]
    heavy = "megatron, sglang, aiohttp, yaml, numpy.f2py"
    code = f"import sys, {module} as m; m.{function}; print(m.__file__); print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    path, modules = run.stdout.splitlines()
    assert path.startswith(str(tmp_path / "path"))
    assert not set(heavy.split(", ")) & set(modules.split())
    link_package(tmp_path / "path")  # a resumed run finds the old link


def test_the_users_thread_count_stays() -> None:
    assert (
        server_environment({"OMP_NUM_THREADS": "4"}, 1, "cpu", [0], PACKAGE, host="127.0.0.1")["OMP_NUM_THREADS"] == "4"
    )
    assert server_environment({}, 1, "cpu", [0], PACKAGE, host="127.0.0.1")["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("cores", "ranks", "binding"), [([0, 1], 2, "0|1"), ([2, 3, 8, 9], 2, "2,3|8,9"), ([5], 2, "5|5")]
)
def test_tensor_parallel_ranks_on_a_cpu_get_cores_of_their_own(cores: list[int], ranks: int, binding: str) -> None:
    assert (
        server_environment({}, ranks, "cpu", cores, PACKAGE, host="127.0.0.1")["SGLANG_CPU_OMP_THREADS_BIND"] == binding
    )


def test_a_port_that_is_listened_on_is_passed_over() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        taken = busy.getsockname()[1]
        lease = lease_port("127.0.0.1", taken)
        lease.release()
    assert lease.port > taken


def test_a_leased_port_is_leased_once_until_it_is_released() -> None:
    first = lease_port("127.0.0.1", 32100)
    second = lease_port("127.0.0.1", 32100)
    assert second.port > first.port
    first.release()
    third = lease_port("127.0.0.1", 32100)
    assert third.port == first.port
    second.release()
    third.release()


def test_a_name_of_this_host_has_its_ports_where_other_hosts_look(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"six": (socket.AF_INET6, "::1"), "self": (socket.AF_INET, "127.0.1.1")}

    def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        family, address = known[host]
        return [(family, socket.SOCK_STREAM, 6, "", (address, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for host in known:
        lease_port(host, 32200).release()
    words = command("gpu", host="self")
    assert words[words.index("--host") + 1] == "0.0.0.0"


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(ValueError, match=r"host='no\.such\.host\.invalid'"):
        lease_port("no.such.host.invalid", 32100)


def test_a_host_that_is_no_address_of_this_machine_is_named_and_not_taken_for_busy_ports() -> None:
    with pytest.raises(ValueError, match=r"rollout\.servers\.host='192\.0\.2\.1': Cannot assign"):
        lease_port("192.0.2.1", 32100)


@pytest.mark.parametrize("name", ["sglang_cpu.py", "sglang_keyed.py"])
def test_a_launcher_imports_nothing_of_this_package(name: str) -> None:
    """Its interpreter may have SGLang but not this package."""
    launcher = Path(command_module.__file__).with_name(name)
    code = f"import runpy, sys; runpy.run_path({str(launcher)!r}); print('megatron_dypo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "False"


FORKING_SGLANG = {
    "__init__.py": "",
    "srt/__init__.py": "",
    "srt/entrypoints/__init__.py": "",
    "launch_server.py": """
import multiprocessing

def run_server(arguments):
    multiprocessing.set_start_method("spawn", force=True)  # as SGLang does
    import sglang.srt.entrypoints.http_server as imported_here

    imported_here.was_imported_before = True
    child = multiprocessing.Process(target=say_whether_it_was)
    child.start()
    child.join()

def say_whether_it_was():
    import sglang.srt.entrypoints.http_server as imported

    print(getattr(imported, "was_imported_before", False), flush=True)
""",
    "srt/entrypoints/http_server.py": "",
    "srt/server_args.py": "prepare_server_args = list",
    "srt/utils/__init__.py": "def kill_process_tree(pid, include_parent): pass",
    "srt/utils/auth.py": """
def decide_request_auth(**asked):
    return asked

def add_api_key_middleware(app, **keys):
    app.add_middleware(None)
""",
}
"""A package with SGLang's names, whose server starts one process and ends with it."""


def test_a_server_on_a_cpu_imports_sglang_once_for_all_of_its_processes(tmp_path: Path) -> None:
    for name, text in FORKING_SGLANG.items():
        (tmp_path / "sglang" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sglang" / name).write_text(text)
    launcher = Path(command_module.__file__).with_name("sglang_cpu.py")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(launcher)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "True"


STOCK_SGLANG = {
    "__init__.py": "",
    "srt/__init__.py": "",
    "srt/utils/__init__.py": "",
    "srt/utils/auth.py": FORKING_SGLANG["srt/utils/auth.py"],
    "launch_server.py": """
import multiprocessing
import sys

def say(text):
    print(text, *sys.argv[1:], sys.path[0], flush=True)

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
    say("server")
    child = multiprocessing.Process(target=say, args=("child",))
    child.start()
    child.join()
    sys.exit(child.exitcode)
""",
}
"""A package whose server spawns a process that runs a function of the server's own module."""


def test_on_an_accelerator_sglang_runs_as_it_does_by_itself(tmp_path: Path) -> None:
    for name, text in STOCK_SGLANG.items():
        (tmp_path / "sglang" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sglang" / name).write_text(text)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    launcher = Path(command_module.__file__).with_name("sglang_keyed.py")
    said = [
        subprocess.run(
            [sys.executable, *how, "--port", "9"],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for how in ([str(launcher)], ["-m", "sglang.launch_server"])
    ]
    assert said[0] == said[1]
    assert said[0].split()[0] == "server"
    assert "child --port 9" in said[0]


def test_the_sockets_of_a_server_have_short_addresses() -> None:
    long, short = "/scratch/" + 91 * "x", "/scratch/job"
    for inherited, expected in ((long, "/tmp"), (short, short)):
        env = server_environment({"TMPDIR": inherited}, 1, "cpu", [0], PACKAGE, host="127.0.0.1")
        assert env["TMPDIR"] == expected


@pytest.mark.parametrize("flags", [["--attn-dp-size", "2"], ["--enable-dp-attention", "--dp-size", "2"]])
def test_a_server_whose_ranks_attend_to_requests_of_their_own_gets_ports_of_its_own(flags: list[str]) -> None:
    """SGLang would take six ports from 233 after the server's, and the next server the same ones."""
    cfg = ServersConfig(tensor_parallel=2, extra_args=tuple(flags))
    leases = [lease for lease in (lease_spread_ports(cfg), lease_spread_ports(cfg)) if lease]
    first, second = (lease.port for lease in leases)
    for lease in leases:
        lease.release()
    assert second - first >= 14
    arguments = command("gpu", extra_args=tuple(flags), spread_port=first)
    assert value(arguments, "--dist-init-addr") == f"127.0.0.1:{first}"
    assert store_environment(arguments, Path("/private")) != {}, "its processes meet in a file all the same"


@pytest.mark.parametrize("flags", [[], ["--dist-init-addr", "node1:5", "--attn-dp-size", "2"], ["--attn-dp-size=1"]])
def test_other_servers_get_no_further_ports(flags: list[str]) -> None:
    assert lease_spread_ports(ServersConfig(tensor_parallel=2, extra_args=tuple(flags))) is None


def test_a_row_of_ports_is_free_from_end_to_end() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        lease = lease_port("127.0.0.1", 21_000, 16)
        lease.release()
        taken.bind(("127.0.0.1", lease.port + 13))
        taken.listen()
        other = lease_port("127.0.0.1", 21_000, 16)
        other.release()
    assert other.port > lease.port
    assert (other.port - lease.port) % 16 == 0
