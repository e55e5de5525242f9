"""One encoding of everything that is signed or hashed: deterministic CBOR, typed and bounded.

Source: RFC 8949 section 4.2.1 (core deterministic encoding). Keys of one map are of one type, so the order
that `cbor2` calls canonical and the RFC's agree.
"""

import hashlib
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

import cbor2

from mpc.protocol.errors import EncodingError, LocalError

DIGEST_BYTES = 48
ITEMS_MAX = 200_000  # 1,000 parties with a table each of a dozen columns; as Python values 20 MB
_BYTES, _TEXT, _ARRAY, _MAP, _TAG = 2, 3, 4, 5, 6  # major types
DEPTH_MAX = 16  # contract → tables → columns → buckets is 7
MESSAGE_BYTES_MAX = 8 << 20  # a release of the largest contract with 1,000 of everybody is below 7 MiB


@dataclass(frozen=True)
class Limit:
    """Inclusive bounds: of an int its value, of bytes, text and tuples their length."""

    low: int
    high: int
    pattern: str = ""


Digest = Annotated[bytes, Limit(DIGEST_BYTES, DIGEST_BYTES)]
Bytes32 = Annotated[bytes, Limit(32, 32)]
Blob = Annotated[bytes, Limit(0, MESSAGE_BYTES_MAX)]
Name = Annotated[str, Limit(1, 64, r"[A-Za-z][A-Za-z0-9_-]*")]
Text = Annotated[str, Limit(0, 16384)]
Count = Annotated[int, Limit(0, 2**53 - 1)]
Millis = Annotated[int, Limit(0, 2**53 - 1)]  # of Unix time, UTC
_OPTIONAL = (types.UnionType, Union)  # `T | None` is the second when T is Annotated, until Python 3.14


def digest(label: str, *parts: bytes | bytearray | memoryview) -> bytes:
    """SHA-384 over label ‖ 0 ‖ parts. The zero byte keeps one label from being the start of another."""
    state = hashlib.sha384(label.encode() + b"\0")
    for part in parts:
        state.update(part)
    return state.digest()


