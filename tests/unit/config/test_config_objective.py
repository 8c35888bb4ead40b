"""The objective's section: every number is finite and in its range, and the bounds of u include 1."""

import math
from dataclasses import fields

import pytest

from megatron_dypo.config.distillation.opd import OpdConfig
from megatron_dypo.config.objective import (
    LOG_RATIO_LIMIT,
    AutoAlphaConfig,
    ImportanceConfig,
    ObjectiveConfig,
    OldLogpConfig,
    ReferenceConfig,
)

SECTIONS = (ObjectiveConfig, ImportanceConfig, ReferenceConfig, OldLogpConfig)
FLOATS = [
    (section, f.name)
    for section in SECTIONS
    for f in fields(section)
    if ("float" in f.type or f.type.startswith("Weight")) and "tuple" not in f.type
]
BOUNDS = ("token_bounds", "sequence_bounds")
INTEGERS = [(section, f.name) for section in SECTIONS for f in fields(section) if f.type == "int"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(("section", "name"), FLOATS)
def test_every_number_is_finite(section, name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}: must be"):
        section(**{name: value})


def test_every_number_of_the_sections_is_tried():
    assert {name for _, name in FLOATS} >= {
        "alpha",
        "gamma",
        "beta_gal",
        "kl_coef",
        "cap",
        "sequence_max_gap",
        "dual_clip",
    }
    assert {name for _, name in INTEGERS} >= {"constant_length", "rl_only_steps", "refresh_every", "check_every"}


@pytest.mark.parametrize(("section", "name"), INTEGERS)
def test_a_whole_number_fits_into_64_bits_and_is_not_negative(section, name):
    with pytest.raises(ValueError, match=f"^{name}: a number of 4001 bits: must be below"):
        section(**{name: 2**4000})
    with pytest.raises(ValueError, match=f"^{name}=-1: must"):
        section(**{name: -1})


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize(
    "value",
    [
        (0.2, 0.9),
        (1.1, 2.0),
        (1.0, 1.0),
        (-0.1, 2.0),
        (0.5, math.inf),
        (math.nan, 2.0),
        (2.0, 0.5),
        (0.5, 1.0, 2.0),
        (0.5,),
    ],
)
def test_bounds_that_exclude_agreement_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        ImportanceConfig(**{name: value})


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("value", [(0.0, 1.0), (1.0, 1.5), (0.5, 2.0)])
def test_bounds_with_one_inside_are_taken(name, value):
    assert getattr(ImportanceConfig(**{name: value}), name) == value


def test_a_cap_is_positive():
    assert ImportanceConfig(cap=0.7).is_on()
    for cap in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"^cap={cap}: must be positive"):
            ImportanceConfig(cap=cap)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("gamma", -1.0),
        ("beta_gal", 0.0),
        ("kl_coef", -1e-3),
        ("clip_low", 1.0),
        ("clip_low", -0.1),
        ("clip_high", -0.1),
        ("clip_high", 1e9),
        ("dual_clip", 1.0),
        ("dual_clip", 1e9),
        ("advantage_epsilon", 0.0),
        ("constant_length", 0),
    ],
)
def test_a_number_outside_its_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        ObjectiveConfig(**{name: value})


def test_the_ends_of_the_ranges_are_inside():
    for options in (
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"gamma": 0.0},
        {"clip_low": 0.0, "clip_high": 0.0},
        {"clip_high": 1e8},
    ):
        ObjectiveConfig(**options)
    assert math.exp(LOG_RATIO_LIMIT) > 1 + 1e8  # no clip bound reaches the tangent
    with pytest.raises(ValueError, match="sequence_max_gap=0"):
        ImportanceConfig(sequence_max_gap=0.0)


def test_a_correction_is_on_where_any_option_is():
    assert not ImportanceConfig().is_on()
    for options in (
        {"cap": 2.0},
        {"token_bounds": (0.5, 2.0)},
        {"sequence_bounds": (0.5, 2.0)},
        {"sequence_max_gap": 1.0},
    ):
        assert ImportanceConfig(**options).is_on()


def test_the_defaults_are_the_papers():
    """The paper's section 4 and table of hyper-parameters: GRPO at ε = 0.2, α = 0.5, γ = β = 1, frozen reference."""
    plain = {f.name: getattr(ObjectiveConfig(), f.name) for f in fields(ObjectiveConfig)}
    assert plain == {
        "preset": None,
        "entropy_coef": 0.0,
        "trace_normalization": "same",
        "name": "dypo",
        "alpha": 0.5,
        "auto_alpha": AutoAlphaConfig(start=0.5, low=0.1, high=0.9, smoothing=0.5),
        "gamma": 1.0,
        "beta_gal": 1.0,
        "gal_coefficients": "exact",
        "gal_clip": "none",
        "ratio": "token",
        "length_normalization": "sequence_mean",
        "constant_length": 8192,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "kl_coef": 0.0,
        "normalize_std": True,
        "advantage_epsilon": 1e-6,
        "replay": "off",
        "rl_only_steps": 0,
        "sft_steps": 0,
        "options": {},
        "hard_without_trace": "drop",
        "opd": OpdConfig(kl_coef=1.0, reward_coef=1.0, estimator="clipped"),
        "importance": ImportanceConfig(cap=None, token_bounds=None, sequence_bounds=None, sequence_max_gap=None),
        "reference": ReferenceConfig(mode="frozen", refresh_every=100),
    }
    assert OldLogpConfig() == OldLogpConfig(source="trainer", check_every=1)
    assert LOG_RATIO_LIMIT == 20
