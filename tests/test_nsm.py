"""The NSM's client and the simulated NSM: known answers, semantics, transports, documents, the root's file."""

import ctypes
import errno
import hashlib
import os
import random
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from enclave_runtime.nsm import Nsm, NsmError, device, over_socket, timestamp_ms
from mpc.attestation import AppraisalPolicy, Measurement, Step, verify
from mpc.host.simulated_nsm import SimulatedNsm, SimulatedRoot
from mpc.protocol.errors import AppraisalError, LocalError

NOW_MS = 1_790_000_000_123
INSTANCE = "i-0368fa67e156d6d23"
MEASURED = {index: bytes([index + 1]) * 48 for index in (0, 1, 2)}
NOTHING = {"user_data": None, "nonce": None, "public_key": None}
VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "attestation"
LOCKED_AT_BOOT = list(range(16))


class World:
    """A seeded root and NSM, a clock to turn, and a client of them."""

    def __init__(self, seed: int = 1, **options: Any) -> None:
        self.now_ms = NOW_MS
        entropy = random.Random(seed).randbytes
        self.root = SimulatedRoot.create(entropy=entropy, now_ms=NOW_MS)
        options = {"instance_id": INSTANCE, "pcrs": MEASURED, **options}
        self.simulated = SimulatedNsm(self.root, clock_ms=lambda: self.now_ms, entropy=entropy, **options)
        self.nsm = Nsm(self.simulated.handle)

    def raw(self, request: object) -> object:
        return cbor2.loads(self.simulated.handle(cbor2.dumps(request)))

    def payload(self) -> dict[str, Any]:
        return payload_of(self.nsm.attest(**NOTHING))


def payload_of(document: bytes) -> dict[str, Any]:
    payload: dict[str, Any] = cbor2.loads(cbor2.loads(document)[2])
    return payload


# The client


KNOWN_ANSWERS = {
    "describe": (lambda nsm: nsm.describe(), "6b44657363726962654e534d"),
    "random": (lambda nsm: nsm.random(), "6947657452616e646f6d"),
    "describe_pcr": (lambda nsm: nsm.describe_pcr(0), "a16b4465736372696265504352a165696e64657800"),
    "extend_pcr": (
        lambda nsm: nsm.extend_pcr(16, b"\1\2\3"),
        "a169457874656e64504352a265696e64657810646461746143010203",
    ),
    "lock_pcr": (lambda nsm: nsm.lock_pcr(16), "a1674c6f636b504352a165696e64657810"),
    "lock_pcrs": (lambda nsm: nsm.lock_pcrs(17), "a1684c6f636b50435273a16572616e676511"),
    "attest": (
        lambda nsm: nsm.attest(user_data=None, nonce=None, public_key=None),
        "a16b4174746573746174696f6ea369757365725f64617461f6656e6f6e6365f66a7075626c69635f6b6579f6",
    ),
    "attest, with all three": (
        lambda nsm: nsm.attest(user_data=b"\1", nonce=b"\2", public_key=b"\3"),
        "a16b4174746573746174696f6ea369757365725f646174614101656e6f6e636541026a7075626c69635f6b65794103",
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_request_bytes_are_the_known_answers(name: str) -> None:
    ask, expected = KNOWN_ANSWERS[name]
    sent = []
    simulated = World().simulated

    def call(request: bytes) -> bytes:
        sent.append(request)
        return simulated.handle(request)

    ask(Nsm(call))
    assert [request.hex() for request in sent] == [expected]


def test_responses_are_read_whatever_the_order_of_their_maps() -> None:
    shuffled = cbor2.dumps({"DescribePCR": {"data": bytes(48), "lock": True, "later": 1}})
    assert Nsm(lambda _: shuffled).describe_pcr(0) == (True, bytes(48))


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"\xa1",
        cbor2.dumps("GetRandom"),
        cbor2.dumps({"GetRandom": {}}),
        cbor2.dumps({"GetRandom": {"random": "x" * 256}}),
        cbor2.dumps({"GetRandom": {"random": b"short"}}),
        cbor2.dumps({"Attestation": {"random": bytes(256)}}),
        cbor2.dumps({"GetRandom": {"random": bytes(256)}})[:-1],
        cbor2.dumps({"GetRandom": {"random": bytes(256)}}) + b"\0",
        b"\xa2" + 2 * cbor2.dumps({"GetRandom": {"random": bytes(256)}})[1:],
        b"\x81" * 100 + b"\0",
        b"\xf6",
    ],
)
def test_a_response_that_is_not_the_answer_is_refused(response: bytes) -> None:
    with pytest.raises(NsmError) as refused:
        Nsm(lambda _: response).random()
    assert refused.value.name == "InvalidResponse"


