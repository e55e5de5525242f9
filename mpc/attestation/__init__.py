"""A verifier for attestation documents of AWS Nitro Enclaves that stands alone.

    evidence = verify(document, policy, nonce=nonce, at=now_ms)

raises an AppraisalError with the number of the failed step of docs/ATTESTATION.md, what was expected and what came.
"""

from mpc.attestation.checklist import Step
from mpc.attestation.document import DOCUMENT_BYTES_MAX, Document, unverified_document
from mpc.attestation.policy import CONTRACT_PCR, AppraisalPolicy, Measurement, contract_pcr
from mpc.attestation.roots import AWS_NITRO_ROOT_G1, root_fingerprint
from mpc.attestation.verify import Evidence, verify

__all__ = [
    "AWS_NITRO_ROOT_G1",
    "CONTRACT_PCR",
    "DOCUMENT_BYTES_MAX",
    "AppraisalPolicy",
    "Document",
    "Evidence",
    "Measurement",
    "Step",
    "contract_pcr",
    "root_fingerprint",
    "unverified_document",
    "verify",
]
