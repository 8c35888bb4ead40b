"""Planned refits between stand-ins: what arrives, how much is sent and allocated, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.experts import Experts
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from tests.support.architectures import make_arch
from tests.support.dist.planned_ranks import BUCKET_MIB, Refit, rank_refit
from tests.support.dist.spawn import RankError, run_ranks
from tests.support.present import present
from tests.support.refit_standins import StandInServer, hf_tensors, served_params, served_shapes, standin_server
from tests.support.slow import slow_unless

WIDE = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "ffn_hidden_size": 8192,
    "vocab_size": 1031,
}
DENSE = make_arch("qwen3", **WIDE)
TIED = make_arch("qwen2", tied_embeddings=True, **WIDE)
MIXTURE = make_arch(
    "qwen3_moe",
    experts=Experts(num_experts=4, per_token=2, ffn_hidden_size=40, normalized=True, moe_aux_loss_coef=0.0),
    **WIDE,
)

GLM = make_arch(
    "glm4_moe", experts=dataclasses.replace(present(make_arch("glm4_moe").experts), ffn_hidden_size=8), **WIDE
)


@contextlib.contextmanager
def servers(
    arch: Architecture, layouts: Sequence[ServerMesh], dtype: torch.dtype = torch.float32, **changes: Any
) -> Iterator[list[StandInServer]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                standin_server(
                    arch, layout, [served_shapes(arch, layout, rank, dtype) for rank in range(layout.tensor)], **changes
                )
            )
            for layout in layouts
        ]


def assert_served(
    running: Sequence[StandInServer],
    layouts: Sequence[ServerMesh],
    arch: Architecture,
    seed: int,
    dtype: torch.dtype = torch.float32,
):
    model = hf_tensors(arch, seed, dtype)
    for server, layout in zip(running, layouts, strict=True):
        for rank in range(layout.tensor):
            expected, held = served_params(arch, layout, rank, model), server.params(rank)
            assert [name for name in expected if held[name] != expected[name]] == []
            assert held.keys() == expected.keys()


CASES = {
    "dense, uneven stages": (
        DENSE,
        Mesh(tensor=2, pipeline=2, first_stage_layers=3),
        (ServerMesh(tensor=1), ServerMesh(tensor=2)),
    ),
    "tied": (TIED, Mesh(pipeline=2, data=2), (ServerMesh(tensor=2), ServerMesh(tensor=2))),
    "experts": (MIXTURE, Mesh(tensor=2, data=2, expert=4), (ServerMesh(tensor=2, expert=2),)),
    "copies of attention": (
        DENSE,
        Mesh(tensor=2, data=2),
        (ServerMesh(tensor=4, attention_data=2), ServerMesh(tensor=2, attention_data=2, output_by_attention=True)),
    ),
    "experts behind a dense layer": (
        GLM,
        Mesh(tensor=2, pipeline=2, expert=2, first_stage_layers=1),
        (ServerMesh(tensor=2, expert=2), ServerMesh(tensor=1)),
    ),
}


def link_by_groups() -> None:
    """Let ``p2p`` use the links that it uses between GPUs, over gloo in place of NCCL."""
    from megatron_dypo.refit.transports import ends
    from megatron_dypo.refit.transports.p2p import GroupReceiver, GroupSender

    vars(ends).update(TcpSender=GroupSender, TcpReceiver=GroupReceiver)


@pytest.mark.parametrize("kind", ["p2p", "p2p by groups", "local"])
@pytest.mark.parametrize("case", CASES)
def test_every_rank_of_every_server_holds_its_part_of_the_model(case, kind):
    """The second refit uses the connections of the first. A rank gets its own bytes and no others."""
    arch, axes, layouts = CASES[case]
    prepare = link_by_groups if kind == "p2p by groups" else None
    with servers(arch, layouts, prepare=prepare) as running:
        urls = tuple(server.url for server in running)
        refit = Refit(arch=arch, axes=axes, urls=urls, kind=kind.split()[0], prepare=prepare)
        by_rank = run_ranks(axes.world_size, rank_refit, refit)
        assert_served(running, layouts, arch, refit.seeds[-1])
    own = sum(
        size * dtype.itemsize
        for layout in layouts
        for rank in range(layout.tensor)
        for shape, dtype in served_shapes(arch, layout, rank).values()
        for size in [torch.Size(shape).numel()]
    )
    for outcomes in by_rank:
        for outcome in outcomes:
            assert outcome["error"] == ""
            assert outcome["bytes"] <= 1.01 * own
            # One staging buffer; a whole matrix of an MLP has 4 MiB.
            assert outcome["largest"][0] <= BUCKET_MIB * 2**20 // 3, outcome["largest"]


@pytest.mark.parametrize("kind", ["p2p", "local"])
def test_routers_that_a_server_holds_in_another_type_are_converted(kind):
    layout, dtype = ServerMesh(tensor=2), torch.bfloat16
    with servers(GLM, [layout], dtype) as running:
        refit = Refit(arch=GLM, axes=Mesh(tensor=2), urls=(running[0].url,), kind=kind, dtype=dtype)
        for outcomes in run_ranks(2, rank_refit, refit):
            assert [outcome["error"] for outcome in outcomes] == ["", ""]
        assert_served(running, [layout], GLM, refit.seeds[-1], dtype)


def test_a_server_that_fused_the_shared_experts_is_refused_with_the_remedy():
    """Its experts have one more, and the MLP that every token passes has no parameters of its own."""
    layout = ServerMesh(tensor=1)
    shapes = {name: held for name, held in served_shapes(GLM, layout, 0).items() if "shared_experts" not in name}
    for name, ((count, *sizes), dtype) in shapes.items():
        if ".mlp.experts." in name:
            shapes[name] = ((count + 1, *sizes), dtype)
    with standin_server(GLM, layout, [shapes]) as server:
        refit = Refit(arch=GLM, axes=Mesh(), urls=(server.url,), kind="p2p", seeds=(1,))
        ((outcome,),) = run_ranks(1, rank_refit, refit)
        assert all(set(held) == {0x55} for held in server.params(0).values())
    assert "mlp.experts.w13_weight has shape (7, 16, 128), the plan has (6, 16, 128)" in outcome["error"]
    assert "start it with --disable-shared-experts-fusion (rollout.servers.extra_args)" in outcome["error"]


def test_a_server_with_other_parameters_is_refused_before_anything_is_sent():
    layout = ServerMesh(tensor=2)
    shapes = [served_shapes(DENSE, layout, rank) for rank in range(2)]
    name = "model.layers.1.mlp.down_proj.weight"
    shapes[1][name] = ((3, 5), torch.float32)
    with standin_server(DENSE, layout, shapes) as server:
        refit = Refit(arch=DENSE, axes=Mesh(tensor=2), urls=(server.url,), kind="p2p", seeds=(1,))
        ((outcome,), (other,)) = run_ranks(2, rank_refit, refit)
        assert all(set(held) == {0x55} for rank in range(2) for held in server.params(rank).values())
    assert outcome["error"] == other["error"]
    for part in (server.url, "rank 1", name, "(3, 5)", str((128, 4096))):
        assert part in outcome["error"]


def corrupt_what_comes() -> None:
    """Flip a bit of each message, in a server's rank."""
    from megatron_dypo.refit.transports.tcp import TcpIncoming

    take = TcpIncoming.take

    def flipped(self: Any) -> torch.Tensor:
        payload = take(self)
        payload[len(payload) // 2] ^= 4
        return payload

    TcpIncoming.take = flipped  # type: ignore[method-assign]


@pytest.mark.parametrize("verify", ["full", "sampled", "off"])
def test_what_is_damaged_on_its_way_fails_the_refit(verify):
    with servers(DENSE, [ServerMesh(tensor=1)], prepare=corrupt_what_comes) as (server,):
        refit = Refit(arch=DENSE, axes=Mesh(), urls=(server.url,), kind="p2p", verify=verify, seeds=(1,))
        ((outcome,),) = run_ranks(1, rank_refit, refit)
    if verify == "off":
        assert outcome["error"] == ""
    else:
        assert server.url in outcome["error"]
        assert "checksums differ: " in outcome["error"]
        assert "model." in outcome["error"]


def die_while_receiving() -> None:
    from megatron_dypo.refit.transports.links import Incoming
    from megatron_dypo.refit.transports.local import LocalIncoming
    from megatron_dypo.refit.transports.tcp import TcpIncoming

    def die(self: Incoming) -> torch.Tensor:
        os._exit(1)

    for end in (TcpIncoming, LocalIncoming):
        end.take = die  # type: ignore[method-assign]


def hang_while_receiving() -> None:
    from megatron_dypo.refit.transports.links import Incoming
    from megatron_dypo.refit.transports.tcp import TcpIncoming

    def hang(self: Incoming) -> torch.Tensor:
        threading.Event().wait()
        raise AssertionError

    TcpIncoming.take = hang  # type: ignore[method-assign]


def die_while_connecting() -> None:
    from megatron_dypo.refit.transports.local import LocalReceiver
    from megatron_dypo.refit.transports.tcp import TcpReceiver

    def die(*args: Any) -> Any:
        os._exit(1)

    for kind in (TcpReceiver, LocalReceiver):
        kind.connect = die  # type: ignore[assignment, method-assign]


def miss_the_loss() -> None:
    """Let a trainer rank's links wait on when their connections break, as NCCL's do."""
    from megatron_dypo.refit.transports.links import Outgoing
    from megatron_dypo.refit.transports.local import LocalOutgoing
    from megatron_dypo.refit.transports.tcp import TcpOutgoing

    def wait(self: Outgoing) -> None:
        threading.Event().wait()

    for end in (TcpOutgoing, LocalOutgoing):
        end.drain = wait  # type: ignore[method-assign]
        end.post = lambda self, payload: None  # type: ignore[method-assign]


def die_while_sending() -> None:
    from megatron_dypo.refit.transports.tcp import TcpOutgoing

    def die(self: Any, payload: torch.Tensor) -> None:
        os._exit(1)

    TcpOutgoing.post = die  # type: ignore[method-assign]


NEVER_S = 3600.0
"""A deadline beyond that of any test: nobody can have waited for half of it."""


@pytest.mark.parametrize(
    ("kind", "fault", "deadline_s"),
    [
        ("p2p", die_while_receiving, NEVER_S),
        ("local", die_while_receiving, NEVER_S),
        # The server still answers control calls, so the next refit includes it again.
        pytest.param("p2p", hang_while_receiving, 20.0, marks=pytest.mark.slow),
    ],
)
def test_a_lost_server_is_an_error_that_names_it_and_the_rest_is_served(
    kind: str, fault: Callable[[], None], deadline_s: float
) -> None:
    layout = ServerMesh(tensor=1)
    with (
        servers(DENSE, [layout], prepare=fault) as (faulty,),
        servers(DENSE, [layout]) as (sound,),
    ):
        urls = (faulty.url, sound.url)
        refit = Refit(arch=DENSE, axes=Mesh(tensor=2), urls=urls, kind=kind, deadline_s=deadline_s, seeds=(1, 2))
        by_rank = run_ranks(2, rank_refit, refit)
        assert_served([sound], [layout], DENSE, 2)
    for outcomes in by_rank:
        assert [outcome["error"] for outcome in outcomes] == ["", ""]


@pytest.mark.parametrize("kind", slow_unless("p2p".__eq__, ("p2p", "local")))
@pytest.mark.parametrize(
    ("fault", "trainer"),
    [(die_while_receiving, None), (die_while_receiving, miss_the_loss), (die_while_connecting, None)],
)
def test_the_loss_of_the_only_server_fails_the_refit_on_all_ranks(
    kind: str, fault: Callable[[], None], trainer: Callable[[], None] | None
) -> None:
    with servers(DENSE, [ServerMesh(tensor=2)], prepare=fault) as (server,):
        refit = Refit(
            arch=DENSE,
            axes=Mesh(pipeline=2),
            urls=(server.url,),
            kind=kind,
            deadline_s=NEVER_S,
            seeds=(1,),
            prepare=trainer,
        )
        by_rank = run_ranks(2, rank_refit, refit, deadline_s=120)
    for (outcome,) in by_rank:
        assert server.url in outcome["error"]


def test_a_server_whose_links_miss_the_loss_of_the_trainer_is_free_again() -> None:
    with servers(DENSE, [ServerMesh(tensor=1)], prepare=hang_while_receiving) as (server,):
        refit = Refit(
            arch=DENSE,
            axes=Mesh(tensor=2),
            urls=(server.url,),
            kind="p2p",
            deadline_s=NEVER_S,
            seeds=(1,),
            prepare=die_while_sending,
        )
        with pytest.raises(RankError):
            run_ranks(2, rank_refit, refit, deadline_s=120)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(server.params, 0).result(timeout=60)
