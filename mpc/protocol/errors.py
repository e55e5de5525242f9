"""Errors say whose fault it is, which step refused, what was expected and what came."""


class MpcError(Exception):
    """Something went wrong in a session."""

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        step: int | str | None = None,
        peer: str | None = None,
    ) -> None:
        """Never pass data, keys or plaintext: sizes, types and digests are what an error may show."""
        super().__init__(what)
        self.what, self.expected, self.got, self.step, self.peer = what, expected, got, step, peer

    def __str__(self) -> str:
        text = self.what
        if self.expected is not None:
            text += f": expected {self.expected}"
        if self.got is not None:
            text += f", got {self.got}" if self.expected is not None else f": got {self.got}"
        if self.step is not None:
            text += f" (step {self.step})"
        return f"{self.peer}: {text}" if self.peer else text


class LocalError(MpcError):
    """This side is misused or lacks something; nothing that a peer did."""


class PeerError(MpcError):
    """What another participant sent is wrong; nothing changed here."""


class EncodingError(PeerError):
    """The bytes are not the one encoding of what they should be."""


class SignatureError(PeerError):
    """The signature does not belong to this key, kind and payload."""


class OrderError(PeerError):
    """Not now, not from this sender, or not a second time."""


class SealError(PeerError):
    """Wrong key, wrong position or altered box; deliberately not told apart."""


class AppraisalError(PeerError):
    """The enclave is not the one you agreed to. Your data was not sent."""


class ContractError(PeerError):
    """The contract contradicts itself or breaks an owner's rule."""


class PolicyError(PeerError):
    """The contract asks for more than this party's own policy allows. Nothing was sent."""
