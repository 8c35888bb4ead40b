import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.config.objective import ObjectiveConfig
from megatron_dypo.config.presets import PRESETS, with_preset
from megatron_dypo.config.schedule import Schedule, bounds, weight_at

SHARED = Path(__file__).parents[4] / "shared" / "baselines_example.json"

numbers = st.floats(0, 10)
schedules = st.builds(
    Schedule,
    start=numbers,
    end=numbers,
    steps=st.integers(1, 50),
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 20),
)


@given(schedules, st.integers(0, 100))
def test_a_weight_stays_within_its_bounds_and_ends_at_its_end(schedule, step):
    low, high = bounds(schedule)
    assert low - 1e-9 <= weight_at(schedule, step) <= high + 1e-9
    assert schedule.at(schedule.warmup) == pytest.approx(schedule.start)
    assert schedule.at(schedule.warmup + schedule.steps) == schedule.end
    assert schedule.at(10**6) == schedule.end


def test_the_shapes_between_the_ends():
    def at(shape, step):
        return Schedule(start=1.0, end=0.0, steps=4, shape=shape).at(step)

    assert [at("linear", step) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [at("constant", step) for step in range(5)] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert [at("cosine", step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert [Schedule(start=2.0, end=2.0, steps=1, warmup=4).at(step) for step in range(6)] == [0, 0.5, 1, 1.5, 2, 2]
    assert weight_at(0.3, 7) == 0.3


@pytest.mark.skipif(not SHARED.is_file(), reason="the published values lie outside the repository")
def test_chords_schedule_is_the_published_one():
    values = json.loads(SHARED.read_text())["chord_mu_schedule (warmup 0, decay 200, 0.9 -> 0.05)"]
    schedule = Schedule(**PRESETS["chord_mu_paper"]["options"]["mu"])
    for step, value in values.items():
        assert schedule.at(int(step)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps=0: must be positive"),
        ({"warmup": -1}, "warmup=-1: must not be negative"),
        ({"end": float("nan")}, "end=nan: must be finite"),
    ],
)
def test_a_broken_schedule_is_refused_by_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"start": 1.0, "end": 0.0, "steps": 3, **fields})


def test_a_weight_is_held_to_its_range_at_every_step():
    ObjectiveConfig(alpha=Schedule(start=1.0, end=0.0, steps=3))
    for name, low in (("alpha", 1.2), ("gamma", -0.1), ("entropy_coef", -0.1)):
        fields: dict[str, Any] = {name: Schedule(start=low, end=0.5, steps=3)}
        with pytest.raises(ValueError, match=f"^{name}="):
            ObjectiveConfig(**fields)


def test_the_users_keys_lie_over_those_of_the_preset_and_options_over_options():
    tree = {"objective": {"preset": "chord_mu_paper", "clip_high": 0.3, "options": {"phi": True}}}
    section = with_preset(tree)["objective"]
    assert section["name"] == "chord"
    assert (section["clip_low"], section["clip_high"]) == (0.2, 0.3)
    assert section["options"] == {"mu": PRESETS["chord_mu_paper"]["options"]["mu"], "phi": True}
    assert tree["objective"]["options"] == {"phi": True}, "the user's mapping is as it was"
    assert with_preset({"run": {}}) == {"run": {}}


def test_a_preset_that_does_not_exist_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="preset=lufy_paper: no such preset; did you mean luffy_paper"):
        ObjectiveConfig(preset="lufy_paper")


@pytest.mark.parametrize("name", PRESETS)
def test_a_resolved_config_with_its_preset_reads_as_itself(name):
    from megatron_dypo.config.reading.load import dump_config, parse_config
    from megatron_dypo.config.reading.yaml_text import read_yaml

    tree = {"model": {"hf_path": "m"}, "data": {"prompts": ["p"]}, "objective": {"preset": name}}
    text = dump_config(parse_config(tree, where="test"))
    assert dump_config(parse_config(read_yaml(text, "dumped"), where="dumped")) == text