class Record:
    """Base of every frozen dataclass that is signed, hashed or sent; checks types and limits when made."""

    def __post_init__(self) -> None:
        """Raises EncodingError naming the field. Subclasses check what lies between fields in `validate`."""
        for name, hint in _hints(type(self)).items():
            _check(getattr(self, name), hint, f"{type(self).__name__}.{name}")
        self.validate()

    def validate(self) -> None:
        """Check what lies between fields; raises EncodingError or ContractError."""

    def encode(self) -> bytes:
        """The one encoding: a CBOR map from field names."""
        return encode(_plain(self))

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Raises EncodingError for anything that `encode` would not have written."""
        built: Self = _build(decode(data), cls, cls.__name__)
        return built


def encode(value: object) -> bytes:
    """Deterministic CBOR of plain values: None, bool, int, float, bytes, str, list, dict."""
    return cbor2.dumps(value, canonical=True)


def decode(data: bytes, bytes_max: int = MESSAGE_BYTES_MAX) -> Any:
    """The plain value whose deterministic encoding is exactly `data`; raises EncodingError otherwise."""
    if len(data) > bytes_max:
        raise EncodingError("message size", expected=f"at most {bytes_max} bytes", got=len(data))
    try:
        _check_items(data)
        value = cbor2.loads(data, allow_duplicate_keys=False, strict_hashable_types=True, max_depth=DEPTH_MAX)
        _check_plain(value)
        same = encode(value) == data
    except EncodingError:
        raise
    except Exception as error:  # cbor2's own and Python's, all for the same reason
        raise EncodingError(f"not deterministic CBOR ({type(error).__name__})") from None
    if not same:  # another form of the same value
        raise EncodingError("not the deterministic CBOR form of its value")
    return value


def _check_items(data: bytes) -> None:
    """Before anything is built: definite lengths, no tags, nothing behind the end, and not so many items that the
    built value would take much more memory than its bytes. IndexError when it ends too early."""
    place, missing, items = 0, 1, 0
    while missing:
        kind, size = data[place] >> 5, data[place] & 31
        place, value = place + 1, size
        if kind == _TAG or size > 27:
            raise EncodingError("CBOR", expected="definite lengths and no tags")
        if size >= 24:
            width = 1 << (size - 24)
            place, value = place + width, int.from_bytes(data[place : place + width], "big")
        missing += {_ARRAY: value, _MAP: 2 * value}.get(kind, 0) - 1
        place += value if kind in (_BYTES, _TEXT) else 0
        items += 1
        if items + missing > ITEMS_MAX:
            raise EncodingError("items in a message", expected=f"at most {ITEMS_MAX}")
    if place != len(data):
        raise EncodingError("CBOR", expected="one value", got="other bytes behind it, or too few")


def _check_plain(value: object) -> None:
    if isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise EncodingError("map key", expected="text", got=type(key).__name__)
            _check_plain(item)
    elif type(value) not in (type(None), bool, int, float, bytes, str):
        raise EncodingError("CBOR value", expected="a plain one", got=type(value).__name__)


def _plain(value: object) -> object:
    if isinstance(value, Record):
        return {name: _plain(getattr(value, name)) for name in _hints(type(value))}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _read_hints(cls: type[Record]) -> dict[str, Any]:
    """Field name → type; a field without a bound is a mistake of ours."""
    hints = get_type_hints(cls, include_extras=True)
    return {name: _bounded(hint, f"{cls.__name__}.{name}") for name, hint in hints.items()}


_hints: Callable[[Any], dict[str, Any]] = cache(_read_hints)


def _bounded(hint: Any, path: str) -> Any:
    if hint in (int, bytes, str) or get_origin(hint) is tuple:
        raise LocalError(f"{path} has no limit")
    return hint


def _build(plain: Any, hint: Any, path: str) -> Any:
    """Turn maps into Records and lists into tuples, by type; the Records check themselves."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in _OPTIONAL:  # T | None
        return None if plain is None else _build(plain, get_args(hint)[0], path)
    if get_origin(hint) is tuple and isinstance(plain, list):
        return tuple(_build(item, get_args(hint)[0], f"{path}[{i}]") for i, item in enumerate(plain))
    if isinstance(hint, type) and issubclass(hint, Record):
        names = list(_hints(hint))
        if not isinstance(plain, dict) or plain.keys() != set(names):
            got = sorted(plain) if isinstance(plain, dict) else type(plain).__name__
            raise EncodingError(path, expected=f"a map of {', '.join(names)}", got=str(got)[:200])
        return hint(**{name: _build(plain[name], h, f"{path}.{name}") for name, h in _hints(hint).items()})
    return plain


def _check(value: Any, hint: Any, path: str) -> None:
    limit: Limit | None = None
    if get_origin(hint) is Annotated:
        hint, limit = get_args(hint)
    if get_origin(hint) in _OPTIONAL:
        if value is not None:
            _check(value, get_args(hint)[0], path)
        return
    if get_origin(hint) is Literal:
        if type(value) is not type(get_args(hint)[0]) or value not in get_args(hint):
            raise EncodingError(path, expected=f"one of {get_args(hint)}", got=_shape(value))
        return
    kind = get_origin(hint) or hint
    if type(value) is not kind:
        raise EncodingError(path, expected=kind.__name__, got=type(value).__name__)
    if kind is float and not math.isfinite(value):
        raise EncodingError(path, expected="a finite number")
    if limit is not None:
        size = value if kind is int else len(value)
        if not limit.low <= size <= limit.high:
            unit = "" if kind is int else " long"
            raise EncodingError(path, expected=f"{limit.low} to {limit.high}{unit}", got=size)
        if limit.pattern and not re.fullmatch(limit.pattern, value):
            raise EncodingError(path, expected=f"text like {limit.pattern}", got=_shape(value))
    if kind is tuple:
        for index, item in enumerate(value):
            _check(item, get_args(hint)[0], f"{path}[{index}]")


def _shape(value: object) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, str | bytes | tuple) else type(value).__name__
