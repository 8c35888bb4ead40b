from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_dypo.batching.queues import Queues, dump_samples
from megatron_dypo.config.data import DataConfig
from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.tree import Config, EvalConfig, ModelConfig, RunConfig
from megatron_dypo.ledger import Ledger
from megatron_dypo.objective.recipes.registry import build_objective
from megatron_dypo.types import DropReason
from tests.unit.loop_cases import Prompts, make_config, make_run
from tests.unit.objective_cases import random_groups


def shares(run, states, num_replicas):
    """Orders in the queue of each of ``num_replicas`` replicas after a resume."""
    orders = []
    for dp_rank in range(num_replicas):
        queues = Queues()
        run._share_queues(queues, states, SimpleNamespace(data=num_replicas, dp_rank=dp_rank))
        orders.append([[(s.order, s.member) for s in group] for group in queues.groups()])
    return orders


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7])
def test_what_waited_is_shared_as_whole_groups_whatever_the_number_of_replicas(num_replicas):
    from megatron_dypo import run

    groups = random_groups(3, num_hard=2, num_mid=3)
    states = [dump_samples([s for g in part for s in g]) for part in (groups[1::2], groups[::2])]
    queues = shares(run, states, num_replicas)
    members = sorted(key for queue in queues for group in queue for key in group)
    assert members == [(s.order, s.member) for g in groups for s in g]
    assert all(len({order for order, _ in group}) == 1 for queue in queues for group in queue)
    assert max(map(len, queues)) - min(map(len, queues)) <= 1


def config(objective, *, eval_prompts=()):
    return Config(
        run=RunConfig(steps=10),
        model=ModelConfig(hf_path="m"),
        data=DataConfig(prompts=("p",)),
        objective=objective,
        eval=EvalConfig(prompts=eval_prompts),
    )


def test_servers_start_only_where_a_step_that_is_left_asks_one():
    from megatron_dypo.run import uses_servers

    sft, both = ObjectiveConfig(name="sft"), ObjectiveConfig(name="sft_then_rl", sft_steps=4)
    assert not uses_servers(config(sft), build_objective(sft), 0)
    assert uses_servers(config(sft, eval_prompts=("e",)), build_objective(sft), 0)
    assert uses_servers(config(both), build_objective(both), 0)
    assert not uses_servers(config(both), build_objective(both), 10)


def test_a_checkpoint_that_another_version_wrote_is_named_with_what_it_lacks():
    from megatron_dypo.run import require_known_state

    whole = {"cursor": 16, "unfinished": [], "ledger": {}, "batches": 2, "is_mid_batch": False, "data": {}}
    require_known_state(Path("c/step_000002"), whole | {"of_a_later_version": 1})
    first_release = {key: whole[key] for key in ("cursor", "unfinished", "batches", "is_mid_batch")}
    with pytest.raises(ValueError, match=r"^c/step_000002/trainer_state.json: trainer: has no data, ledger: another "):
        require_known_state(Path("c/step_000002"), first_release)


def test_fewer_steps_than_are_done_are_refused_and_no_refused_start_rewrites_the_config(tmp_path):
    from megatron_dypo import run

    folder = tmp_path / "checkpoints" / "step_000003"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("run: {steps: 3}\n")
    layout = SimpleNamespace(is_global_leader=True)

    def start(steps):
        return run._prepare_folder(
            Config(
                run=RunConfig(dir=str(tmp_path), steps=steps),
                model=ModelConfig(hf_path="m"),
                data=DataConfig(prompts=("p",)),
            ),
            layout,
        )

    with pytest.raises(ValueError, match=r"run\.steps=2: is below the 3 steps done in .*step_000003"):
        start(2)
    assert start(3) == folder
    assert (tmp_path / "config.yaml").read_text() == "run: {steps: 3}\n"
    (tmp_path / "config.yaml").write_text("[")
    assert start(4) == folder


def test_a_collection_in_the_background_stops_with_its_run():
    from megatron_dypo import run

    stopped = []
    run._stop_background(SimpleNamespace(background=SimpleNamespace(stop=lambda: stopped.append(True))))
    run._stop_background(SimpleNamespace(background=None))
    assert stopped == [True]


def test_a_checkpoint_accounts_for_prompts_that_were_too_long_and_are_not_counted_yet(tmp_path):
    from megatron_dypo import run

    held = make_run(["http://127.0.0.1:9"], make_config(tmp_path))
    held.leader.cursor = 4
    held.leader.ledger.draw(4)
    held.leader.unfinished, drops = Prompts(too_long=[0, 2]).take(0, 4)
    held.leader.drops.append(drops)
    drawn = run._drawn(held.leader, held.layout)
    assert (drawn["cursor"], drawn["unfinished"]) == (4, [1, 3])
    stored = Ledger.from_json(drawn["ledger"])
    assert (stored.drawn, dict(stored.dropped)) == (4, {DropReason.TOO_LONG: 2})
    assert held.leader.ledger.dropped.total() == 0, "the run itself counts them when it admits groups"
