"""A sealed-bid auction of equal units: each party that owns the table is a bidder and may win one unit.

What losers bid never leaves, but for the highest losing bid, which is the price of the second-price auction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc

from enclave_runtime.programs import Disclosure, common
from enclave_runtime.programs.common import Stack, example, guarded, read
from enclave_runtime.programs.duck import encode
from mpc.protocol.contract import Contract
from mpc.protocol.encoding import Limit, Name, Record
from mpc.protocol.errors import ContractError


@dataclass(frozen=True)
class Parameters(Record):
    table: Name = field(metadata=example('"bids"'))
    bid: Name = field(metadata=example('"cents"'))
    units: Annotated[int, Limit(1, 1000)] = field(metadata=example("1"))
    price: Literal["first", "second"] = field(metadata=example('"second"'))
    reserve: Annotated[int, Limit(0, 2**63 - 1)] = field(metadata=example("0, or the lowest bid that counts"))
    tell: Literal["all", "own"] = field(metadata=example('"own": a bidder learns of itself only; or "all"'))


def warm() -> None:
    """The one function of Arrow's."""
    pc.max(pa.array([1, None]))


def check(contract: Contract) -> Disclosure:
    """Raises ContractError."""
    given, stack = _plan(contract)
    bidders = [table.owner for table in stack.tables]
    price = (
        "its own bid"
        if given.price == "first"
        else f"for every winner the highest losing bid, or {given.reserve} where nobody loses"
    )
    whose = "every bidder"
    if given.tell == "own":
        whose = "every bidder, in the result of a recipient that does not bid; the bidder alone, in a bidder's"
    unit = "" if given.units == 1 else f"; {given.units} units, one for a bidder"
    rules = [
        f"the highest bids win{unit}; a bidder's bid is its highest {stack.name}.{given.bid}, {given.reserve} or more",
        f"of equal bids the one wins whose bidder comes first in {', '.join(bidders)}",
        *(common.exactly(table) for table in stack.tables),
    ]
    told = common.warnings(contract, stack.tables)
    if given.price == "second":
        told.append("the price of a second-price auction is the highest losing bid, without its bidder's name")
        if len(bidders) <= given.units + 1:
            told.append("there are so few bidders that the price tells whose bid it was")
    columns = (("bidder", whose), ("won", "whether it gets a unit"), ("price", f"what a winner pays: {price}"))
    return Disclosure(columns, tuple(rules), contract.recipients, tuple(told))


def run(contract: Contract, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    """Returns: recipient → a row for each bidder, in the contract's order; with tell = "own", a bidder gets its own.

    Raises: ProgramRefused.
    """
    return guarded(contract, lambda: _run(contract, tables))


def _plan(contract: Contract) -> tuple[Parameters, Stack]:
    given = read(contract, Parameters)
    stack = common.stack(contract, "program.parameters.table", given.table)
    stack.column("program.parameters.bid", given.bid, ("int64",))
    if len(stack.tables) < 2:
        raise ContractError(
            f"program.parameters.table: only {stack.owners} owns {given.table}", expected="two bidders or more"
        )
    if stack.limited:
        raise ContractError(
            f"{stack.limited[0].owner}'s rule for {given.table} is aggregate, and a price is somebody's bid",
            expected='a rule with kind = "exact" of every bidder',
        )
    return given, stack


def _run(contract: Contract, tables: Sequence[pa.Table]) -> dict[str, bytes]:
    given, stack = _plan(contract)
    bidders = [table.owner for table in stack.tables]
    highest = [pc.max(tables[source][given.bid]).as_py() for source in stack.sources]
    bids = [(bid, i) for i, bid in enumerate(highest) if bid is not None and bid >= given.reserve]
    ranked = sorted(bids, key=lambda bid: (-bid[0], bid[1]))
    winners, losers = ranked[: given.units], ranked[given.units :]
    second = losers[0][0] if losers else given.reserve
    paid = {bidders[i]: bid if given.price == "first" else second for bid, i in winners}
    results = {}
    for recipient in contract.recipients:
        shown = [recipient] if given.tell == "own" and recipient in bidders else bidders
        results[recipient] = encode(
            ["bidder", "won", "price"],
            [
                pa.array(shown, pa.string()),
                pa.array([bidder in paid for bidder in shown], pa.bool_()),
                pa.array([paid.get(bidder) for bidder in shown], pa.int64()),
            ],
        )
    return results
