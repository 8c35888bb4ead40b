from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.loop.books.ledger import Ledger, OpenDraws, balance
from megatron_dypo.metrics.names import lookup
from megatron_dypo.types import DropReason, Treatment

counts = st.integers(0, 1000)
ledgers = st.builds(
    Ledger,
    drawn=counts,
    trained=st.dictionaries(st.sampled_from([Treatment.REINFORCE, Treatment.DISTILL, Treatment.MIX]), counts).map(
        Counter
    ),
    dropped=st.dictionaries(st.sampled_from(DropReason), counts).map(Counter),
)


@given(ledgers)
def test_a_ledger_survives_a_checkpoint(ledger):
    assert (
        balance([(Ledger.from_json(ledger.as_json()), OpenDraws())]).counts()
        == balance([(ledger, OpenDraws())]).counts()
    )


@given(st.lists(st.tuples(ledgers, counts, counts), max_size=4))
def test_the_difference_is_what_no_account_holds(books):
    found = balance([(ledger, OpenDraws(waiting=w, in_flight=f)) for ledger, w, f in books])
    accounts = found.counts()
    assert found.difference == accounts["drawn"] - sum(count for name, count in accounts.items() if name != "drawn")
    assert accounts["drawn"] == sum(ledger.drawn for ledger, _, _ in books)


def test_each_account_is_a_metric_of_the_table():
    metrics = balance([(Ledger(drawn=3), OpenDraws(waiting=3))]).metrics()
    assert {lookup(name).name for name in metrics} == set(metrics)
    assert metrics["ledger/waiting"] == 3.0


def test_the_line_names_what_is_not_zero():
    ledger = Ledger(drawn=48)
    ledger.train(Treatment.REINFORCE, 12)
    ledger.train(Treatment.DISTILL, 8)
    ledger.drop(DropReason.EASY, 24)
    ledger.drop(DropReason.TOO_LONG)
    line = balance([(ledger, OpenDraws(waiting=3))]).line()
    assert line == "48 prompts drawn: 20 trained (RL 12, SFT 8), 24 Easy, 1 too long, 3 waiting"
    ledger.train(Treatment.MIX, 2)
    assert "22 trained (RL 12, SFT 8, both 2)" in balance([(ledger, OpenDraws())]).line()


def test_each_account_is_counted_under_its_own_name():
    ledger = Ledger(drawn=100)
    ledger.train(Treatment.REINFORCE, 1)
    ledger.train(Treatment.DISTILL, 2)
    ledger.train(Treatment.MIX, 13)
    for count, reason in enumerate(DropReason, start=3):
        ledger.drop(reason, count)
    found = balance([(ledger, OpenDraws(waiting=11, in_flight=12))])
    expected = {"drawn": 100, "trained_rl": 1, "trained_sft": 2, "trained_mix": 13, "waiting": 11, "in_flight": 12}
    expected |= {f"dropped_{reason.value}": count for count, reason in enumerate(DropReason, start=3)}
    assert found.counts() == expected
    assert found.difference == 2 * 100 - sum(expected.values())
