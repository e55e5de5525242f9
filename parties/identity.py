"""A participant's keys: Ed25519 to sign, ML-KEM-768+X25519 to open what is sealed to it; one file, mode 0600."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import cbor2

from mpc.protocol.contract import Participant
from mpc.protocol.errors import LocalError
from mpc.protocol.sealing import OpeningKey
from mpc.protocol.signing import SigningKey

# COSE_KeySet (RFC 9052 section 7): an OKP Ed25519 key, and the seed of the opening key as a symmetric one.
_KTY, _ALG, _CRV, _X, _D, _K = 1, 3, -1, -2, -4, -1
_OKP, _SYMMETRIC, _EDDSA, _ED25519 = 1, 4, -8, 6


@dataclass(frozen=True)
class Identity:
    name: str
    signing: SigningKey = field(repr=False)
    opening: OpeningKey = field(repr=False)

    @property
    def participant(self) -> Participant:
        """The public half, as it stands in contracts."""
        return Participant(self.name, self.signing.public, self.opening.public)


def load_or_create(name: str, path: Path) -> Identity:
    """Raises LocalError when the file is not an identity, or others may read it."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        signing_seed, opening_seed = os.urandom(32), os.urandom(32)
        public = SigningKey(signing_seed).public
        keys = [
            {_KTY: _OKP, _ALG: _EDDSA, _CRV: _ED25519, _X: public, _D: signing_seed},
            {_KTY: _SYMMETRIC, _K: opening_seed},
        ]
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(file, "wb") as out:
            out.write(cbor2.dumps(keys))
    if path.stat().st_mode & 0o077:
        raise LocalError(f"{path}: others may read this identity; run: chmod 600 {path}")
    try:
        signing_key, opening_key = cbor2.loads(path.read_bytes())
        return Identity(name, SigningKey(signing_key[_D]), OpeningKey(opening_key[_K]))
    except Exception as error:
        raise LocalError(f"{path}: not an identity file ({type(error).__name__})") from None
