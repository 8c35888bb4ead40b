"""The meeting of a run's launchers: what torchrun's arguments mean, and who may take part."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dypo.launch.rendezvous import KEY_VARIABLE, read_meeting
from tests.support.strangers import free_port

KEY = "0123456789abcdef"
NODES = ["--nnodes=2", "--master-addr=node1", "--master-port=10000", "--node-rank=0"]
PROGRAM = ["--nproc-per-node=2", "-m", "megatron_dypo.cli", "train", "a.yaml"]


@pytest.mark.parametrize("words", [["--standalone"], ["--nnodes=1", "--master-addr=node1", "--master-port=10000"]])
def test_one_node_meets_on_a_loopback_address_and_needs_no_key(words, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    meeting = read_meeting([*words, *PROGRAM])
    assert meeting.arguments.rdzv_endpoint == "127.0.0.1:0"
    assert not meeting.arguments.standalone
    assert meeting.has_first_rank
    assert meeting.arguments.training_script_args == ["train", "a.yaml"]
    assert meeting.attempt != read_meeting([*words, *PROGRAM]).attempt


def test_all_nodes_give_a_start_the_same_name_and_the_first_has_rank_0(monkeypatch):
    found = []
    for rank in range(2):
        monkeypatch.setenv(KEY_VARIABLE, KEY)
        found.append(read_meeting([*NODES[:3], f"--node-rank={rank}", "--rdzv-conf=timeout=7", *PROGRAM]))
    assert found[0].attempt == found[1].attempt
    assert [meeting.has_first_rank for meeting in found] == [True, False]
    assert [meeting.arguments.rdzv_endpoint for meeting in found] == ["node1:10000"] * 2
    assert [meeting.arguments.rdzv_conf for meeting in found] == ["timeout=7,rank=0", "timeout=7,rank=1"]


def test_ranks_do_not_inherit_the_key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    meeting = read_meeting([*NODES, *PROGRAM])
    assert KEY_VARIABLE not in os.environ
    assert KEY not in str(meeting)


@pytest.mark.parametrize("key", ["", "too short", KEY + " with spaces"])
def test_several_nodes_need_a_key_and_the_message_does_not_show_it(key, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE}: several nodes need the same key") as caught:
        read_meeting([*NODES, *PROGRAM])
    assert not key or key not in str(caught.value)


def test_a_rendezvous_without_a_key_is_refused(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(ValueError, match=re.escape("--rdzv-backend=c10d: its store asks for no key")):
        read_meeting(["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:10000", *PROGRAM])


def start_node(rank: int, port: int, folder: Path, key: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megatron_dypo.launch.torchrun", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.2", f"--master-port={port}", f"--node-rank={rank}", "program.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), KEY_VARIABLE: key}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_nodes_with_one_key_make_one_group_and_a_third_with_another_key_is_refused(tmp_path):
    program = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
numbers = [torch.zeros(()) for _ in range(2)]
dist.all_gather(numbers, torch.tensor(float(dist.get_rank())))
print(sum(numbers).item(), end="")
dist.destroy_process_group()
"""
    (tmp_path / "program.py").write_text(program)
    port = free_port("127.0.0.2")
    first = start_node(0, port, tmp_path, KEY)
    stranger = start_node(1, port, tmp_path, KEY[::-1])
    refused, errors = stranger.communicate(timeout=300)
    assert (stranger.returncode, refused) == (77, "")
    assert f"127.0.0.2:{port} does not accept the key" in errors
    second = start_node(1, port, tmp_path, KEY)
    assert [node.communicate(timeout=300)[0] for node in (first, second)] == ["1.0", "1.0"]
    assert [node.returncode for node in (first, second)] == [0, 0]