def test_errors_carry_the_modules_word() -> None:
    with pytest.raises(NsmError, match="BufferTooSmall") as refused:
        Nsm(lambda _: cbor2.dumps({"Error": "BufferTooSmall"})).lock_pcr(16)
    assert refused.value.name == "BufferTooSmall"


def test_too_large_a_request_is_not_sent() -> None:
    sent: list[bytes] = []
    with pytest.raises(NsmError) as refused:
        Nsm(lambda request: sent.append(request) or b"").extend_pcr(16, bytes(0x1000))
    assert refused.value.name == "InputTooLarge"
    assert not sent


def test_timestamp_of_a_document() -> None:
    assert timestamp_ms(World().nsm.attest(**NOTHING)) == NOW_MS


@pytest.mark.parametrize("fields", [{}, {"timestamp": "1"}, {"timestamp": 0}, {"timestamp": True}, {"timestamp": -1}])
def test_no_timestamp_is_an_error(fields: dict[str, Any]) -> None:
    with pytest.raises(NsmError):
        timestamp_ms(cbor2.dumps([b"", {}, cbor2.dumps(fields), b""]))


@pytest.mark.parametrize("document", [b"", b"\x80", cbor2.dumps([b"", {}, None, b""]), cbor2.dumps({}), b"\x84\x40"])
def test_what_is_no_document_has_no_timestamp(document: bytes) -> None:
    with pytest.raises(NsmError):
        timestamp_ms(document)


# Transports


class Driver:
    """Linux's drivers/misc/nsm.c before a simulated module: the ioctl, its limits and its truncation."""

    def __init__(self, simulated: SimulatedNsm) -> None:
        self.respond: Callable[[bytes], bytes] = simulated.handle
        self.fails = 0

    def ioctl(self, descriptor: int, command: int, argument: bytearray) -> int:
        os.fstat(descriptor)
        assert command == 0xC0200A00
        assert len(argument) == 32
        sent_at, sent, received_at, room = struct.unpack("=4Q", argument)
        if sent > 0x1000:
            raise OSError(errno.EMSGSIZE, "Message too long")
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        response = self.respond(ctypes.string_at(sent_at, sent))
        kept = min(room, len(response), 0x3000)
        ctypes.memmove(received_at, response, kept)
        argument[24:] = struct.pack("=Q", kept)
        return 0


@pytest.fixture
def driver(tmp_path: Path) -> tuple[Driver, Nsm]:
    (tmp_path / "nsm").touch()
    driver = Driver(World().simulated)
    return driver, device(str(tmp_path / "nsm"), driver.ioctl)


def test_device_speaks_to_the_driver(driver: tuple[Driver, Nsm]) -> None:
    _, nsm = driver
    largest = {"user_data": bytes(1024), "nonce": bytes(1024), "public_key": bytes(1024)}
    assert nsm.extend_pcr(16, b"x") == hashlib.sha384(bytes(48) + b"x").digest()
    nsm.lock_pcrs(32)
    assert len(nsm.attest(**largest)) > 8000
    assert nsm.describe()["locked_pcrs"] == list(range(32))


def test_device_refuses_a_truncated_response(driver: tuple[Driver, Nsm]) -> None:
    simulated, nsm = driver
    whole = simulated.respond
    simulated.respond = lambda request: whole(request)[:-1]
    with pytest.raises(NsmError, match="InvalidResponse"):
        nsm.describe()
    simulated.respond = lambda _: cbor2.dumps({"GetRandom": {"random": bytes(0x3000)}})
    with pytest.raises(NsmError, match="InvalidResponse"):
        nsm.random()


@pytest.mark.parametrize(
    ("number", "name"),
    [(errno.EMSGSIZE, "InputTooLarge"), (errno.ETIMEDOUT, "InternalError"), (errno.EFAULT, "InternalError")],
)
def test_device_maps_errno(driver: tuple[Driver, Nsm], number: int, name: str) -> None:
    simulated, nsm = driver
    simulated.fails = number
    with pytest.raises(NsmError, match=os.strerror(number)) as refused:
        nsm.describe()
    assert refused.value.name == name


def test_device_of_a_real_file_is_refused_by_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "nsm").touch()
    with pytest.raises(NsmError) as refused:
        device(str(tmp_path / "nsm")).describe()
    assert refused.value.name == "InternalError"
    with pytest.raises(FileNotFoundError):
        device(str(tmp_path / "absent"))


