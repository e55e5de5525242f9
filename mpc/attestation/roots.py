"""Fingerprints of root certificates; the certificates themselves come in the documents."""

import re
from types import MappingProxyType

from mpc.protocol.errors import LocalError

FINGERPRINT_BYTES = 32  # SHA-256 of the certificate's DER

AWS_NITRO_ROOT_G1 = bytes.fromhex("641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b")
"""CN=aws.nitro-enclaves, valid 2019-10-28 to 2049-10-28: the commercial `aws` partition, and no other.

Source: https://aws-nitro-enclaves.amazonaws.com/AWS_NitroEnclaves_Root-G1.zip, AWS Nitro Enclaves user guide, "Root of
trust". Other partitions have roots of their own; a policy that needs one names its fingerprint.
"""

ROOT_NAMES = MappingProxyType({"aws-nitro-enclaves-g1": AWS_NITRO_ROOT_G1})

# What AWS publishes beside the link is the hash of the ZIP file; it has been pinned in its certificate's place before.
_AWS_ROOT_ZIP = bytes.fromhex("8cf60e2b2efca96c6a9e71e851d00c1b6991cc09eadbe64a6a1d1b1eb9faff7c")


def root_fingerprint(text: str) -> bytes:
    """The fingerprint that a person wrote: a name of `ROOT_NAMES`, or 64 hex digits, with or without colons.

    Raises:  LocalError if it is neither.
    """
    if text in ROOT_NAMES:
        return ROOT_NAMES[text]
    digits = text.replace(":", "")
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", digits):
        expected = f"{' or '.join(ROOT_NAMES)}, or the certificate's SHA-256 in 64 hex digits"
        raise LocalError("root", expected=expected, got=f"{len(text)} characters")
    fingerprint = bytes.fromhex(digits)
    if fingerprint == _AWS_ROOT_ZIP:
        raise LocalError(
            "root: this is the SHA-256 of AWS's ZIP file, not of the certificate in it",
            expected=AWS_NITRO_ROOT_G1.hex(),
        )
    return fingerprint
