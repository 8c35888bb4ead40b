"""Refits between GPUs, by a stand-in that records which thread works on which GPU and stream."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from megatron_dypo.models.architecture import architecture_from_hf
from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.parallel import device, streams
from megatron_dypo.parallel.groups import MeshRank
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.deadline import Deadline
from megatron_dypo.refit.plan.refit_plan import ServerMesh, Transfer, make_plan
from megatron_dypo.refit.quantized_servers import refusal
from megatron_dypo.refit.slices import ShardSlices
from megatron_dypo.refit.source import Source
from megatron_dypo.refit.transports.link_sender import LinkSender
from megatron_dypo.refit.transports.links import LinkError
from megatron_dypo.refit.transports.messages import cut
from megatron_dypo.refit.transports.p2p import GroupReceiver, GroupSender
from megatron_dypo.refit.transports.threads import run_concurrently
from tests.support.recording_cuda import NcclGroup, RecordingCuda, stand_in_for_nccl
from tests.support.refit_links import SERVER_RANK, SOURCE, links_of
from tests.support.refit_setting import HF_CONFIG, Setting

TRAINER_GPU, SERVER_GPU = 3, 5


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> RecordingCuda:
    cuda = RecordingCuda()
    cuda.stand_in(monkeypatch)
    return cuda


@pytest.fixture
def groups(cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch) -> list[NcclGroup]:
    return stand_in_for_nccl(cuda, monkeypatch)


class Slices:
    """Rows of one parameter, each other row of which is left out, so that they must be copied."""

    def __init__(self, param: torch.Tensor) -> None:
        self._param = param

    def slice(self, transfer: Transfer) -> torch.Tensor:
        return self._param[::2]


def in_processes(trainer: Callable[[], object], server: Callable[[], object]) -> tuple[set[int], set[int]]:
    """Run both, each in a thread that is bound to its GPU as a process is; return the numbers of the two threads."""
    numbers: list[int] = []

    def bound(gpu: int, action: Callable[[], object]) -> None:
        torch.cuda.set_device(gpu)
        numbers.append(threading.get_ident())
        action()

    with ThreadPoolExecutor(2) as pool:
        for end in [pool.submit(bound, TRAINER_GPU, trainer), pool.submit(bound, SERVER_GPU, server)]:
            end.result(60)
    return {numbers[0]}, {numbers[1]}


def test_every_link_works_on_the_gpu_of_its_rank_and_on_a_stream_of_its_own(
    cuda: RecordingCuda, groups: list[NcclGroup]
) -> None:
    store, deadline = dist.HashStore(), Deadline(30)
    transfer = Transfer(
        source=SOURCE,
        server=0,
        server_rank=SERVER_RANK,
        hf_name="w",
        part="value",
        source_name="w",
        source_row=0,
        source_col=0,
        hf_row=0,
        hf_col=0,
        served_name="w",
        served_row=0,
        served_col=0,
        rows=8,
        cols=4,
    )
    messages = list(cut([transfer], {"w": torch.float32}, 64))
    values, received = torch.arange(64.0).view(16, 4), []

    def send() -> None:
        sender = GroupSender.connect(links_of(store, peers=(SERVER_RANK,)), SOURCE, deadline)
        link = LinkSender(
            Slices(values),
            sender.outgoing(SERVER_RANK, deadline),
            messages,
            {"w": torch.float32},
            version=1,
            verify="off",
            slot_bytes=64,
        )
        assert run_concurrently([link.send]) == [None]
        sender.close()

    def receive() -> None:
        receiver = GroupReceiver.connect(links_of(store, peers=(SOURCE,)), SERVER_RANK, deadline)
        incoming = receiver.incoming(SOURCE, deadline)

        def take_all() -> None:
            for message in messages:
                incoming.expect(message.num_bytes, None)
                received.append(torch.empty(16).copy_(incoming.take().view(torch.float32)))
                incoming.release()

        assert run_concurrently([take_all]) == [None]
        receiver.close()

    in_processes(send, receive)
    assert torch.equal(torch.cat(received).view(8, 4), values[::2])
    link_threads = {record.thread for record in cuda.records if not str(record.stream).startswith("default")}
    for record in cuda.records:
        assert record.gpu in (TRAINER_GPU, SERVER_GPU), record
    for verb in ("allocate", "copy", "record an event", "synchronize"):
        of_links = [record for record in cuda.of(verb) if record.thread in link_threads]
        assert {record.gpu for record in of_links} == {TRAINER_GPU, SERVER_GPU}, verb
    sends = {record.stream for record in cuda.of("send 64")}
    assert len(sends) == 1
    assert not any(str(stream).startswith("default") for stream in sends)
    # A stream that waits for work under way would hold up all others.
    assert cuda.of("wait for done work")
    assert not cuda.of("wait for work under way")


def test_ranks_greet_each_other_in_the_order_of_their_numbers_before_any_link_works(
    cuda: RecordingCuda, groups: list[NcclGroup]
) -> None:
    store = dist.HashStore()
    in_processes(
        lambda: GroupSender.connect(links_of(store, peers=(SERVER_RANK,)), SOURCE, Deadline(30)),
        lambda: GroupReceiver.connect(links_of(store, peers=(SOURCE,)), SERVER_RANK, Deadline(30)),
    )
    assert [len(cuda.of(verb)) for verb in ("send 1", "receive 1")] == [1, 1]


def test_a_lost_peer_is_an_error_at_the_deadline_and_not_the_end_of_the_process(
    cuda: RecordingCuda, groups: list[NcclGroup]
) -> None:
    store = dist.HashStore()
    senders: list[GroupSender] = []
    in_processes(
        lambda: senders.append(GroupSender.connect(links_of(store, peers=(SERVER_RANK,)), SOURCE, Deadline(30))),
        lambda: GroupReceiver.connect(links_of(store, peers=(SOURCE,)), SERVER_RANK, Deadline(30)),
    )
    assert [group.ends_process for group in groups] == [False, False]
    assert all(group.max_ctas == 64 for group in groups)
    outgoing = senders[0].outgoing(SERVER_RANK, Deadline(0.3))
    outgoing.post(torch.zeros(64, dtype=torch.uint8))
    with pytest.raises(LinkError, match="before the deadline"):
        outgoing.drain()
    senders[0].close()
    assert groups[0].aborted or groups[1].aborted


def test_work_that_failed_is_not_taken_for_done(cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        def is_completed(self) -> bool:
            return True  # also of work that failed, in ProcessGroupNCCL

        def wait(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda.Event, "query", lambda _: False)
    with pytest.raises(TimeoutError):
        streams.finish(Failed(), 0.1)  # type: ignore[arg-type]


def test_lanes_begin_after_the_work_of_their_maker(cuda: RecordingCuda) -> None:
    torch.cuda.set_device(TRAINER_GPU)
    torch.zeros(4, device="cuda:3").copy_(torch.ones(4))  # such as the zeros where a vocabulary is padded
    run_concurrently([lambda: None, lambda: None])
    verbs = [record.verb for record in cuda.records]
    assert verbs.index("copy") < verbs.index("stream waits")
    assert len(cuda.of("stream waits")) == 2


@pytest.mark.parametrize(
    ("quantization", "kind", "capability", "words"),
    [
        ("none", "cuda", (9, 0), None),
        ("fp8_block", "cuda", (9, 0), None),
        ("fp8_channel", "cpu", None, None),
        ("fp8_channel", "cuda", (9, 0), "transposed"),
        ("fp8_block", "cuda", (10, 0), "packs the scales"),
    ],
)
def test_quantised_weights_that_a_server_changes_after_loading_are_refused(quantization, kind, capability, words):
    problem = refusal(quantization, kind, capability)
    assert problem is None if words is None else words in str(problem)


@pytest.mark.parametrize("setting", [{"offload_servers": True}], indirect=True)
def test_the_trainer_gives_its_idle_memory_back_before_the_servers_take_theirs(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = setting.servers[0]
    monkeypatch.setattr(device, "empty_cache", lambda: server.calls.append(("the trainer's cache", {})))
    setting.refitter.release()
    setting.refitter.refit(1)
    assert server.posts[:4] == [
        "/pause_generation",
        "/release_memory_occupation",
        "the trainer's cache",
        "/resume_memory_occupation",
    ]


class Dequantised:
    """Counts the dequantised copies that live."""

    def __init__(self) -> None:
        self.living, self.most, self.made = 0, 0, 0

    def values(self, param: torch.Tensor) -> torch.Tensor:
        copy = param.clone()
        self.living, self.made = self.living + 1, self.made + 1
        self.most = max(self.most, self.living)
        weakref.finalize(copy.untyped_storage(), self._freed)
        return copy

    def _freed(self) -> None:
        self.living -= 1


ARCH = architecture_from_hf(HF_CONFIG, where="config.json")
SHARDS = {row.mcore: torch.randn(row.rule.mcore_shape(ARCH, 1)) for row in family_rows(ARCH) if not row.is_copy}


def test_a_link_holds_one_dequantised_parameter_at_a_time_and_computes_it_once() -> None:
    counts = Dequantised()
    slices = ShardSlices(SHARDS.items(), ARCH, counts.values)
    plan = make_plan(ARCH, Mesh(), (ServerMesh(tensor=1),), quantization="none", element_size=4)
    for transfer in plan.sends(0):
        slices.slice(transfer)
    gc.collect()
    assert counts.made == len(SHARDS)
    assert counts.most <= 2, "the last one, and its successor while it is computed"


def test_whole_tensors_are_dequantised_one_at_a_time(layout: MeshRank) -> None:
    counts = Dequantised()
    source = Source(layout=layout, arch=ARCH, named_params=SHARDS.items, values=counts.values)
    for name, tensor in source.tensors():
        assert tensor.numel() > 0, name
    assert counts.made == len(SHARDS)
    assert counts.most <= 2