def test_over_a_socket() -> None:
    world = World()
    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=world.simulated.serve, args=(outside,))
    thread.start()
    with outside, inside:
        nsm = over_socket(inside)
        assert nsm.describe()["module_id"] == world.simulated.module_id
        assert nsm.extend_pcr(31, b"data") == nsm.describe_pcr(31).data
        with pytest.raises(NsmError) as refused:
            nsm.lock_pcr(0)
        assert refused.value.name == "ReadOnlyIndex"
        largest = {"user_data": bytes(1024), "nonce": bytes(1024), "public_key": bytes(1024)}
        assert payload_of(nsm.attest(**largest))["nonce"] == bytes(1024)
        inside.send(bytes(0x1001))
        assert cbor2.loads(inside.recv(100)) == {"Error": "InputTooLarge"}
        inside.close()
        thread.join(10)
        assert not thread.is_alive()


def test_a_closed_socket_is_an_error() -> None:
    inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with inside:
        outside.close()
        with pytest.raises(NsmError) as refused:
            over_socket(inside).describe()
        assert refused.value.name == "InternalError"


def test_only_a_blocking_packet_socket_will_do() -> None:
    for kind, timeout in ((socket.SOCK_STREAM, None), (socket.SOCK_SEQPACKET, 1.0)):
        inside, outside = socket.socketpair(socket.AF_UNIX, kind)
        with inside, outside:
            inside.settimeout(timeout)
            with pytest.raises(LocalError):
                over_socket(inside)


# Semantics of the simulated module


def test_pcrs_at_boot() -> None:
    nsm = World(role_arn="arn:aws:iam::123456789012:role/Webserver").nsm
    pcrs = [nsm.describe_pcr(index) for index in range(32)]
    assert [index for index, pcr in enumerate(pcrs) if pcr.lock] == LOCKED_AT_BOOT
    assert [pcr.data for pcr in pcrs[:3]] == list(MEASURED.values())
    assert pcrs[3].data.hex() == (
        "78fce75db17cd4e0a3fb8dad3ad128ca5e77edbb2b2c7f75329dccd99aa5f6ef4fc1f1a452e315b9e98f9e312e6921e6"
    )
    assert pcrs[4].data == hashlib.sha384(bytes(48) + INSTANCE.encode()).digest()
    assert not any(any(pcr.data) for pcr in pcrs[5:])


def test_debug_mode_zeroes_measurements_only() -> None:
    pcrs = World(pcrs={**MEASURED, 8: b"8" * 48}, debug=True).payload()["pcrs"]
    assert {index for index, value in pcrs.items() if any(value)} == {4}
    pcrs = World(pcrs={**MEASURED, 8: b"8" * 48}).payload()["pcrs"]
    assert {index for index, value in pcrs.items() if any(value)} == {0, 1, 2, 4, 8}


def test_describe() -> None:
    described = World().nsm.describe()
    module_id = described.pop("module_id")
    assert module_id.startswith(f"{INSTANCE}-enc")
    assert described == {
        "version_major": 1,
        "version_minor": 0,
        "version_patch": 0,
        "max_pcrs": 32,
        "locked_pcrs": LOCKED_AT_BOOT,
        "digest": "SHA384",
    }


