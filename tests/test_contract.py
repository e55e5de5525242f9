"""What a contract may not be."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from mpc.fuzz.world import Setting, World
from mpc.protocol import contract as terms
from mpc.protocol.errors import ContractError, EncodingError


@cache
def world() -> World:
    """A session with everything in it, released."""
    made = World(1, Setting(parties=2, receivers=1, approvers=2, quorum=1))
    made.fair()
    return made


def table(**changes: Any) -> terms.Table:
    one = world().contract.tables[0]
    return replace(one, **changes)


def contracts() -> Iterator[tuple[str, Callable[[], object]]]:
    """What a contract may not be, each with a word of the verdict."""
    good = world().contract
    first, second, *rest = good.participants
    number = terms.Column("n", "int64")
    yield "participants", lambda: replace(good, participants=(first, first, *rest))
    yield "participants", lambda: replace(good, participants=(first, replace(second, key=first.key), *rest))
    yield "participants", lambda: replace(good, participants=(first, replace(second, name="enclave"), *rest))
    yield "participants", lambda: replace(good, participants=())
    yield "without a participant", lambda: replace(good, participants=(first, *rest))
    yield "without a participant", lambda: replace(good, recipients=("nobody",))
    yield "without a participant", lambda: replace(good, receipt_recipients=("nobody",))
    yield "without a participant", lambda: replace(good, approvals=terms.Approvals(0, ("nobody",)))
    yield "recipients", lambda: replace(good, recipients=())
    yield "recipients", lambda: replace(good, recipients=("party-0", "party-0"))
    yield "quorum", lambda: terms.Approvals(2, ("a",))
    yield "quorum", lambda: terms.Approvals(2, ("a", "a"))
    yield "deadlines", lambda: terms.Deadlines(2, 2, 3)
    yield "deadlines", lambda: terms.Deadlines(1, 3, 2)
    yield "tables", lambda: replace(good, tables=(good.tables[0], good.tables[0]))
    yield "columns", lambda: replace(good, tables=(good.tables[0], replace(good.tables[1], columns=(number,))))
    yield "column is named twice", lambda: table(columns=(number, replace(number, name="N")))
    yield "entity", lambda: table(rule=terms.Rule("aggregate", ("nothing",), 10))
    yield "rule: k", lambda: terms.Rule("aggregate", (), 0)
    yield "rule: k", lambda: terms.Rule("exact", (), 1)
    yield "buckets", lambda: replace(number, buckets=(1.0,))
    yield "buckets", lambda: replace(number, buckets=(2.0, 1.0))
    yield "buckets", lambda: replace(number, buckets=(1.0, 1.0, 2.0))
    yield "clamp", lambda: replace(number, clamp=(1.0,))
    yield "clamp", lambda: replace(number, clamp=(2.0, 1.0))
    yield "a number", lambda: terms.Column("s", "string", ("sum",))
    yield "zero is debug mode", lambda: replace(good.enclave.measurements[0], pcr1=bytes(48))
    yield "measurements", lambda: replace(good.enclave, measurements=())
    yield "epochs_max", lambda: replace(good, epochs_max=0)
    yield "epochs_max", lambda: replace(good, epochs_max=101)
    yield "version", lambda: replace(good, version=2)  # type: ignore[arg-type]
    yield "random", lambda: replace(good, random=bytes(31))


@pytest.mark.parametrize("number", range(32))
def test_a_contract_that_contradicts_itself_is_refused(number: int) -> None:
    word, make = list(contracts())[number]
    with pytest.raises((ContractError, EncodingError), match=word):
        make()


def test_every_contradiction_is_tried() -> None:
    assert len(list(contracts())) == 32


def test_two_contracts_of_the_same_text_are_two_sessions() -> None:
    good = world().contract
    assert replace(good, random=bytes(32)).digest != good.digest == replace(good).digest
