"""The hashes of a file of pins are those of wheels for the Pythons that the file is for."""

from __future__ import annotations

import pytest

from tools.pin_hashes import is_usable, pythons_of

PLATFORM = "manylinux_2_28_x86_64"


@pytest.mark.parametrize(
    ("lines", "pythons"),
    [(["# Other words.", "a==1"], (11,)), (["# Words.", "# For CPython 3.12, 3.13.", "a==1"], (12, 13))],
)
def test_a_file_is_for_3_11_unless_a_comment_names_others(lines: list[str], pythons: tuple[int, ...]) -> None:
    assert pythons_of(lines) == pythons


@pytest.mark.parametrize(
    ("wheel", "usable"),
    [
        (f"a-1.0-cp311-cp311-{PLATFORM}.whl", {11}),
        (f"a-1.0-cp312-cp312-{PLATFORM}.whl", {12}),
        (f"a-1.0-cp312-abi3-{PLATFORM}.whl", {12, 13}),
        ("a-1.0-py3-none-any.whl", {11, 12, 13}),
        ("a-1.0-cp312-cp312-win_amd64.whl", set()),
        ("a-1.1-py3-none-any.whl", set()),
        ("a-1.0.tar.gz", set()),
    ],
)
def test_a_wheel_is_usable_on_its_pythons_alone(wheel: str, usable: set[int]) -> None:
    assert {python for python in (11, 12, 13) if is_usable(wheel, "1.0", (python,))} == usable