@pytest.mark.parametrize(
    ("request_", "response"),
    [
        # Locked at boot.
        *(({"LockPCR": {"index": index}}, {"Error": "ReadOnlyIndex"}) for index in LOCKED_AT_BOOT),
        *(({"ExtendPCR": {"index": index, "data": b"x"}}, {"Error": "ReadOnlyIndex"}) for index in LOCKED_AT_BOOT),
        # Beyond the last.
        ({"DescribePCR": {"index": 32}}, {"Error": "InvalidIndex"}),
        ({"ExtendPCR": {"index": 32, "data": b""}}, {"Error": "InvalidIndex"}),
        ({"LockPCR": {"index": 32}}, {"Error": "InvalidIndex"}),
        ({"LockPCR": {"index": 0xFFFF}}, {"Error": "InvalidIndex"}),
        ({"LockPCRs": {"range": 33}}, {"Error": "InvalidIndex"}),
        # Within.
        ({"LockPCR": {"index": 16}}, "LockPCR"),
        ({"LockPCR": {"index": 31}}, "LockPCR"),
        ({"LockPCRs": {"range": 0}}, "LockPCRs"),
        ({"LockPCRs": {"range": 16}}, "LockPCRs"),
        ({"LockPCRs": {"range": 32}}, "LockPCRs"),
        ({"DescribePCR": {"index": 31}}, {"DescribePCR": {"lock": False, "data": bytes(48)}}),
        ({"ExtendPCR": {"index": 16, "data": b""}}, {"ExtendPCR": {"data": hashlib.sha384(bytes(48)).digest()}}),
        (
            {"ExtendPCR": {"index": 31, "data": "text"}},
            {"ExtendPCR": {"data": hashlib.sha384(bytes(48) + b"text").digest()}},
        ),
        # Unknown or garbled.
        *(
            (request, {"Error": "InvalidOperation"})
            for request in (
                *("", "describeNSM", "LockPCR", "Attestation", None, 7, [], {}, {1: {}}, {"GetRandom": None}),
                *({"DescribeNSM": {}}, {"LockPCR": {}}, {"LockPCR": 16}, {"LockPCR": {"index": -1}}, ["DescribeNSM"]),
                *({"LockPCR": {"index": True}}, {"LockPCR": {"index": 0x10000}}, {"LockPCR": {"index": "16"}}),
                *({"ExtendPCR": {"index": 16}}, {"ExtendPCR": {"data": b"x"}}, {"ExtendPCR": {"index": 16, "data": 1}}),
                *({"LockPCRs": {"index": 16}}, {"Attestation": None}, {"Attestation": {"nonce": 1}}),
                *({"LockPCR": {"index": 16}, "LockPCRs": {"range": 17}}, {"Attestation": [None, None, None]}),
            )
        ),
    ],
)
def test_semantics(request_: object, response: object) -> None:
    assert World().raw(request_) == response


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\xff",
        b"\x61",
        b"\x6b44657363726962654e53",
        cbor2.dumps("GetRandom") + b"\0",
        bytes.fromhex("a1674c6f636b504352a265696e6465781065696e64657811"),  # index twice
        b"\x81" * 2000 + b"\0",
        b"\xd8\x23\x61(",  # a regular expression that does not parse
        b"\xc0\x01",
    ],
)
def test_bytes_that_are_no_request(request_: bytes) -> None:
    assert cbor2.loads(World().simulated.handle(request_)) == {"Error": "InvalidOperation"}


def test_request_size_limit() -> None:
    world = World()
    room = 0x1000 - len(cbor2.dumps({"ExtendPCR": {"index": 16, "data": bytes(4000)}})) + 4000
    fits = cbor2.dumps({"ExtendPCR": {"index": 16, "data": bytes(room)}})
    assert len(fits) == 0x1000
    assert "ExtendPCR" in cbor2.loads(world.simulated.handle(fits))
    assert cbor2.loads(world.simulated.handle(fits + b"\0")) == {"Error": "InputTooLarge"}


def test_extend_chains_and_lock_holds() -> None:
    nsm = World().nsm
    first = nsm.extend_pcr(16, b"\1\2\3")
    second = nsm.extend_pcr(16, b"\4")
    assert second == hashlib.sha384(first + b"\4").digest() == nsm.describe_pcr(16).data
    nsm.lock_pcr(16)
    for again in (lambda: nsm.extend_pcr(16, b"x"), lambda: nsm.lock_pcr(16)):
        with pytest.raises(NsmError) as refused:
            again()
        assert refused.value.name == "ReadOnlyIndex"
    assert nsm.describe_pcr(16) == (True, second)


def test_lock_pcrs_is_idempotent_and_a_bad_range_locks_nothing() -> None:
    nsm = World().nsm
    with pytest.raises(NsmError):
        nsm.lock_pcrs(33)
    assert nsm.describe()["locked_pcrs"] == LOCKED_AT_BOOT
    nsm.lock_pcrs(20)
    nsm.lock_pcrs(20)
    nsm.lock_pcrs(3)
    assert nsm.describe()["locked_pcrs"] == list(range(20))


def test_random_is_fresh() -> None:
    nsm = World().nsm
    drawn = [nsm.random() for _ in range(16)]
    assert {len(value) for value in drawn} == {256}
    assert len(set(drawn)) == 16


# Documents


