"""The mutants that ``tests.mutation`` makes."""

import ast
import json
from pathlib import Path

from tests.mutation.catalogue import ROOMS, files_of
from tests.mutation.operators import mutants_of, sample
from tests.mutation.run import EQUIVALENTS

SOURCE = '''"""A module: 1 + 1."""
from x import y

def f(a: int, b: float = 0.5) -> bool:
    """Say 2 < 3."""
    assert a < 1, "not a mutant"
    if a < b and not y(a, b, clip=True):
        y.put(a)
        raise ValueError(f"{a + b}")
    return sorted(g for g in a[1:] if g > 2)
'''
ROOT = Path(__file__).resolve().parents[3]


def changes(source):
    return {(m.old, m.new) for m in mutants_of("f.py", source)}


def test_mutants_are_slips_that_a_hand_makes():
    expected = {
        ("a < b", "(a <= b)"), ("a < b", "(a > b)"), ("not y(a, b, clip=True)", "(y(a, b, clip=True))"),
        ("y(a, b, clip=True)", "(y(b, a, clip=True))"), ("y(a, b, clip=True)", "(y(a, b))"), ("y.put(a)", "pass"),
        ("True", "False"), ("0.5", "1.0"), ("1", "2"), ("g > 2", "True"), ("a[1:]", "(a[:])"),
    }  # fmt: skip
    assert expected <= changes(SOURCE)


def test_what_never_runs_is_left_alone():
    seen = [old for old, _ in changes(SOURCE)]
    assert not any("1 + 1" in old or "2 < 3" in old or "a < 1" in old or "a + b" in old for old in seen)


def test_every_mutant_compiles_and_differs_and_says_where_it_is():
    for mutant in mutants_of("f.py", SOURCE):
        changed = mutant.apply(SOURCE.encode()).decode()
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert (mutant.function, SOURCE.splitlines()[mutant.line - 1].count(mutant.old.splitlines()[0]) > 0) == (
            "f",
            True,
        )


def test_a_sample_takes_from_every_rule_and_is_the_same_for_a_seed():
    mutants = mutants_of("f.py", SOURCE)
    rules = {m.rule for m in mutants}
    drawn = sample(mutants, len(rules), 3)
    assert {m.rule for m in drawn} == rules
    assert drawn == sample(mutants, len(rules), 3) != sample(mutants, len(rules), 4)
    assert len(sample(mutants, 10_000, 0)) == len(mutants)


def test_the_rooms_together_have_more_mutants_than_the_bar_asks_for():
    for name, room in ROOMS.items():
        assert files_of(room, ROOT), name
    assert sum(room.count for room in ROOMS.values()) >= 250


def test_every_equivalent_mutant_has_a_reason():
    for row in json.loads(EQUIVALENTS.read_text()):
        assert row.keys() == {"path", "function", "text", "old", "new", "reason"}
        assert len(row["reason"].split()) >= 4
