"""Seeds for the parsers: real messages of one fair session in memory, and real files, small ones."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import cbor2
import msgpack
import pyarrow as pa
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from enclave_runtime.programs.inputs import schema_of
from mpc import scenario, settings
from mpc.fuzz.actors import Keys, SeededCryptography
from mpc.fuzz.facts import opened
from mpc.fuzz.mutations import mutate_cbor
from mpc.fuzz.world import PCRS, START_MS, Setting, World
from mpc.host.simulated_nsm import SimulatedNsm, encode_payload, identity_pcr, leaf_template, sign1
from mpc.host.simulated_root import issue, private_key
from mpc.image import cpio, eif
from mpc.image.eif import Kind
from mpc.image.measure import measure
from mpc.image.signature import Signer
from mpc.protocol import contract as terms
from mpc.protocol.channel import Frame, begin_frame, chunk_head, frame
from mpc.protocol.encoding import decode, encode
from mpc.protocol.messages import Abort, sign
from mpc.protocol.signing import Signed, SigningKey
from mpc.transport import Ended, EpochOpened, Said, encode_entry
from parties import identity, policy

MODULE_ID, INSTANCE_ID = "i-0123456789abcdef0-enc0123456789abcdef", "i-0123456789abcdef0"


class Session:
    """A fair session of everybody: all kinds of messages, and the keys that signed them."""

    def __init__(self) -> None:
        self.world = world = World(1, Setting(parties=3, receivers=1, approvers=2, quorum=1, wide=True))
        world.until(lambda: any(opened(envelope).kind == "computed" for envelope in world.pool))
        enclave = world.enclaves[0].machine._signing
        assert enclave is not None
        world.fair()
        signers = [world.author, enclave, *(keys.signing for keys in world.keys.values())]
        self.keys = {key.public: key for key in signers}
        withdrawn = sign(world.keys["party-0"].signing, Abort(world.contract.digest, 1, "withdrawn"))
        blamed = sign(enclave, Abort(world.contract.digest, 1, "input", "party-1"))
        self.envelopes = (*world.pool, withdrawn, blamed)

    def of(self, *kinds: str) -> tuple[bytes, ...]:
        return tuple(envelope for envelope in self.envelopes if opened(envelope).kind in kinds)

    def payloads(self, kind: str) -> tuple[bytes, ...]:
        return tuple(opened(envelope).payload for envelope in self.of(kind))

    @property
    def documents(self) -> tuple[bytes, ...]:
        """The attestation document of the session and of its release; with a tag, too."""
        (attestation,), (release,) = self.payloads("attestation"), self.payloads("release")
        plain = (decode(attestation)["document"], decode(release)["document"])
        return (*plain, b"\xd2" + plain[0])


session: Callable[[], Session] = cache(Session)


def signed_again(envelope: bytes, random: Random, others: object) -> bytes:
    """A signed message with a changed payload, under a signature that is good: deeper than any forger comes.

    Often what is changed is a message inside it (of a roster, of a receipt's history), and all around is signed anew.
    """
    try:
        said = opened(envelope)
    except Exception:  # a seed of another kind: an engine mixes them
        return mutate_cbor(envelope, random, ())
    inner = decode(said.payload)
    history = inner["receipt"]["history"] if said.kind == "release" else inner.get("roster", ())
    if history and random.random() < 0.7:
        place = random.randrange(len(history))
        history[place] = signed_again(history[place], random, others)
        payload = encode(inner)
    else:
        payload = mutate_cbor(said.payload, random, session().payloads(said.kind))
    return _key(said, random).sign(said.kind, payload)


def _key(said: Signed, random: Random) -> SigningKey:
    keys = session().keys
    return keys[said.signer] if random.random() < 0.95 else random.choice(list(keys.values()))


@cache
def _leaf() -> tuple[ec.EllipticCurvePrivateKey, list[bytes]]:
    """The key of an enclave, and its chain under the world's root: leaf first, then as `cabundle` has it."""
    chain = session().world.root.chain(INSTANCE_ID, START_MS // 1000)
    key = private_key(SeededCryptography("leaf").random(48))
    leaf = issue(leaf_template(MODULE_ID, START_MS // 1000), key, chain[-1])
    return key, [leaf.der, *(authority.der for authority in chain)]


@cache
def payload() -> bytes:
    """Of an attestation document that the world's policy accepts."""
    _, (certificate, *cabundle) = _leaf()
    return encode_payload(
        {
            "module_id": MODULE_ID,
            "digest": "SHA384",
            "timestamp": START_MS,
            "pcrs": {**PCRS, 3: bytes(48), 4: identity_pcr(INSTANCE_ID)},
            "certificate": certificate,
            "cabundle": cabundle,
            "public_key": b"key",
            "user_data": None,
            "nonce": b"n" * 16,
        }
    )


def attested(changed: bytes) -> bytes:
    """The document with that payload, signed by the enclave's key."""
    return sign1(changed, _leaf()[0])


def nsm() -> SimulatedNsm:
    draw = SeededCryptography("nsm")
    return SimulatedNsm(session().world.root, PCRS, clock_ms=lambda: START_MS, entropy=draw.random)


@cache
def nsm_requests() -> tuple[bytes, ...]:
    empty: dict[str, object] = dict.fromkeys(("user_data", "nonce", "public_key"))
    requests: tuple[object, ...] = (
        *("DescribeNSM", "GetRandom", {"DescribePCR": {"index": 0}}, {"LockPCR": {"index": 20}}),
        *({"ExtendPCR": {"index": 16, "data": b"data"}}, {"LockPCRs": {"range": 17}}, {"Attestation": empty}),
    )
    return tuple(map(cbor2.dumps, requests))


@cache
def nsm_replies() -> tuple[bytes, ...]:
    module = nsm()
    replies = tuple(module.handle(request) for request in nsm_requests())
    (document,) = (cbor2.loads(reply)["Attestation"]["document"] for reply in replies[-1:])
    return (*replies, document)


def channel_frames() -> tuple[bytes, ...]:
    proposal, *_, abort = session().envelopes
    chunk = chunk_head(1, 2, 4112) + bytes(4112)
    return begin_frame(1, proposal), frame(Frame.MESSAGE, abort), chunk, frame(Frame.REFUSED, b"not now")


def log_entries() -> tuple[bytes, ...]:
    entries = (Said(session().envelopes[-1]), EpochOpened(2), Ended("not heard", "round seal", ("ada", "bert")))
    return tuple(msgpack.packb(encode_entry(entry)) for entry in (*entries, Ended("released")))


def requests() -> tuple[bytes, ...]:
    """What the coordinator is asked, and answers."""
    name = session().world.contract.digest
    chunk: dict[str, object] = {"session": name, "epoch": 1, "stream": 0}
    frames: list[dict[str, Any]] = [
        {"op": "propose", "envelope": session().envelopes[0]},
        {"op": "post", "session": name, "envelope": session().envelopes[-1]},
        *({"op": "put", **chunk, "index": 3}, {"op": "get", **chunk, "count": 4}, {"op": "have", **chunk}),
        {"op": "lost", "session": name, "epoch": 1},
        {"op": "log", "session": name},
        *({"ok": True}, {"entries": 70_000}),
        *({"have": 3}, {"refused": "a reason"}),
    ]
    return (*map(msgpack.packb, frames), *log_entries())


@contextmanager
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="mpc-parsers-") as name:
        yield Path(name)


@cache
def ramdisks() -> tuple[bytes, ...]:
    files = {"init.py": b"pass\n", "app/mpc/__init__.py": b"", "app/x.so": bytes(range(256)), "z": b"123"}
    return tuple(b"".join(cpio.pack(some)) for some in (files, {}, {"a/b/c/d": b"1234"}))


@cache
def signer() -> Signer:
    key = ec.derive_private_key(20261123, ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "release team")])
    dates = (datetime(2024, 3, 5, tzinfo=UTC), datetime(2044, 3, 15, tzinfo=UTC))
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, *dates).sign(key, hashes.SHA384())
    return Signer(key, certificate)