def test_document_has_the_shape_of_awss() -> None:
    world = World()
    world.nsm.extend_pcr(17, b"unlocked")
    world.nsm.extend_pcr(16, b"locked")
    world.nsm.lock_pcr(16)
    document = world.nsm.attest(user_data=b"", nonce=b"n", public_key=None)
    assert document[:7] == bytes.fromhex("8444a1013822a0")
    protected, unprotected, encoded, signature = cbor2.loads(document)
    assert (protected.hex(), unprotected, len(signature)) == ("a1013822", {}, 96)
    assert (encoded[0], encoded[-1]) == (0xBF, 0xFF)
    payload = cbor2.loads(encoded)
    assert list(payload) == [
        *("module_id", "digest", "timestamp", "pcrs", "certificate", "cabundle", "public_key", "user_data", "nonce")
    ]
    assert (payload["module_id"], payload["digest"]) == (world.simulated.module_id, "SHA384")
    assert (payload["public_key"], payload["user_data"], payload["nonce"]) == (None, b"", b"n")
    assert list(payload["pcrs"]) == list(range(17))  # not the unlocked 17
    assert payload["pcrs"][16] == hashlib.sha384(bytes(48) + b"locked").digest()
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    signed = cbor2.dumps(["Signature1", protected, b"", encoded])
    key = x509.load_der_x509_certificate(payload["certificate"]).public_key()
    key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(hashes.SHA384()))


def chain_shape(payload: dict[str, Any]) -> list[tuple[object, ...]]:
    """Everything about a chain save names, keys, numbers and times: orders, types, critical flags, path lengths."""
    shapes = []
    for der in (*payload["cabundle"], payload["certificate"]):
        certificate = x509.load_der_x509_certificate(der)
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        uses = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        names = [(attribute.oid._name, attribute._type) for attribute in certificate.subject]
        extensions = [(extension.oid._name, extension.critical) for extension in certificate.extensions]
        key = certificate.public_key().curve.name
        signed_with = certificate.signature_algorithm_oid._name
        shapes.append(
            (names, extensions, basic.ca, basic.path_length, repr(uses), key, signed_with, certificate.version)
        )
    return shapes


def test_chain_has_the_shape_of_awss() -> None:
    real = VECTORS / "base_hinted-repaired.bin"
    if not real.exists():
        pytest.skip("no real documents here: the chain's shape was not compared with AWS's")
    assert chain_shape(World().payload()) == chain_shape(payload_of(real.read_bytes()))


def test_chain_holds_and_says_simulated() -> None:
    world = World()
    payload = world.payload()
    chain = [x509.load_der_x509_certificate(der) for der in (*payload["cabundle"], payload["certificate"])]
    assert hashlib.sha256(payload["cabundle"][0]).digest() == world.root.fingerprint
    for issuer, certificate in zip([chain[0], *chain], chain, strict=False):
        certificate.verify_directly_issued_by(issuer)
        assert certificate.issuer.public_bytes() == issuer.subject.public_bytes()
        assert "simulated" in certificate.subject.rfc4514_string()
        assert (
            certificate.not_valid_before_utc.timestamp() * 1000
            <= NOW_MS
            <= certificate.not_valid_after_utc.timestamp() * 1000
        )
    (leaf_name,) = chain[-1].subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    assert str(leaf_name.value).startswith(f"{world.simulated.module_id}.")
    hours = [round((c.not_valid_after_utc - c.not_valid_before_utc).total_seconds() / 3600, 1) for c in chain[1:]]
    assert hours == [481, 142, 24, 3]


def test_leaf_is_kept_and_renewed_before_it_expires() -> None:
    world = World()
    first = world.payload()["certificate"]
    for minutes in range(0, 60 * 24 * 45, 487):
        world.now_ms = NOW_MS + minutes * 60_000
        payload = world.payload()
        for der in (*payload["cabundle"], payload["certificate"]):
            certificate = x509.load_der_x509_certificate(der)
            start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
            assert start * 1000 <= world.now_ms < (end - 300) * 1000
    world = World()
    assert world.payload()["certificate"] == first
    world.now_ms += 9_000_000
    assert world.payload()["certificate"] == first
    world.now_ms += 1_200_000
    assert world.payload()["certificate"] != first


def test_one_seed_one_story() -> None:
    def story(seed: int) -> list[bytes]:
        world = World(seed)
        nsm = world.nsm
        said = [nsm.random(), nsm.extend_pcr(16, b"x"), nsm.attest(user_data=b"u", nonce=b"n", public_key=b"k")]
        world.now_ms += 24 * 3600 * 1000
        return [*said, nsm.attest(**NOTHING), world.root.certificate]

    assert story(1) == story(1)
    assert [one == other for one, other in zip(story(1), story(2), strict=True)] == [False, True, False, False, False]


