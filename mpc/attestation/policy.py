"""The appraisal policy: which roots, which measurements, how old. Explicit sets, never empty, so never vacuous.

A policy is its owner's, so whatever is wrong with it is a LocalError; a contract that leaves nothing of it is refused
with a PolicyError.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha384
from types import MappingProxyType
from typing import Any, Self

from mpc.attestation.document import PCR_BYTES, PCR_COUNT_MAX, YEAR_10000_MS
from mpc.attestation.roots import AWS_NITRO_ROOT_G1, FINGERPRINT_BYTES, root_fingerprint
from mpc.protocol.errors import LocalError, PolicyError

AGE_MAX_MS = 5 * 60_000  # unless the policy says otherwise
CODE_PCRS = (0, 1, 2)  # whole image, kernel and bootstrap, application: always named; all zero is debug mode

CONTRACT_PCR = 16  # the enclave extends it with the contract's digest and locks it, before it attests

_UNITS_MS = {"s": 1000, "min": 60_000, "h": 3_600_000}


def extended(data: bytes) -> bytes:
    """A PCR that was zero and has been extended once with this: SHA384(0^48 ‖ data)."""
    return sha384(bytes(PCR_BYTES) + data).digest()


def contract_pcr(digest: bytes) -> dict[int, bytes]:
    """What PCR16 of an enclave must be that works for the contract of this digest, as index → value."""
    return {CONTRACT_PCR: extended(digest)}


@dataclass(frozen=True)
class Measurement:
    """One accepted image: PCR0, PCR1 and PCR2, and any others only in addition.

    Args:    pcrs: index → 48 bytes. expires_ms: accepted before this Unix time; None is for ever.
    """

    label: str
    pcrs: Mapping[int, bytes] = field(hash=False)
    expires_ms: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.label, str) or not self.label:
            raise LocalError("measurement", expected="a label")
        name = f"measurement {self.label!a}"
        check_pcrs(self.pcrs, name)
        if missing := [f"PCR{index}" for index in CODE_PCRS if not any(self.pcrs.get(index, b""))]:
            expected = "PCR0, PCR1 and PCR2, none of them zero (zero is debug mode)"
            raise LocalError(name, expected=expected, got=f"no {', '.join(missing)}")
        if self.expires_ms is not None and not (type(self.expires_ms) is int and 0 < self.expires_ms < YEAR_10000_MS):
            raise LocalError(f"{name}: expires_ms", expected="a Unix time in ms, or None")
        object.__setattr__(self, "pcrs", MappingProxyType(dict(sorted(self.pcrs.items()))))

    def mismatch(self, pcrs: Mapping[int, bytes]) -> int | None:
        """The first PCR that a document lacks or has with another value; None when all are equal."""
        return next((index for index, value in self.pcrs.items() if pcrs.get(index) != value), None)

    def and_also(self, other: "Measurement") -> "Measurement | None":
        """Accepts what both accept, until the earlier expiry; None when nothing can be both."""
        if any(self.pcrs.get(index, value) != value for index, value in other.pcrs.items()):
            return None
        expiries = [at for at in (self.expires_ms, other.expires_ms) if at is not None]
        return Measurement(self.label, {**self.pcrs, **other.pcrs}, min(expiries, default=None))


@dataclass(frozen=True)
class AppraisalPolicy:
    """What a verifier accepts: any of the measurements, under any of the roots, no older than the age.

    Args:    roots: SHA-256 fingerprints of root certificates. age_max_ms: of a document, when the time is given.
    """

    measurements: tuple[Measurement, ...]
    roots: frozenset[bytes] = frozenset({AWS_NITRO_ROOT_G1})
    age_max_ms: int = AGE_MAX_MS

    def __post_init__(self) -> None:
        object.__setattr__(self, "measurements", tuple(self.measurements))
        object.__setattr__(self, "roots", frozenset(self.roots))
        if not self.measurements or not all(isinstance(one, Measurement) for one in self.measurements):
            raise LocalError("policy: measurements", expected="at least one: an empty policy would accept every image")
        if not self.roots or not all(type(one) is bytes and len(one) == FINGERPRINT_BYTES for one in self.roots):
            raise LocalError("policy: roots", expected="at least one SHA-256 fingerprint of a root certificate")
        if type(self.age_max_ms) is not int or self.age_max_ms <= 0:
            raise LocalError("policy: age_max_ms", expected="a number of milliseconds above 0")

    def narrow(
        self, measurements: Iterable[Measurement], roots: Iterable[bytes], age_max_ms: int | None = None
    ) -> Self:
        """This policy and a contract's at once: accepts only what both accept. Nothing can be added to it.

        Raises:  PolicyError if no document could satisfy both.
        """
        both = [mine.and_also(theirs) for theirs in measurements for mine in self.measurements]
        if not (accepted := tuple(one for one in both if one is not None)):
            mine = ", ".join(ascii(one.label) for one in self.measurements)
            raise PolicyError("no measurement of the contract is one that this party accepts", expected=mine)
        if not (shared := self.roots & frozenset(roots)):
            mine = ", ".join(sorted(root.hex() for root in self.roots))
            raise PolicyError("the contract's attestation root is not one that this party accepts", expected=mine)
        age = self.age_max_ms if age_max_ms is None else min(self.age_max_ms, age_max_ms)
        return type(self)(accepted, shared, age)

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read a policy file; docs/ATTESTATION.md shows one. Raises LocalError naming what is wrong."""
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise LocalError(f"policy is not TOML: {error}") from None
        return cls.from_table(table)

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """The same from a table that was read already, for a policy that is part of a larger file."""
        _known(table, ("measurement", "roots", "age_max"), "policy")
        measurements = table.get("measurement")
        if not isinstance(measurements, list) or not all(isinstance(one, dict) for one in measurements):
            raise LocalError("policy", expected="[[measurement]] with label, PCR0, PCR1 and PCR2")
        accepted: dict[str, Measurement] = {}
        for one in map(_measurement, measurements):
            if one.label in accepted:
                raise LocalError("policy: two measurements of one label", got=ascii(one.label))
            accepted[one.label] = one
        roots = table.get("roots", ["aws-nitro-enclaves-g1"])
        if not isinstance(roots, list) or not all(isinstance(root, str) for root in roots):
            raise LocalError("policy: roots", expected="a list of names or SHA-256 fingerprints")
        return cls(
            measurements=tuple(accepted.values()),
            roots=frozenset(root_fingerprint(root) for root in roots),
            age_max_ms=_duration_ms(table.get("age_max", f"{AGE_MAX_MS // 1000} s")),
        )