METADATA = (
    b'{"ImageName":"n","ImageVersion":"1","BuildMetadata":{"BuildTool":"t"},"DockerInfo":{},"CustomMetadata":null}'
)
Sections = list[tuple[Kind, list[eif.Buffer]]]


@cache
def images() -> tuple[bytes, ...]:
    """Plain; with two ramdisks and metadata; signed."""
    plain: Sections = [(Kind.KERNEL, [b"kernel"]), (Kind.CMDLINE, [b"cmdline"]), (Kind.RAMDISK, [ramdisks()[0]])]
    more: Sections = [*plain, (Kind.RAMDISK, [ramdisks()[2]]), (Kind.METADATA, [METADATA])]
    files = []
    with folder() as place:
        for sections in (plain, more):
            eif.write(place / "image", "x86_64", sections)
            files.append((place / "image").read_bytes())
        section = signature(measure(place / "image").pcr0)
        eif.write(place / "image", "aarch64", [*more, (Kind.SIGNATURE, [section])])
        files.append((place / "image").read_bytes())
    return tuple(files)


def signature(pcr0: bytes) -> bytes:
    return signer().sign(pcr0)


MORE = b"""[scenario]
name = "more"

[enclave]
backend = "local"
cpus = 2
memory = "1 GiB"
epochs = 2

[deadlines]
consent = "90 s"

[party.ada.table.rows]
source = "rows.csv"
null = ["NA", ""]
bytes_max = "64 MiB"
rule = { kind = "exact" }

[party.ada.table.rows.columns]
id = { type = "string" }
pay = { type = "double", use = ["sum"], buckets = [0, 5], clamp = [-1, 1.5] }

[party.bert.table.rows]
like = "ada"

[party.approver]

[program]
kind = "sql"
query = "SELECT 1"

[recipients]
result = ["ada"]
receipt = ["bert"]

[approvals]
quorum = 1
approvers = ["approver"]
"""


