"""Settings files: TOML read into frozen types, written back, and described, all from the types.

An error names the file and the line or the dotted path, says what is wrong and what would be right.
"""

import difflib
import json
import re
import tomllib
import types
from collections.abc import Iterable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta

from mpc.files import read_bounded
from mpc.protocol.errors import LocalError, MpcError


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every table of a settings file. `__post_init__` raises LocalError for what lies between keys."""


class Duration(int):
    """Milliseconds; written `"90 s"`, `"2 min"`."""

    UNITS: ClassVar = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
    EXAMPLE = "2 min"


class Size(int):
    """Bytes; written `"512 MiB"`, `"2 GiB"`, or in powers of ten, `"2 GB"`."""

    UNITS: ClassVar = {
        **{"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
        **{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40},
    }
    EXAMPLE = "2 GiB"


def about(meaning: str, example: object = None, **limits: Any) -> Meta:
    """A key's meaning and an example, for its reference; limits are msgspec's (`ge`, `max_length` …)."""
    return Meta(description=meaning, examples=None if example is None else [example], **limits)


Named = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$", title="a name: a letter, then letters, digits, - or _, at most 64"),
]
T = TypeVar("T", bound=Settings)

FILE_BYTES_MAX = 1 << 20  # a policy that knows 1,000 participants is 300 KB
KEY_PARTS_MAX = 32  # ours have 7; the parser's time grows with the square
# Each alternative takes all that is left when its end is missing, so that no text is read twice.
_STRINGS = re.compile(
    r'"""(?:[^\\]|\\.)*?(?:"""|\Z)|\'\'\'.*?(?:\'\'\'|\Z)|"(?:[^"\\\n]|\\.)*+"?|\'[^\'\n]*+\'?|#[^\n]*+', re.DOTALL
)
_LONG_KEY = re.compile(rf"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){{{KEY_PARTS_MAX}}}")


def read(path: Path, kind: type[T]) -> T:
    """The settings in that file. Raises LocalError naming the file and the place."""
    return build(parse(read_bounded(path, FILE_BYTES_MAX), str(path)), kind, str(path))


def parse(content: bytes, source: str) -> dict[str, Any]:
    """The TOML table in a file's bytes; `source` names it in errors. Raises LocalError naming it and the place."""
    try:
        text = content.decode()
        if _LONG_KEY.search(_STRINGS.sub("_", text)):
            raise LocalError(f"{source}: a key of more than {KEY_PARTS_MAX} parts")
        return tomllib.loads(text)
    except UnicodeDecodeError:
        raise LocalError(f"{source}: is not UTF-8 text") from None
    except RecursionError:
        raise LocalError(f"{source}: is nested too deeply") from None
    except tomllib.TOMLDecodeError as error:
        place = re.fullmatch(r"(.*) \(at (line \d+, column \d+|end of document)\)", str(error), re.DOTALL)
        what, where = place.groups() if place else (str(error), "")
        if twice := re.fullmatch(r"Cannot declare \((.*)\) twice", what):
            dotted = ".".join(re.findall(r"'([^']*)'", twice[1]))
            what = f"[{dotted}] stands here a second time; give each its own name, or write its keys under one heading"
        elif what == "Cannot overwrite a value":
            what = "this key already has a value; delete one of the two"
        raise LocalError(f"{source}, {where or 'TOML'}: {what}") from None
    except ValueError:  # of Python: a number of more than 4300 digits
        raise LocalError(f"{source}: a number with too many digits") from None


def build(value: object, kind: type[T], source: str) -> T:
    """The same for a table that is already parsed; `source` names it in errors."""
    try:
        built: T = _build(value, kind, "")
    except LocalError as error:
        raise LocalError(f"{source}: {error.what}", expected=error.expected, got=error.got) from None
    return built


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean …?)`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _build(value: Any, hint: Any, path: str) -> Any:
    """Tables key by key, so that errors carry the whole dotted path; msgspec converts the rest."""
    kind = next(iter(_parts(hint)))
    if get_origin(kind) is dict:
        _need_table(value, path)
        key_hint, item_hint = get_args(kind)
        keys = [_leaf(key, key_hint, _join(path, key)) for key in value]
        return {key: _build(value[key], item_hint, _join(path, key)) for key in keys}
    if get_origin(kind) is tuple and _is_settings(get_args(kind)[0]):
        if not isinstance(value, list):
            raise LocalError(path, expected=f"tables, each under [[{path}]]", got=_shown(value))
        return tuple(_build(item, get_args(kind)[0], f"{path}[{index}]") for index, item in enumerate(value))
    if not _is_settings(kind):
        return _leaf(value, hint, path)
    _need_table(value, path)
    known = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    if missing := [name for name, field in known.items() if field.required and name not in value]:
        raise LocalError(f"{_join(path, missing[0])}: is missing", expected=describe(known[missing[0]].type))
    for key in value:
        if key not in known:
            guess = nearest(key, known) or f" (known here: {', '.join(known)})"
            raise LocalError(f"{_join(path, key)}: unknown key{guess}")
    built = {known[key].name: _build(item, known[key].type, _join(path, key)) for key, item in value.items()}
    try:
        return kind(**built)
    except MpcError as error:  # of __post_init__, which does not know where it stands
        raise LocalError(_join(path, error.what, ": "), expected=error.expected, got=error.got) from None


def _parts(hint: Any) -> Iterator[Any]:
    """The types in a union, without their annotations; a type that is no union is itself the only one."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    for part in get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,):
        if part is not types.NoneType:
            yield get_args(part)[0] if get_origin(part) is Annotated else part


def _is_settings(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def _join(path: str, key: str, separator: str = ".") -> str:
    return f"{path}{separator}{key}" if path else key


def _need_table(value: object, path: str) -> None:
    if not isinstance(value, dict):
        raise LocalError(path, expected=f"a table, [{path}]", got=_shown(value))


def _leaf(value: Any, hint: Any, path: str) -> Any:
    try:
        return msgspec.convert(value, hint, dec_hook=_quantity)
    except msgspec.ValidationError as error:
        place = re.search(r" - at `\$(.*)`$", str(error))
        for step in re.findall(r"\[(\d+)\]", place[1]) if place else ():
            value, path = value[int(step)], f"{path}[{step}]"
            hint = next((get_args(part)[0] for part in _parts(hint) if get_origin(part) is tuple), hint)
        raise LocalError(path, expected=describe(hint), got=_shown(value)) from None


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _quantity(kind: Any, value: object) -> Any:
    """Duration or Size from its text. Raises ValueError, which msgspec turns into its own error with a path."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", value) if isinstance(value, str) else None
    if match is None or match[2] not in kind.UNITS or len(match[1]) > 15:
        raise ValueError
    amount = Decimal(match[1]) * kind.UNITS[match[2]]
    if amount != int(amount) or amount == 0:
        raise ValueError
    return kind(amount)


def quantity(value: Duration | Size) -> str:
    """The shortest text that reads back as the same amount."""
    unit = max((u for u, size in value.UNITS.items() if value % size == 0), key=value.UNITS.__getitem__)
    return f"{value // value.UNITS[unit]} {unit}"


def describe(hint: Any) -> str:
    """A type, with its limits, in a person's words."""
    metas = [extra for extra in get_args(hint)[1:] if isinstance(extra, Meta)] if get_origin(hint) is Annotated else []
    limits = [f"{meta.ge} to {meta.le}" for meta in metas if meta.le is not None]
    limits += [f"{meta.min_length} or more" for meta in metas if meta.min_length and meta.max_length is None]
    limits += [f"{meta.min_length or 0} to {meta.max_length} characters" for meta in metas if meta.max_length]
    words = next((meta.title for meta in metas if meta.title), None)
    return ", ".join((words or " or ".join(dict.fromkeys(_describe(part) for part in _parts(hint))), *limits))


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(json.dumps(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list: {describe(get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, Duration | Size):
        word = "a duration" if issubclass(kind, Duration) else "a size"
        return f'{word} like "{kind.EXAMPLE}" (units: {", ".join(kind.UNITS)})'
    if get_origin(kind) is dict or _is_settings(kind):
        return "a table"
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    names[datetime] = "a time with its offset, like 2027-01-31T00:00:00Z"
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def write(settings: Settings) -> str:
    """TOML that `read` reads as the same settings; keys without a value are left out."""
    plain = msgspec.to_builtins(settings, builtin_types=(datetime,), enc_hook=quantity)
    return "\n".join(_tables(plain, "")).strip() + "\n"


def _tables(table: dict[str, Any], path: str, heading: str = "[{}]") -> Iterator[str]:
    """Lines of a table: its own keys, then the tables in it; columns take a line each."""
    nested = {key: value for key, value in table.items() if _holds_tables(value)}
    inline = {key for key, value in nested.items() if path.endswith(".columns") and isinstance(value, dict)}
    flat = {key: value for key, value in table.items() if value is not None and (key not in nested or key in inline)}
    if path and (flat or not nested):
        yield f"\n{heading.format(path)}"
    for key, value in flat.items():
        yield f"{_key(key)} = {_inline(value)}"
    for key, value in nested.items():
        if key not in inline:
            heading = "[{}]" if isinstance(value, dict) else "[[{}]]"
            for item in [value] if isinstance(value, dict) else value:
                yield from _tables(item, _join(path, _key(key)), heading)


def _holds_tables(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and any(isinstance(v, dict) for v in value))


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _inline(key)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        pairs = [f"{_key(key)} = {_inline(item)}" for key, item in value.items() if item is not None and item != ()]
        return f"{{ {', '.join(pairs)} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, str | bool | int | float):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes what JSON does, and DEL
    return str(value.isoformat())


def reference(kind: type[Settings], path: str = "") -> Iterator[str]:
    """Markdown lines: one table of keys for each table of the file, from the types' own descriptions."""
    fields = msgspec.structs.fields(kind)
    nested: list[tuple[str, type[Settings]]] = []
    rows: list[str] = []
    for field in fields:
        part, key = next(iter(_parts(field.type))), _join(path, field.encode_name)
        item = (
            get_args(part)[-1] if get_origin(part) is dict else get_args(part)[0] if get_origin(part) is tuple else part
        )
        if _is_settings(item):
            nested.append((f"{key}.NAME" if get_origin(part) is dict else key, item))
            continue
        meta = [extra for extra in get_args(field.type)[1:] if isinstance(extra, Meta)]
        meaning = next((m.description for m in meta if m.description), "")
        example = next((_inline(m.examples[0]) for m in meta if m.examples), "")
        default = "**required**" if field.required else f"`{_default(field)}`"
        cells = (f"`{field.encode_name}`", describe(field.type).replace("|", "\\|"), default, meaning, f"`{example}`")
        rows.append("| " + " | ".join(cells) + " |")
    if path:
        summary = " ".join((kind.__doc__ or "").split())
        yield from (f"## `[{path}]`", "", summary, "")
    if rows:
        yield from ("| key | type | default | meaning | example |", "|---|---|---|---|---|", *rows, "")
    for name, item in nested:
        yield from reference(item, name)


def _default(field: Any) -> str:
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, Duration | Size):
        value = quantity(value)
    return _inline(value) if value is not None else "none"