def test_modules_under_one_root_share_authorities_not_leaves() -> None:
    root = SimulatedRoot.create(entropy=random.Random(1).randbytes, now_ms=NOW_MS)

    def payload(seed: int) -> dict[str, Any]:
        simulated = SimulatedNsm(root, MEASURED, clock_ms=lambda: NOW_MS, entropy=random.Random(seed).randbytes)
        return payload_of(Nsm(simulated.handle).attest(**NOTHING))

    one, other = payload(1), payload(2)
    assert one["cabundle"] == other["cabundle"]
    assert one["certificate"] != other["certificate"]
    assert one["module_id"] != other["module_id"]


def test_the_verifier_accepts_documents_while_they_are_fresh() -> None:
    world = World()
    extended = world.nsm.extend_pcr(16, b"contract")
    world.nsm.lock_pcr(16)
    policy = AppraisalPolicy((Measurement("image", MEASURED),), frozenset({world.root.fingerprint}))
    said = {"user_data": b"u" * 48, "nonce": b"n" * 48, "public_key": b"k" * 32}
    for hours in range(0, 60, 7):
        world.now_ms = NOW_MS + hours * 3_600_000
        document = world.nsm.attest(**said)
        evidence = verify(document, policy, **said, pcrs={16: extended}, at=world.now_ms + 299_000)
        assert (evidence.timestamp_ms, evidence.aws, evidence.fresh) == (world.now_ms, False, True)
        assert verify(document, policy, nonce=said["nonce"]).own_time


def test_the_verifier_refuses_debug_mode_and_unknown_roots() -> None:
    world = World(debug=True)
    measurement = Measurement("image", MEASURED)
    for root, step in ((world.root.fingerprint, Step.DEBUG), (World(2).root.fingerprint, Step.ROOT)):
        with pytest.raises(AppraisalError) as refused:
            verify(world.nsm.attest(**NOTHING), AppraisalPolicy((measurement,), frozenset({root})), at=NOW_MS)
        assert refused.value.step == step


@pytest.mark.parametrize(
    "pcrs", [{}, {0: bytes(48), 1: bytes(48)}, {0: b"", 1: b"", 2: b""}, {**MEASURED, 3: bytes(48)}]
)
def test_pcrs_of_an_image_are_checked(pcrs: dict[int, bytes]) -> None:
    with pytest.raises(LocalError):
        World(pcrs=pcrs)


def test_instance_id_is_checked() -> None:
    with pytest.raises(LocalError):
        World(instance_id="somewhere")


# The root's file


def test_root_is_made_once_and_kept_private(tmp_path: Path) -> None:
    folder = tmp_path / "enclave" / "root"
    root = SimulatedRoot.load_or_create(folder)
    again = SimulatedRoot.load_or_create(folder)
    assert root.fingerprint == again.fingerprint == hashlib.sha256(root.certificate).digest()
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    chains = [[issued.der for issued in each.chain(INSTANCE, NOW_MS // 1000)] for each in (root, again)]
    assert chains[0] == chains[1]  # the authorities, too, survive a new start


def test_when_several_make_a_root_at_once_all_get_the_same(tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def fingerprint(folder: Path) -> bytes:
        start.wait(10)
        return SimulatedRoot.load_or_create(folder).fingerprint

    with ThreadPoolExecutor(4) as pool:
        for turn in range(8):
            assert len(set(pool.map(fingerprint, [tmp_path / str(turn)] * 4))) == 1
            assert len(list((tmp_path / str(turn)).iterdir())) == 1


def test_a_spoilt_root_file_is_refused(tmp_path: Path) -> None:
    SimulatedRoot.load_or_create(tmp_path)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    SimulatedRoot.load_or_create(tmp_path / "other")
    key_end = good.index(b"-----BEGIN CERTIFICATE")
    other = next((tmp_path / "other").iterdir()).read_bytes()
    for spoilt in (b"", good[:100], good[:key_end], good[:key_end] + other[other.index(b"-----BEGIN CERTIFICATE") :]):
        file.write_bytes(spoilt)
        with pytest.raises(LocalError, match="remove it"):
            SimulatedRoot.load_or_create(tmp_path)
    file.write_bytes(good)
    file.chmod(0o644)
    with pytest.raises(LocalError, match="chmod 600"):
        SimulatedRoot.load_or_create(tmp_path)


def test_keys_do_not_print() -> None:
    world = World()
    assert "key" not in repr(world.root.chain(INSTANCE, NOW_MS // 1000)[3])