@cache
def scenarios() -> tuple[bytes, ...]:
    """The shipped ones as they are, and as they are written back; one with what these do not say."""
    found = [scenario.find(Path(name)) for name in scenario.shipped()]
    return (
        MORE,
        *(file.read_bytes() for file in found),
        *(settings.write(scenario.load(file)).encode() for file in found),
    )


@cache
def policies() -> tuple[bytes, ...]:
    """A party's own policy for each shipped scenario."""
    contract = session().world.contract
    draw = SeededCryptography("policies")
    texts = []
    for name in scenario.shipped():
        given = scenario.load(Path(name))
        people = [Keys.draw(party, draw).participant for party in given.party]
        texts += [
            policy.dump(
                policy.from_scenario(
                    given,
                    people[0].name,
                    participants=people,
                    measurements=contract.enclave.measurements,
                    root=contract.enclave.root,
                    simulated=simulated,
                )
            ).encode()
            for simulated in (True, False)
        ]
    return tuple(texts)


def appraisal_policies() -> tuple[bytes, ...]:
    pcrs = "\n".join(f'PCR{index} = "{value.hex()}"' for index, value in PCRS.items())
    one = f'[[measurement]]\nlabel = "one"\n{pcrs}\n'
    other = f'[[measurement]]\nlabel = "other"\nexpires = 2027-01-31T00:00:00Z\n{pcrs}\nPCR8 = "{"ab" * 48}"\n'
    root = session().world.root.fingerprint.hex()
    return one.encode(), f'roots = ["aws-nitro-enclaves-g1", "{root}"]\nage_max = "90 s"\n{one}{other}'.encode()


REPLAY = b"""{
 "version": 1, "seed": 7,
 "setting": {"parties": 2, "approvers": 1, "quorum": 1, "corrupt": ["party-1"], "wide": true},
 "moves": [["deliver", 5], ["hurry", 4294967295]],
 "expected": {"invariant": "consent", "why": "words", "events": "00"}
}
"""


@cache
def identities() -> tuple[bytes, ...]:
    with folder() as place:
        identity.load_or_create("ada", place / "identity.cbor")
        return ((place / "identity.cbor").read_bytes(),)


TABLE = terms.Table(
    "all",
    "ada",
    terms.Rule("exact"),
    tuple(terms.Column(kind, kind) for kind in ("bool", "int64", "double", "string", "date", "timestamp")),
    1 << 20,
)


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


@cache
def arrow_tables() -> tuple[bytes, ...]:
    schema = schema_of(TABLE)
    rows = [
        {"bool": True, "int64": -(2**63), "double": 0.5, "string": "ä", "date": 0, "timestamp": 10**15},
        dict.fromkeys(schema.names),
        {"bool": False, "int64": 7, "double": -1e308, "string": "", "date": -1, "timestamp": -1},
    ]
    table = pa.Table.from_pylist(rows, schema)
    return tuple(stream(one) for one in (table, table.slice(0, 0), pa.concat_tables([table] * 3)))
