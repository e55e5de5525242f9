"""Appraisal of an attestation document: the checklist of docs/ATTESTATION.md, from top to bottom.

Every check raises; none can be switched off. Who wants a document of other days verified says as of when; who wants
other images or another root accepted says so in the policy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256

from mpc.attestation.chain import check_chain, check_signature
from mpc.attestation.checklist import Step, fingerprint_of, refusal, short
from mpc.attestation.document import YEAR_10000_MS, Document, unverified_document
from mpc.attestation.policy import CODE_PCRS, AppraisalPolicy, Measurement, check_pcrs, extended
from mpc.attestation.roots import AWS_NITRO_ROOT_G1
from mpc.protocol.errors import LocalError

CLOCK_SKEW_MS = 60_000  # how far the verifier's clock may be behind the hypervisor's
FRESH_NONCE_BYTES = 16  # a shorter one is compared, but could be guessed or met again: it proves no freshness


@dataclass(frozen=True)
class Evidence:
    """What a document that passed every step says, and how far that goes."""

    module_id: str
    timestamp_ms: int
    at_ms: int  # the certificates were checked at this time
    own_time: bool  # …which is the document's own: its age is known only from the nonce
    fresh: bool  # made for this verifier: it holds the expected nonce, of 16 bytes or more
    measurement: Measurement  # the accepted one that it equals
    pcrs: Mapping[int, bytes]
    root: bytes  # SHA-256 of the root certificate
    public_key: bytes | None = field(repr=False)
    user_data: bytes | None = field(repr=False)
    nonce: bytes | None = field(repr=False)
    unchecked: tuple[str, ...]  # those of nonce, user_data, public_key that were compared with nothing

    @property
    def aws(self) -> bool:
        """Under the root of AWS's commercial partition. Otherwise somebody else's word is all there is."""
        return self.root == AWS_NITRO_ROOT_G1


def verify(
    document: bytes,
    policy: AppraisalPolicy,
    *,
    nonce: bytes | None = None,
    user_data: bytes | None = None,
    public_key: bytes | None = None,
    pcrs: Mapping[int, bytes] | None = None,
    at: int | None = None,
) -> Evidence:
    """Appraise an attestation document of AWS Nitro Enclaves, or of a simulated root that the policy names.

    Args:    document: the COSE_Sign1 as the NSM returned it.
             nonce, user_data, public_key: exactly what the document must hold; None is not compared, and the
             evidence says so.
             pcrs: further PCRs that it must hold, index → 48 bytes, such as PCR16.
             at: Unix time in ms as of which to verify, normally now. None takes the document's own time, and then
             only the nonce says that it is fresh, so one of 16 bytes or more must be given.
    Raises:  AppraisalError with the number of the failed step, expected and got; LocalError for wrong arguments.
    Source:  docs/ATTESTATION.md has source and purpose of each step.
    """
    _check_arguments(policy, nonce, user_data, public_key, pcrs, at)
    claims = unverified_document(document)  # steps 1 to 12
    fresh = nonce is not None and len(nonce) >= FRESH_NONCE_BYTES
    at_ms = _check_time(claims.timestamp_ms, at, policy.age_max_ms, fresh)  # 13
    leaf = check_chain(claims, policy.roots, claims.timestamp_ms, at_ms)  # 14 to 19
    check_signature(claims, leaf)  # 20
    _check_parent(claims)  # 21
    _check_not_debug(claims)  # 22
    measurement = _accepted_measurement(claims, policy, at_ms)  # 23
    _check_equal(Step.NONCE, "nonce", nonce, claims.nonce)
    _check_equal(Step.USER_DATA, "user_data", user_data, claims.user_data)
    _check_equal(Step.PUBLIC_KEY, "public_key", public_key, claims.public_key)
    _check_other_pcrs(claims, pcrs or {})
    compared = {"nonce": nonce, "user_data": user_data, "public_key": public_key}
    return Evidence(
        module_id=claims.module_id,
        timestamp_ms=claims.timestamp_ms,
        at_ms=at_ms,
        own_time=at is None,
        fresh=fresh,
        measurement=measurement,
        pcrs=claims.pcrs,
        root=sha256(claims.cabundle[0]).digest(),
        public_key=claims.public_key,
        user_data=claims.user_data,
        nonce=claims.nonce,
        unchecked=tuple(name for name, expected in compared.items() if expected is None),
    )


def _check_arguments(
    policy: AppraisalPolicy,
    nonce: bytes | None,
    user_data: bytes | None,
    public_key: bytes | None,
    pcrs: Mapping[int, bytes] | None,
    at: int | None,
) -> None:
    if not isinstance(policy, AppraisalPolicy):
        raise LocalError("policy", expected="an AppraisalPolicy", got=type(policy).__name__)
    for name, value in (("nonce", nonce), ("user_data", user_data), ("public_key", public_key)):
        if value is not None and type(value) is not bytes:
            raise LocalError(name, expected="bytes or None", got=type(value).__name__)
    if at is not None and (type(at) is not int or not 0 < at < YEAR_10000_MS):
        raise LocalError("at", expected="Unix time in milliseconds, or None", got=type(at).__name__)
    check_pcrs(pcrs or {}, "pcrs")


def _check_time(timestamp_ms: int, at: int | None, age_max_ms: int, fresh: bool) -> int:
    # ATTESTATION step 13: a document's own time says nothing about today; only a nonce does
    if at is None:
        if not fresh:
            expected = f"a time to verify at, or a nonce of {FRESH_NONCE_BYTES} bytes or more"
            raise refusal(Step.TIME, "nothing says when this document was made", expected, "neither")
        return timestamp_ms
    if timestamp_ms > at + CLOCK_SKEW_MS:
        what = "the document is from the future; is this clock right?"
        raise refusal(Step.TIME, what, f"at most {CLOCK_SKEW_MS // 1000} s ahead", _seconds(timestamp_ms - at))
    if at - timestamp_ms > age_max_ms:
        what = "the document is too old (to judge it as of an earlier time, name that time)"
        raise refusal(Step.TIME, what, f"at most {_seconds(age_max_ms)}", _seconds(at - timestamp_ms))
    return max(at, timestamp_ms)


def _check_parent(claims: Document) -> None:
    # ATTESTATION step 21
    expected = extended(claims.instance_id.encode())
    if claims.pcrs.get(4) != expected:
        raise refusal(Step.PARENT, f"PCR4 of {claims.instance_id}", short(expected), short(claims.pcrs.get(4)))


def _check_not_debug(claims: Document) -> None:
    # ATTESTATION step 22
    if missing := [f"PCR{index}" for index in CODE_PCRS if index not in claims.pcrs]:
        raise refusal(Step.DEBUG, "the document lacks a measurement", "PCR0, PCR1 and PCR2", f"no {', '.join(missing)}")
    zero = [f"PCR{index}" for index in CODE_PCRS if not any(claims.pcrs[index])]
    if len(zero) == len(CODE_PCRS):
        what = (
            "the enclave runs in debug mode: its host reads its console, and the hypervisor zeroes PCR0, PCR1 and "
            "PCR2, so that the document does not say which code runs. Start it without --debug-mode"
        )
        raise refusal(Step.DEBUG, what)
    if zero:
        raise refusal(Step.DEBUG, "a measurement is zero", "PCR0, PCR1 and PCR2 not zero", ", ".join(zero))


def _accepted_measurement(claims: Document, policy: AppraisalPolicy, at_ms: int) -> Measurement:
    # ATTESTATION step 23
    reasons = []
    for measurement in policy.measurements:
        index = measurement.mismatch(claims.pcrs)
        if index is not None:
            reasons.append(f"{measurement.label!a} with PCR{index} {short(measurement.pcrs[index])}")
        elif measurement.expires_ms is not None and at_ms >= measurement.expires_ms:
            until = datetime.fromtimestamp(measurement.expires_ms / 1000, UTC)
            reasons.append(f"{measurement.label!a}, which it equals, until {until:%F %T}Z")
        else:
            return measurement
    expected = " or ".join(reasons[:4]) + (f" or {len(reasons) - 4} more" if len(reasons) > 4 else "")
    got = ", ".join(f"PCR{index} {short(claims.pcrs.get(index))}" for index in _named(policy))
    raise refusal(Step.MEASUREMENT, "not an accepted measurement", expected, got)


def _named(policy: AppraisalPolicy) -> list[int]:
    return sorted({index for measurement in policy.measurements for index in measurement.pcrs})


def _check_equal(step: Step, name: str, expected: bytes | None, got: bytes | None) -> None:
    # ATTESTATION steps 24 to 26; absent and empty are not the same
    if expected is not None and expected != got:
        raise refusal(step, name, fingerprint_of(expected), fingerprint_of(got))


def _check_other_pcrs(claims: Document, pcrs: Mapping[int, bytes]) -> None:
    # ATTESTATION step 27: only locked PCRs are in a document
    for index, expected in sorted(pcrs.items()):
        if claims.pcrs.get(index) != expected:
            raise refusal(Step.OTHER_PCRS, f"PCR{index}", short(expected), short(claims.pcrs.get(index)))


def _seconds(milliseconds: int) -> str:
    return f"{milliseconds / 1000:g} s" if milliseconds < 7_200_000 else f"{milliseconds // 3_600_000} h"