def check_pcrs(pcrs: Mapping[int, bytes], name: str) -> None:
    """Check that somebody's expected PCRs could be those of a document; raises LocalError."""
    if not isinstance(pcrs, Mapping):
        raise LocalError(name, expected="PCRs as index → 48 bytes", got=type(pcrs).__name__)
    for index, value in pcrs.items():
        if type(index) is not int or not 0 <= index < PCR_COUNT_MAX:
            raise LocalError(f"{name}: PCR index", expected=f"0 to {PCR_COUNT_MAX - 1}", got=ascii(index)[:20])
        if type(value) is not bytes or len(value) != PCR_BYTES:
            raise LocalError(f"{name}: PCR{index}", expected=f"{PCR_BYTES} bytes")


def _measurement(table: Mapping[str, Any]) -> Measurement:
    label, expires = table.get("label"), table.get("expires")
    if not isinstance(label, str):
        raise LocalError("policy: a measurement", expected="a label")
    name = f"policy: measurement {label!a}"
    pcr_names = {f"PCR{index}": index for index in range(PCR_COUNT_MAX)}
    _known(table, ("label", "expires", *pcr_names), name)
    if expires is not None and (not isinstance(expires, datetime) or expires.tzinfo is None):
        raise LocalError(f"{name}: expires", expected="a time with its offset, like 2027-01-31T00:00:00Z")
    pcrs = {}
    for key, value in table.items():
        if key in pcr_names:
            if not isinstance(value, str) or not re.fullmatch(r"[0-9A-Fa-f]{96}", value):
                raise LocalError(f"{name}: {key}", expected="96 hex digits, as `nitro-cli describe-eif` prints them")
            pcrs[pcr_names[key]] = bytes.fromhex(value)
    return Measurement(label, pcrs, int(expires.timestamp() * 1000) if expires else None)


def _duration_ms(value: object) -> int:
    match = re.fullmatch(r"([0-9]{1,6}) ?(s|min|h)", value) if isinstance(value, str) else None
    if match is None:
        raise LocalError("policy: age_max", expected='a duration like "90 s", "5 min" or "1 h"')
    return int(match[1]) * _UNITS_MS[match[2]]


def _known(table: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    if unknown := [ascii(key) for key in table if key not in names]:
        expected = ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
        raise LocalError(f"{where}: unknown key {unknown[0]}", expected=expected)
