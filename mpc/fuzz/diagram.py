"""The parts of docs/PROTOCOL.md that are printed from the code: `python -m mpc.fuzz.diagram --write` updates it.

Each part stands between `<!-- name -->` and `<!-- /name -->`; a test fails when file and code differ.
"""

import re
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mpc.protocol import channel, encoding, sealing, signing
from mpc.protocol.encoding import Limit, Name, Record
from mpc.protocol.messages import KINDS, Binding
from mpc.protocol.rounds import ANY_ROUND, RULES, Role, Round, Rule, Times

PAGE = Path(__file__).parents[2] / "docs" / "PROTOCOL.md"
_ORDER = (Role.AUTHOR, Role.PARTY, Role.ENCLAVE, Role.APPROVER, Role.RECIPIENT)  # in the diagram, from the left
_TIMES = {Times.ONE: "", Times.EACH: " of each", Times.QUORUM: " of a quorum"}


def table_of_rounds() -> str:
    """RULES, a row for each."""
    lines = [
        (
            str(place.value),
            place.name.lower(),
            _kind(kind),
            rule.speaker.value,
            rule.times.value,
            rule.then.name.lower(),
        )
        for place, kind, rule in _rules()
    ]
    lines += [("", "any", _kind(kind), words, "", "the session ends") for kind, words in ANY_ROUND.items()]
    return _table(("", "in round", "message", "said by", "how often", "then"), lines)


def diagram() -> str:
    """RULES as a Mermaid sequence diagram: each message goes to those who speak next. The coordinator is left out."""
    lines = ["```mermaid", "sequenceDiagram", *(f"    participant {role.value}" for role in _ORDER)]
    for place, kind, rule in _rules():
        lines.append(f"    Note over {_ORDER[0].value},{_ORDER[-1].value}: {place.value} {place.name.lower()}")
        next_speaker = next(iter(RULES[rule.then].values())).speaker
        lines.append(f"    {rule.speaker.value}->>{next_speaker.value}: {_kind(kind)}{_TIMES[rule.times]}")
    return "\n".join([*lines, "```"])


def _rules() -> list[tuple[Round, type[Record], Rule]]:
    return [(place, kind, rule) for place, rules in RULES.items() for kind, rule in rules.items()]


def records() -> str:
    """Every record that is signed or hashed: its fields, their types and limits."""
    parts = []
    for record in _reachable([*KINDS.values(), Binding]):
        kind = next((f", kind `{name}`" for name, message in KINDS.items() if message is record), "")
        hints = get_type_hints(record, include_extras=True)
        rows = [(f"`{name}`", _type(hint)) for name, hint in hints.items()]
        words = (record.__doc__ or "").strip().split("\n")[0]
        words = "" if words.startswith(f"{record.__name__}(") else f": {words}"  # a dataclass makes one of its fields
        parts.append(f"**{record.__name__}**{kind}{words}\n\n{_table(('field', 'what it is'), rows)}")
    return "\n\n".join(parts)


def limits() -> str:
    """The named maxima."""
    rows = [
        ("a signed payload", f"{encoding.MESSAGE_BYTES_MAX:,} bytes"),
        ("items in it", f"{encoding.ITEMS_MAX:,}"),
        ("its depth", f"{encoding.DEPTH_MAX}"),
        ("an envelope", f"{signing.ENVELOPE_BYTES_MAX:,} bytes"),
        ("a frame of the enclave's channel", f"{channel.BODY_BYTES_MAX:,} bytes and {channel.HEADER.size} before"),
        ("a chunk", f"{sealing.CHUNK_BYTES:,} bytes, and {sealing.TAG_BYTES} of its tag"),
        ("a wrapped secret", f"{sealing.WRAPPED_BYTES:,} bytes, always"),
    ]
    return _table(("what", "at most"), rows)


def padding() -> str:
    """What a stream's length shows, by example."""
    mib = sealing.CHUNK_BYTES
    rows = []
    for length in (0, 1, 4096, 4097, 100_000, mib - 1, mib, mib + 1, 10 * mib + 70_000):
        count = sealing.chunk_count(length)
        rows.append((f"{length:,}", str(count), f"{sealing.chunk_bytes(length, count - 1):,}"))
    return _table(("bytes", "chunks", "bytes of the last one"), rows)


def frames() -> str:
    """The kinds of frame on the enclave's channel."""
    return _table(("kind", "name"), [(str(frame.value), frame.name.lower()) for frame in channel.Frame])


PARTS: dict[str, Callable[[], str]] = {
    "rounds": table_of_rounds,
    "diagram": diagram,
    "records": records,
    "limits": limits,
    "padding": padding,
    "frames": frames,
}


def filled(page: str) -> str:
    """The page with every part as the code has it; raises KeyError for a part that no code prints."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{PARTS[name]()}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", fill, page, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """Write the page, or say whether it is up to date."""
    page = PAGE.read_text()
    if "--write" in arguments:
        PAGE.write_text(filled(page))
    elif filled(page) != page:
        print(f"{PAGE} differs from the code; run: python -m mpc.fuzz.diagram --write", file=sys.stderr)
        return 1
    return 0


def _kind(message: type[Record]) -> str:
    return next(name for name, kind in KINDS.items() if kind is message)


def _reachable(records: Iterable[type[Record]]) -> list[type[Record]]:
    """Those, and the records that they are made of, each behind the first that uses it."""
    found: list[type[Record]] = []
    for record in records:
        if record not in found:
            parts = [
                part for hint in get_type_hints(record, include_extras=True).values() for part in _records_in(hint)
            ]
            found += [record, *(part for part in _reachable(parts) if part not in found)]
    return found


def _records_in(hint: Any) -> list[type[Record]]:
    if isinstance(hint, type) and issubclass(hint, Record):
        return [hint]
    return [part for inner in get_args(hint) for part in _records_in(inner)]


def _type(hint: Any) -> str:
    """Words for a type: `48 bytes`, `1 to 1,000 × Table`."""
    if hint == Name:
        return "name"
    limit = Limit(0, 0)
    if get_origin(hint) is Annotated:
        hint, limit = get_args(hint)
    size = f"{limit.low:,}" if limit.low == limit.high else f"{limit.low:,} to {limit.high:,}"
    if get_origin(hint) in (Union, types.UnionType):
        return f"{_type(get_args(hint)[0])}, or null"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"{size} × {_type(get_args(hint)[0])}"
    words = {
        str: f"text of {size} characters",
        int: f"number, {size}",
        bytes: f"{size} bytes",
        bool: "`true` or `false`",
    }
    return words.get(hint, str(hint.__name__))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
