"""The plan of a refit, executed on numbers and compared with the result of SGLang's loaders for the same HF tensors."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_dypo.models.families.registry import family_rows
from megatron_dypo.models.families.table import Row
from megatron_dypo.models.quantized.names import BLOCK, Quantization, is_quantized
from megatron_dypo.refit.plan.refit_plan import Mesh, RefitPlan, ServerMesh, Transfer, make_plan
from tests.support.architectures import make_arch
from tests.support.refit_cases import QUANTIZABLE, Case, NaiveServerRank, cases, numbered_hf_tensors

Matrix = np.ndarray
ELEMENT_SIZE = 2


def matrix(tensor: Tensor) -> Matrix:
    return tensor.reshape(-1, tensor.shape[-1] if tensor.dim() > 1 else 1).numpy()


class Trainer:
    """The shards of every rank, placed as Megatron places them, rank by rank and layer by layer."""

    def __init__(self, case: Case, shard: Callable[[Row, int, int], Tensor]) -> None:
        self._case, self._shard = case, shard
        self._rows = {row.mcore: row for row in family_rows(case.arch) if not row.is_copy}
        self._made: dict[tuple[str, int], Matrix] = {}
        self.holders: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
        """(Parameter, number of its shard) → ranks that hold it."""
        self._numbers: list[dict[str, int]] = []
        for rank in range(case.source.world_size):
            held = self._held(rank)
            self._numbers.append(held)
            for name, number in held.items():
                self.holders[name, number].add(rank)

    def parameter(self, rank: int, name: str) -> Matrix:
        number = self._numbers[rank][name]
        if (name, number) not in self._made:
            row, source = self._rows[name], self._case.source
            size = source.expert_tensor if row.is_expert else source.tensor
            self._made[name, number] = matrix(self._shard(row, number, size))
        return self._made[name, number]

    def peers(self, rank: int, name: str) -> frozenset[int]:
        """Return the ranks that hold the same shard."""
        return frozenset(self.holders[name, self._numbers[rank][name]])

    def _held(self, rank: int) -> dict[str, int]:
        source, arch = self._case.source, self._case.arch
        stage, inside = divmod(rank, source.stage_size)
        layers: set[int] = set()
        numbers = iter(range(arch.num_layers))
        for _ in range(source.virtual_pipeline):
            for other, count in enumerate(self._case.stage_layers):
                chunk = set(itertools.islice(numbers, count // source.virtual_pipeline))
                layers |= chunk if other == stage else set()
        experts: set[int] = set()
        if arch.experts is not None:
            count = arch.experts.num_experts // source.expert
            ep_rank = inside // source.expert_tensor % source.expert
            experts = set(range(ep_rank * count, (ep_rank + 1) * count))
        held = {}
        for name, row in self._rows.items():
            words = name.split(".")
            if words[1] == "layers":
                here = int(words[2]) in layers
            else:
                here = stage == (0 if words[0] == "embedding" else source.pipeline - 1)
            if row.is_expert:
                here = here and int(words[6]) in experts
                number = inside % source.expert_tensor
            else:
                number = 0 if row.rule.tp_dim is None else inside % source.tensor
            if here:
                held[name] = number
        return held


def all_sends(plan: RefitPlan) -> list[Transfer]:
    return [transfer for rank in range(plan.source.world_size) for transfer in plan.sends(rank)]


def execute(
    transfers: list[Transfer],
    trainer: Trainer,
    hf: dict[str, Matrix],
    shapes: dict[str, tuple[int, ...]],
    columns: Mapping[str, int],
) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """Execute the transfers; return the parameters of all server ranks, and how often each element was written."""
    made = {}
    for name, shape in shapes.items():
        width = columns.get(name, shape[-1] if len(shape) > 1 else 1)
        made[name] = np.zeros((math.prod(shape) // width, width), int)
    writes = {name: np.zeros_like(array) for name, array in made.items()}
    for t in transfers:
        source = trainer.parameter(t.source, t.source_name)
        block = source[t.source_row : t.source_row + t.rows, t.source_col : t.source_col + t.cols]
        there = (slice(t.served_row, t.served_row + t.rows), slice(t.served_col, t.served_col + t.cols))
        of_hf = hf[t.hf_name][t.hf_row : t.hf_row + t.rows, t.hf_col : t.hf_col + t.cols]
        assert block.shape == (t.rows, t.cols)
        assert np.array_equal(block, of_hf)
        assert made[t.served_name][there].shape == (t.rows, t.cols)
        made[t.served_name][there] = block
        writes[t.served_name][there] += 1
    return made, writes


@st.composite
def cases_and_formats(draw: st.DrawFn) -> tuple[Case, Quantization]:
    if draw(st.booleans()):
        return draw(cases(families=QUANTIZABLE)), "fp8_channel"
    return draw(cases()), "none"


def assert_filled_once(made: dict[str, Matrix], writes: dict[str, Matrix], expected: dict[str, Tensor]) -> None:
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        whole = tensor.reshape(made[name].shape).numpy()
        assert np.array_equal(made[name], whole), name
        assert np.array_equal(writes[name], whole != 0), name


@given(cases_and_formats())
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_served_element_is_written_once_from_the_right_one_by_a_rank_that_holds_it(drawn):
    assert_plan_is_right(*drawn)


@given(cases(families=("gpt_oss",)))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_element_of_alternating_gates_and_values_is_written_once(case):
    assert_plan_is_right(case, "none")


def test_servers_that_share_out_or_cannot_split_stacked_experts_are_refused():
    with pytest.raises(ValueError, match=r"^server expert=2: must be 1 for a gpt_oss model: SGLang loads stacked"):
        make_plan(make_arch("gpt_oss"), Mesh(), [ServerMesh(tensor=2, expert=2)])
    with pytest.raises(ValueError, match=r"^server tensor=2: does not divide intermediate_size=7$"):
        make_plan(make_arch("gpt_oss"), Mesh(), [ServerMesh(tensor=2)])


@given(cases(families=("deepseek_v3",)))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_element_of_latent_attention_is_written_once(case):
    assert_plan_is_right(case, "none")


@given(cases(families=("glm4_moe",)))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_element_of_heads_with_biases_beside_shared_experts_is_written_once(case):
    assert_plan_is_right(case, "none")


@pytest.mark.parametrize(("family", "reason"), [("deepseek_v3", "SGLang"), ("glm4_moe", "FP8 was not checked with sh")])
@pytest.mark.parametrize("quantization", ["fp8_block", "fp8_channel"])
def test_families_that_are_not_quantised_are_refused(family, reason, quantization):
    with pytest.raises(ValueError, match=rf"^quantize={quantization}: must be none for a {family} model: {reason}"):
        make_plan(make_arch(family), Mesh(), [ServerMesh(tensor=1)], quantization=quantization)


@pytest.mark.slow
@given(cases_and_formats())
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_served_element_of_very_many_cases_is_written_once(drawn):
    assert_plan_is_right(*drawn)


def assert_plan_is_right(case, quantization):
    plan = make_plan(case.arch, case.source, case.servers, quantization=quantization, element_size=ELEMENT_SIZE)
    hf = numbered_hf_tensors(case.arch)
    trainer = Trainer(
        case, lambda row, rank, size: row.rule.shard([hf[name] for name in row.hf], case.arch, rank, size)
    )
    matrices = {name: matrix(tensor) for name, tensor in hf.items()}
    sends = all_sends(plan)
    by_server_rank: defaultdict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for transfer in sends:
        by_server_rank[transfer.server, transfer.server_rank].append(transfer)
    for number, server in enumerate(case.servers):
        for server_rank in range(server.tensor):
            expected = NaiveServerRank(case.arch, server, server_rank).whole(hf)
            values = [t for t in by_server_rank[number, server_rank] if t.part == "value"]
            shapes = plan.served_shapes(number, server_rank)
            assert {name: shapes[name] for name in expected} == {name: t.shape for name, t in expected.items()}
            shapes_of_values, columns = {n: shapes[n] for n in expected}, plan.matrix_columns(number, server_rank)
            assert_filled_once(*execute(values, trainer, matrices, shapes_of_values, columns), expected)
            own_bytes = sum(
                int(t.count_nonzero()) * (1 if quantization != "none" and is_linear(name) else ELEMENT_SIZE)
                for name, t in expected.items()
            )
            own_bytes += sum(4 * math.prod(shapes[name]) for name in shapes.keys() - expected.keys())
            assert sum(plan.bytes_of(t) for t in plan.receives(number, server_rank)) == own_bytes
    assert_shared_fairly(plan, trainer, sends, max(t.numel() for t in hf.values()) * ELEMENT_SIZE)
    assert_both_sides_agree(plan, sends)


def is_linear(served_name: str) -> bool:
    return served_name.endswith(("_proj.weight", "w13_weight", "w2_weight"))


def assert_shared_fairly(plan: RefitPlan, trainer: Trainer, sends: list[Transfer], tensor_bytes: int) -> None:
    """Check that no rank sends more than the mean over the ranks with the same data, plus one tensor."""
    by_peers: Counter[frozenset[int]] = Counter()
    by_rank: Counter[int] = Counter()
    for transfer in sends:
        by_peers[trainer.peers(transfer.source, transfer.source_name)] += plan.bytes_of(transfer)
        by_rank[transfer.source] += plan.bytes_of(transfer)
    for rank, num_bytes in by_rank.items():
        share = sum(total / len(peers) for peers, total in by_peers.items() if rank in peers)
        assert num_bytes <= share + tensor_bytes


def assert_both_sides_agree(plan: RefitPlan, sends: list[Transfer]) -> None:
    """Check that both ends of a link have one order, and that its totals are those of its transfers."""
    sent, received = defaultdict(list), defaultdict(list)
    for transfer in sends:
        sent[transfer.source, transfer.server, transfer.server_rank].append(transfer)
    for number, server in enumerate(plan.servers):
        for server_rank in range(server.tensor):
            for transfer in plan.receives(number, server_rank):
                received[transfer.source, number, server_rank].append(transfer)
        assert plan.sources_of(number) == tuple(sorted({source for source, to, _ in sent if to == number}))
    assert sent == received
    assert plan.link_bytes() == {link: sum(map(plan.bytes_of, own)) for link, own in sent.items()}


def numbered_scales(case: Case, kind: str, block: Callable[[Tensor], tuple[int, int]]) -> dict[str, Tensor]:
    """Return scales of all quantised HF tensors by name, all different."""
    scales, start = {}, 1
    for name, tensor in numbered_hf_tensors(case.arch).items():
        if is_quantized(name):
            rows, cols = block(tensor)
            shape = -(-tensor.shape[0] // rows), -(-tensor.shape[1] // cols)
            scales[name.removesuffix("weight") + kind] = torch.arange(start, start + math.prod(shape)).reshape(shape)
            start += math.prod(shape)
    return scales


def assert_scales_arrive(
    case: Case, quantization: Quantization, kind: str, block: Callable[[Tensor], tuple[int, int]]
) -> None:
    plan = make_plan(case.arch, case.source, case.servers, quantization=quantization)
    scales = numbered_scales(case, kind, block)

    def shard(row: Row, rank: int, size: int) -> Tensor:
        """Return the scales of a shard, found by sharding tensors whose every value is the number of its scale."""
        spread = []
        for name, shape in zip(row.hf, row.rule.hf_shapes(case.arch), strict=True):
            rows, cols = block(torch.empty(shape))
            whole = scales[name.removesuffix("weight") + kind].repeat_interleave(rows, 0).repeat_interleave(cols, 1)
            spread.append(whole[: shape[0], : shape[1]])
        part = row.rule.shard(spread, case.arch, rank, size)
        rows, cols = block(part)
        return part[::rows, ::cols]

    trainer = Trainer(case, shard)
    matrices = {name: matrix(tensor) for name, tensor in scales.items()}
    for number, server in enumerate(case.servers):
        for server_rank in range(server.tensor):
            naive = NaiveServerRank(case.arch, server, server_rank, split_inputs=quantization == "fp8_block")
            expected = {}
            for layer in range(case.arch.num_layers):
                expected.update(naive.linear(scales, f"model.layers.{layer}.", kind))
            received = [t for t in plan.receives(number, server_rank) if t.part == "scale"]
            shapes = {name: s for name, s in plan.served_shapes(number, server_rank).items() if name.endswith(kind)}
            assert shapes == {name: tuple(tensor.shape) for name, tensor in expected.items()}
            assert_filled_once(*execute(received, trainer, matrices, shapes, {}), expected)


@given(cases(unit=BLOCK, families=QUANTIZABLE))
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_scales_of_blocks_go_where_their_blocks_go(case):
    assert_scales_arrive(case, "fp8_block", "weight_scale_inv", lambda tensor: (BLOCK, BLOCK))


@given(cases(families=QUANTIZABLE))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_row_of_a_rank_gets_its_scale_once_however_many_ranks_hold_parts_of_it(case):
    assert_scales_arrive(case, "fp8_channel", "weight_scale", lambda tensor: (1, tensor.shape[1]))
