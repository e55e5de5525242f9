"""Files read without verifying anything: for showing them, and for knowing what they claim to be."""

import cbor2

from mpc.protocol.encoding import Record, decode
from mpc.protocol.errors import EncodingError
from mpc.protocol.messages import KINDS
from mpc.protocol.signing import ENVELOPE_BYTES_MAX, KEY_ID, KIND, PROTECTED_BYTES_MAX

_MESSAGE_HEAD = b"\x84\x58"  # array of 4, byte string of 24 to 255 bytes; an attestation document's header has 4 bytes


def looks_signed(content: bytes) -> bool:
    """Whether this has the form of a message of this protocol, and not of an attestation document."""
    return content.startswith(_MESSAGE_HEAD)


def unverified_message(envelope: bytes) -> tuple[str, bytes, Record]:
    """Kind, claimed signer's key, and message, whoever signed it. Raises EncodingError."""
    try:
        protected, _, payload, _ = decode(envelope, ENVELOPE_BYTES_MAX)
        header = cbor2.loads(protected[:PROTECTED_BYTES_MAX], max_depth=1)
        kind, key = header[KIND], header[KEY_ID]
    except Exception as error:  # cbor2's own and Python's: all say that this is no such message
        raise EncodingError(f"not a signed message ({type(error).__name__})") from None
    if type(key) is not bytes or type(payload) is not bytes:
        raise EncodingError("not a signed message")
    if type(kind) is not str or kind not in KINDS:
        raise EncodingError("kind of message", expected=", ".join(KINDS), got=ascii(kind)[:40])
    return kind, key, KINDS[kind].decode(payload)
