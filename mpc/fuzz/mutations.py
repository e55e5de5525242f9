"""Mutated bytes: of any format by the byte, of CBOR by its structure, of TOML by its lines.

A mutator draws from a `Random` that its caller owns, so that any engine may be behind it: a seed, Hypothesis, atheris.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random

BYTES_MAX = 1 << 16  # of what one mutation adds
DEPTH_MAX = 64  # to which CBOR is read
TRIES = 8
BYTE_STRING, TEXT_STRING, ARRAY, MAP, TAG = 2, 3, 4, 5, 6
INDEFINITE, BREAK = 31, b"\xff"

Mutator = Callable[[bytes, Random, Sequence[bytes]], bytes]
"""(seed, randomness, the other seeds) → mutated bytes."""


# Bytes.


def mutate_bytes(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """One to eight changes that know nothing of the format."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        random.choice(BYTE_MOVES)(out, random, others)
    return bytes(out)


def _place(out: bytearray, random: Random) -> tuple[int, int]:
    """A place, and the end of a short part that begins there."""
    start = random.randrange(len(out) + 1)
    return start, min(len(out), start + random.choice((1, 1, 2, 4, 16, 256)))


def _flip(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    if out:
        out[random.randrange(len(out))] ^= 1 << random.randrange(8)


def _number(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    """A length, offset or count at the edge of something."""
    width = random.choice((1, 2, 4, 8))
    edges = (0, 1, 0x7F, 0x80, 0xFF, (1 << 8 * width) - 1, 1 << 8 * width - 1, random.getrandbits(8 * width))
    number = random.choice(edges) % (1 << 8 * width)
    start, _end = _place(out, random)
    out[start : start + width] = number.to_bytes(width, random.choice(("big", "little")))


def _insert(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    start, _end = _place(out, random)
    out[start:start] = random.randbytes(random.choice((1, 2, 8, 64)))


def _remove(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    start, end = _place(out, random)
    del out[start:end]


def _repeat(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    start, end = _place(out, random)
    times = min(random.choice((1, 1, 2, 100)), BYTES_MAX // (end - start or 1))
    out[end:end] = out[start:end] * times


def _truncate(out: bytearray, random: Random, _: Sequence[bytes]) -> None:
    del out[random.randrange(len(out) + 1) :]


def _splice(out: bytearray, random: Random, others: Sequence[bytes]) -> None:
    """The beginning of this and the end of another."""
    other = random.choice(others) if others else b""
    out[random.randrange(len(out) + 1) :] = other[random.randrange(len(other) + 1) :]


BYTE_MOVES = (_flip, _flip, _number, _insert, _remove, _repeat, _truncate, _splice)


# CBOR.


@dataclass
class Item:
    """One data item as it is written; a map's keys and values take turns."""

    head: bytes
    body: bytes = b""  # of a string
    items: list["Item"] = field(default_factory=list)
    tail: bytes = b""  # the break of an indefinite length

    @property
    def major(self) -> int:
        return self.head[0] >> 5

    def become(self, other: "Item") -> None:
        self.head, self.body, self.items, self.tail = other.head, other.body, other.items, other.tail

    def count(self) -> None:
        """Say in the head what is there."""
        if not self.tail and self.major in (BYTE_STRING, TEXT_STRING):
            self.head = head(self.major, len(self.body))
        elif not self.tail and self.major in (ARRAY, MAP):
            self.head = head(self.major, len(self.items) >> (self.major == MAP))


def head(major: int, argument: int, width: int = 0) -> bytes:
    """The initial bytes of an item: the shortest, or of `width` bytes (1, 2, 4, 8) behind the first one."""
    if argument < 24 and not width:
        return bytes([major << 5 | argument])
    width = max(width, next(size for size in (1, 2, 4, 8) if argument < 1 << 8 * size))
    return bytes([major << 5 | 23 + width.bit_length()]) + argument.to_bytes(width, "big")


def read_cbor(data: bytes) -> Item:
    """Raises ValueError unless it is one whole item."""
    item, end = _read(data, 0, DEPTH_MAX)
    if end != len(data):
        raise ValueError("more than one item")
    return item


def _read(data: bytes, start: int, depth: int) -> tuple[Item, int]:
    if start >= len(data) or not depth:
        raise ValueError("too short, or too deep")
    major, size = data[start] >> 5, data[start] & 31
    place = start + 1 + (1 << size - 24 if 24 <= size < 28 else 0)
    item = Item(data[start:place])
    if size == INDEFINITE and BYTE_STRING <= major <= MAP:
        while data[place : place + 1] != BREAK:
            inner, place = _read(data, place, depth - 1)
            item.items.append(inner)
        item.tail = BREAK
        return item, place + 1
    value = size if size < 24 else int.from_bytes(item.head[1:], "big")
    if place > len(data) or size > 27:
        raise ValueError("not a head")
    if major in (BYTE_STRING, TEXT_STRING):
        item.body, place = data[place : place + value], place + value
        if place > len(data):
            raise ValueError("too short")
    for _ in range({ARRAY: value, MAP: 2 * value, TAG: 1}.get(major, 0)):
        inner, place = _read(data, place, depth - 1)
        item.items.append(inner)
    return item, place


def write_cbor(item: Item) -> bytes:
    return b"".join((item.head, item.body, *map(write_cbor, item.items), item.tail))


def walk(item: Item) -> Iterator[Item]:
    """The item, and every item in it."""
    yield item
    for inner in item.items:
        yield from walk(inner)


def mutate_cbor(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """One to four changes of the structure; sometimes, and of what is no CBOR, of the bytes."""
    try:
        root = read_cbor(data)
    except ValueError:
        return mutate_bytes(data, random, others)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        item = random.choice(list(walk(root)))
        before = write_cbor(item)
        for _again in range(TRIES):  # not every move has something to do everywhere
            random.choice(CBOR_MOVES)(item, random, others)
            if write_cbor(item) != before:
                break
    out = write_cbor(root)
    return mutate_bytes(out, random, others) if random.random() < 0.05 else out


def _drop(item: Item, random: Random, _: Sequence[bytes]) -> None:
    """An element; of a map a pair."""
    step = 2 if item.major == MAP else 1
    if len(item.items) >= step:
        start = random.randrange(len(item.items) // step) * step
        del item.items[start : start + step]
        item.count()


def _double(item: Item, random: Random, _: Sequence[bytes]) -> None:
    """An element or pair, once more: in a map a repeated key."""
    step = 2 if item.major == MAP else 1
    if len(item.items) >= step:
        start = random.randrange(len(item.items) // step) * step
        item.items[start:start] = deepcopy(item.items[start : start + step])
        item.count()


def _swap(item: Item, random: Random, _: Sequence[bytes]) -> None:
    """Two elements or pairs change places."""
    step = 2 if item.major == MAP else 1
    pairs = [item.items[i : i + step] for i in range(0, len(item.items), step)]
    if len(pairs) > 1:
        i, j = random.sample(range(len(pairs)), 2)
        pairs[i], pairs[j] = pairs[j], pairs[i]
        item.items = [inner for pair in pairs for inner in pair]


def _graft(item: Item, random: Random, others: Sequence[bytes]) -> None:
    """An item of another message stands here."""
    if others:
        try:
            item.become(random.choice(list(walk(read_cbor(random.choice(others))))))
        except ValueError:
            return


def _long_head(item: Item, random: Random, _: Sequence[bytes]) -> None:
    """The same number, not in its shortest form."""
    size = item.head[0] & 31
    if size < 27:
        value = size if size < 24 else int.from_bytes(item.head[1:], "big")
        item.head = head(item.major, value, random.choice([w for w in (1, 2, 4, 8) if w >= len(item.head)]))


def _false_count(item: Item, random: Random, _: Sequence[bytes]) -> None:
    """The head promises more or less than there is, or far too much."""
    real = len(item.body) or len(item.items)
    promised = random.choice((real + 1, max(0, real - 1), 1 << 16, (1 << 31) - 1, 1 << 40, (1 << 64) - 1))
    item.head = head(item.major, promised)


def _indefinite(item: Item, random: Random, _: Sequence[bytes]) -> None:
    if not item.tail and BYTE_STRING <= item.major <= MAP:
        if item.major in (BYTE_STRING, TEXT_STRING):
            cut = random.randrange(len(item.body) + 1)
            parts = (item.body[:cut], item.body[cut:])
            item.items, item.body = [Item(head(item.major, len(part)), part) for part in parts], b""
        item.head, item.tail = bytes([item.major << 5 | INDEFINITE]), BREAK


def _tag(item: Item, random: Random, _: Sequence[bytes]) -> None:
    """Dates, big numbers, fractions, sharing, regular expressions, COSE, sets, itself."""
    number = random.choice((0, 1, 2, 3, 4, 5, 18, 25, 28, 29, 30, 35, 36, 37, 43000, 55799, 256, 258, 260, 261, 98))
    inner = deepcopy(item)
    item.become(Item(head(TAG, number), items=[inner]))


def _nest(item: Item, random: Random, _: Sequence[bytes]) -> None:
    for _level in range(random.choice((1, 2, 4, 15, 16, 17, 40))):
        item.become(Item(head(ARRAY, 1), items=[Item(item.head, item.body, item.items, item.tail)]))


SCALARS = tuple(
    bytes.fromhex(scalar)
    for scalar in (
        *("00", "01", "17", "1818", "18ff", "190100", "1a00010000", "1a7fffffff", "1b001fffffffffffff"),
        *("1b0020000000000000", "1b7fffffffffffffff", "1bffffffffffffffff", "20", "37", "3bffffffffffffffff"),
        *("f4", "f5", "f6", "f7", "e0", "f820", "f8ff", "f90000", "f98000", "f93c00", "f97c00", "f97e00", "f97e01"),
        *("fa47c35000", "fb3ff0000000000000", "fb7ff0000000000001", "fb3ff199999999999a", "f90001"),
        *("40", "4100", "60", "6161", "61ff", "62c3a4", "63eda080", "80", "8100", "a0", "a10001", "a1616100", "ff"),
        *("c0606161", "c1f97e00", "c249010000000000000000", "d81c80", "d81d00", "5f40ff", "7f60ff", "9fff", "bfff"),
    )
)


def _scalar(item: Item, random: Random, _: Sequence[bytes]) -> None:
    """Another small value."""
    scalar = random.choice(SCALARS)
    item.become(Item(scalar[:1], scalar[1:]))


def _content(item: Item, random: Random, others: Sequence[bytes]) -> None:
    """Inside a string, which may be CBOR in its turn."""
    if item.body and item.major in (BYTE_STRING, TEXT_STRING):
        item.body = mutate_cbor(item.body, random, others)
        item.count()


def _size(item: Item, random: Random, _: Sequence[bytes]) -> None:
    """A string gets another length, a container many elements."""
    if item.major in (BYTE_STRING, TEXT_STRING):
        size = random.choice((0, 1, 31, 33, 47, 49, 1024, 1025, 16384, 16385, BYTES_MAX))
        item.body = (item.body or b"a")[:1] * size
    elif item.major in (ARRAY, MAP) and len(item.items) > 1:
        size = random.choice((8, 65, 1001, 4001))
        if size * len(write_cbor(item)) < BYTES_MAX * 8:
            item.items = (item.items[:2] * size)[: 2 * size]
    item.count()


CBOR_MOVES = (
    *(_drop, _double, _swap, _graft, _long_head, _false_count, _indefinite, _tag, _nest),
    *(_scalar, _scalar, _content, _content, _size),
)


# TOML.

VALUES = (
    *('""', '"x"', "0", "-1", "1e999", "nan", "-inf", "9" * 5000, "true", "[]", "{}", "[[]]", '["a", 1]'),
    *("1979-05-27T07:32:00Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59", "07:32:00"),
    *('"""\n"""', "'\\'", '"\\ud800"', '"\\U00110000"', '"0 s"', '"99999999999999999 d"', '"1.5 GiB"', '"-1 s"'),
    *("[" * 3000, "{a=" * 3000, "0x" + "f" * 400, "1_000", "{ a = 1, a = 2 }", '"' + "a" * 70_000 + '"'),
)


def mutate_toml(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """One to four changes of whole lines; sometimes of the bytes."""
    lines = data.decode(errors="replace").split("\n")
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        place = random.randrange(len(lines))
        key, equals, _value = lines[place].partition(" = ")
        change = random.randrange(6)
        if change == 0:
            lines[place] = f"{key}{equals}{random.choice(VALUES)}" if equals else random.choice(VALUES)
        elif change == 1:
            lines[place : place + 1] = []
        elif change == 2:
            lines[place:place] = [random.choice(lines)] if lines else []
        elif change == 3:
            lines[place] = random.choice(("[", "[[", "")) + "a." * random.choice((1, 30, 2000)) + "b" + equals + "1"
        elif change == 4 and others:
            lines[place:place] = [random.choice(random.choice(others).decode(errors="replace").split("\n"))]
        else:
            lines[place] = mutate_bytes(lines[place].encode(), random, others)[:BYTES_MAX].decode(errors="replace")
        lines = lines or [""]
    out = "\n".join(lines).encode()
    return mutate_bytes(out, random, others) if random.random() < 0.05 else out
