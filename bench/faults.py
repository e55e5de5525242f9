"""It must bite: faults planted in the product, a line or two each, and the invariant that must find each.

Where one check stands behind another, a fault takes away both: one alone would be harmless, which is good design and
no test.
"""

from collections.abc import Sequence

from bench.planting import Fault, Line, Row
from mpc.fuzz.setting import Setting
from mpc.fuzz.world import CRASH
from mpc.protocol import rounds

FIRST_CHECK = "first check, then change"
PARTY, SESSION, ENCLAVE = "parties.party:Party", "mpc.protocol.rounds:Session", "enclave_runtime.enclave:Enclave"
VERIFY, MAILBOX, SEALING = "mpc.attestation.verify:", "mpc.coordinator.mailbox:Mailbox", "mpc.protocol.sealing:"
ONE, LONG = Setting(parties=1), Setting(parties=1, long=True)
TWO = Setting(parties=2, corrupt=frozenset({"party-1"}))
TWO_HONEST = Setting(parties=2)
THREE = Setting(parties=3, corrupt=frozenset({"party-1"}))
APPROVED = Setting(parties=2, approvers=3, quorum=2, corrupt=frozenset({"party-1", "approver-0"}))
TRUSTING = Setting(parties=2, approvers=1, quorum=1, corrupt=frozenset({"party-1"}))
REWIND = ("call_dead", "change_input", "kill", "kill_between", "restart")


def fault(
    what: str,
    finds: str,
    setting: Setting,
    *planted: Line | Row,
    kinds: Sequence[str] = (),
    engine: str = "swarm",
) -> Fault:
    return Fault(what, finds, planted, setting, tuple(kinds), engine)


_NO_CHECK = "(lambda *_, **__: None)("
_PINS = Line(f"{PARTY}._attested", "if any(pins != earlier.pins for earlier in self._sealed.values()):", "if False:")
_SUMMARY = Line(f"{SESSION}._check_decision", "_same(", "(lambda *_: None)(")
_MISSING = (
    Line(
        f"{ENCLAVE}._compute_when_ready",
        "if self._commitment(contract, name) != consent.commitment:",
        "if contract.tables_of(name)[0] in self._inputs and self._commitment(contract, name) != consent.commitment:",
    ),
    Line(
        f"{ENCLAVE}._compute_when_ready",
        "self._inputs[stream].secret.length for",
        "self._inputs[stream].secret.length if stream in self._inputs else 0 for",
    ),
)
_BINDING = Line(f"{SESSION}._check_names", '_same("binding", self.binding.digest, named)', "pass")

FAULTS = (
    # confidentiality
    fault(
        "chunks are not encrypted",
        "confidentiality",
        TWO,
        Line(
            f"{SEALING}ChunkCipher.seal",
            "return self._aead.encrypt(nonce, chunk, context)",
            "return bytes(chunk) + bytes(TAG_BYTES)",
        ),
    ),
    fault(
        "an error quotes what it could not read",
        "confidentiality",
        LONG,
        Line(f"{ENCLAVE}._open", "got=len(chunk.box)", "got=bytes(table.buffer)"),
        kinds=("alter", "swap", "repeat", "reorder", "feed"),
    ),
    fault(
        "a result is sealed to the last participant",
        "confidentiality",
        TWO,
        Line(
            f"{ENCLAVE}._seal_key",
            "participant.sealing_key, context",
            "session.contract.participants[-1].sealing_key, context",
        ),
    ),
    fault(
        "a table is sealed to whoever comes last in the contract",
        "confidentiality",
        TWO,
        Line(
            f"{PARTY}._seal",
            "binding.sealing_key, context)",
            "contract.participants[-1].sealing_key, context)",
        ),
    ),
    # consent
    fault(
        "one party fewer is enough",
        "consent",
        THREE,
        Line(
            f"{SESSION}._advance",
            "len(self._speakers(rule.speaker))",
            "max(1, len(self._speakers(rule.speaker)) - 1)",
        ),
        Line(
            f"{ENCLAVE}._compute_when_ready",
            "self._inputs[stream].secret.length for",
            "self._inputs[stream].secret.length if stream in self._inputs else 0 for",
        ),
    ),
    fault(
        "the table of rounds calls one seal enough, and who is missing has no rows",
        "consent",
        TWO_HONEST,
        Row("SEAL", "Seal", (("times", rounds.Times.ONE),)),
        *_MISSING,
    ),
    fault(
        "the table of rounds calls one consent enough, and who is missing has no rows",
        "consent",
        TWO_HONEST,
        Row("CONSENT", "Consent", (("times", rounds.Times.ONE),)),
        Row("SEAL", "Seal", (("times", rounds.Times.ONE),)),
        *_MISSING,
        kinds=("drop", "delay", "reorder", "silence"),
    ),
    # appraisal
    fault(
        "a party does not appraise",
        "appraisal",
        TWO,
        Line(f"{PARTY}._attested", "self._appraise(", _NO_CHECK),
        kinds=("forge_attestation",),
    ),
    fault(
        "any measurement is accepted",
        "appraisal",
        TWO,
        Line(f"{VERIFY}_accepted_measurement", "    reasons = []", "    return policy.measurements[0]"),
        kinds=("forge_attestation",),
    ),
    fault(
        "debug mode is accepted, by an empty measurement",
        "appraisal",
        TWO,
        Line(f"{VERIFY}_check_not_debug", "if len(zero) == len(CODE_PCRS):", "if zero:\n        return\n    if False:"),
        Line(
            f"{VERIFY}_accepted_measurement", "if index is not None:", "if index is not None and any(claims.pcrs[2]):"
        ),
        kinds=("forge_attestation", "launch_other"),
    ),
    fault(
        "what a document states is not compared",
        "appraisal",
        TWO,
        Line(f"{VERIFY}_check_equal", "if expected is not None and expected != got:", "if False:"),
        kinds=("forge_attestation",),
    ),
    fault(
        "a document need not be of this enclave: nonce and key are skipped",
        "appraisal",
        TWO,
        Line(f"{PARTY}._attested", "user_data=binding.digest", "user_data=None"),
        Line(f"{PARTY}._attested", "public_key=binding.signing_key", "public_key=None"),
        kinds=("forge_attestation",),
    ),
    fault(
        "any root is accepted",
        "appraisal",
        TWO,
        Line("mpc.attestation.chain:check_chain", "not in roots:", "not in {*roots, root}:"),
        kinds=("forge_attestation",),
    ),
    # integrity
    fault(
        "inputs need not be what was committed to",
        "integrity",
        TWO,
        Line(
            f"{ENCLAVE}._compute_when_ready", "if self._commitment(contract, name) != consent.commitment:", "if False:"
        ),
    ),
    fault(
        "padding is taken for data",
        "integrity",
        TWO,
        Line(
            f"{ENCLAVE}._compute_when_ready",
            "tuple(self._inputs[stream].secret.length for",
            "tuple(padded_bytes(self._inputs[stream].secret.length) for",
        ),
    ),
    fault(
        "two recipients' results are mixed up",
        "integrity",
        TWO_HONEST,
        Line(
            f"{ENCLAVE}._outcome",
            "result = outcome.results[recipient]",
            "result = outcome.results[min(outcome.results)]",
        ),
    ),
    # one function
    fault("the commitments of an earlier epoch are forgotten", "one_function", TWO, _PINS, kinds=REWIND),
    fault(
        "the same, found by Hypothesis",
        "one_function",
        TWO,
        _PINS,
        kinds=("call_dead", "change_input"),
        engine="hypothesis",
    ),
    fault(
        "a party seals twice in an epoch",
        "one_function",
        TWO,
        Line(f"{PARTY}._attested", "sealed = self._sealed.get(after.epoch)", "sealed = None"),
    ),
    fault(
        "a second enclave in one epoch is sealed to",
        "one_function",
        TWO,
        Line(
            f"{PARTY}._attested",
            "if sealed is not None and open_signed(sealed.attestation).digest != open_signed(envelope).digest:",
            "if sealed is not None and open_signed(sealed.attestation).digest != open_signed(envelope).digest:\n"
            "        sealed = None\n    if False:",
        ),
        kinds=("split", "launch_again", "restart", "replay", "kill"),
    ),
    fault(
        "a party consents twice in an epoch",
        "one_function",
        TWO,
        Line(f"{PARTY}.__init__", "self._learn(memory)", "isinstance(memory, Consented) or self._learn(memory)"),
    ),
    fault(
        "a seal is not written down before it leaves",
        "one_function",
        TWO_HONEST,
        Line(f"{PARTY}._attested", "actions = self._remember(sealed)", "pass"),
        kinds=("restart", "kill", "kill_between", "drop"),
    ),
    fault(
        "a consent is not written down before it leaves",
        "one_function",
        TWO_HONEST,
        Line(
            f"{PARTY}._consent",
            "actions = self._remember(Consented(",
            "actions = (lambda memory: self._learn(memory) or [])(Consented(",
        ),
        kinds=("restart", "kill", "kill_between", "drop"),
    ),
    fault(
        "what was sealed is not read back from the ledger",
        "one_function",
        TWO_HONEST,
        Line(f"{PARTY}.__init__", "self._learn(memory)", "isinstance(memory, Sealed) or self._learn(memory)"),
        kinds=("restart", "kill", "kill_between", "drop"),
    ),
    # agreement
    fault(
        "the commitments of an earlier epoch are forgotten, and both enclaves release",
        "agreement",
        TWO,
        _PINS,
        kinds=("call_dead", "change_input", "feed"),
    ),
    fault(
        "a result depends on the epoch",
        "agreement",
        TWO_HONEST,
        Line(
            f"{ENCLAVE}._outcome",
            "result = outcome.results[recipient]",
            "result = outcome.results[recipient] + bytes([session.epoch])",
        ),
        kinds=("call_dead", "feed"),
    ),
    # release
    fault(
        "one approval less is enough",
        "release",
        APPROVED,
        Line(f"{SESSION}._advance", "self.contract.approvals.quorum):", "self.contract.approvals.quorum - 1):"),
    ),
    fault(
        "one approval is counted twice",
        "release",
        APPROVED,
        Line(f"{SESSION}.hear", "if earlier is not None:", "if earlier is not None and kind is not Decision:"),
        Line(
            f"{SESSION}.hear",
            "(kind, signed.signer): heard})",
            "(kind, signed.signer + bytes([len(after.said)]) * (kind is Decision)): heard})",
        ),
        Line(f"{SESSION}._advance", "len(self.messages(kind))", "len(self._heard(kind))"),
        kinds=("repeat_approval", "replay", "repeat", "silence", "forge_decision"),
    ),
    fault(
        "anybody in the contract may approve",
        "release",
        APPROVED,
        Line(
            f"{SESSION}._speaker",
            "name in self._speakers(rule.speaker)",
            "(name in self._speakers(rule.speaker) or rule.speaker is Role.APPROVER)",
        ),
        kinds=("forge_decision",),
    ),
    fault("an approval need not be of this summary", "release", APPROVED, _SUMMARY, kinds=("forge_decision",)),
    fault(
        "an approval of another enclave counts",
        "release",
        APPROVED,
        _SUMMARY,
        _BINDING,
        kinds=("call_dead", "replay", "kill", "launch_again", "repeat_approval"),
    ),
    fault(
        "an only approver need not be asked",
        "release",
        TRUSTING,
        Line(f"{SESSION}._advance", "self.contract.approvals.quorum == 0:", "self.contract.approvals.quorum <= 1:"),
    ),
    fault(
        "the table of rounds leaves approvals out",
        "release",
        APPROVED,
        Row("COMPUTE", "Computed", (("then", rounds.Round.RELEASE),)),
    ),
    fault(
        "the table of rounds lets one approver release",
        "release",
        APPROVED,
        Row("APPROVE", "Decision", (("times", rounds.Times.ONE),)),
    ),
    fault(
        "the deadline of the release is not looked at",
        "release",
        ONE,
        Line(f"{ENCLAVE}._release", "if timestamp_ms(document) > session.deadline_ms:", "if False:"),
        kinds=("slow", "wait"),
    ),
    # termination
    fault(
        "a party waits for ever",
        "termination",
        TWO,
        Line(f"{PARTY}._tick", "if now_ms <= (", "if True or ("),
    ),
    fault(
        "a party waits for ever, found by Hypothesis",
        "termination",
        TWO,
        Line(f"{PARTY}._tick", "if now_ms <= (", "if True or ("),
        engine="hypothesis",
    ),
    fault(
        "a party ends and is not told why",
        "termination",
        TWO,
        Line(f"{PARTY}._tick", 'f"not heard in round {session.round.name.lower()}: {who}"', '""'),
    ),
    fault(
        "the coordinator waits for ever",
        "termination",
        TWO,
        Line(f"{MAILBOX}._tick", "if now_ms <= self.next_deadline_ms():", "if True:"),
    ),
    # blame
    fault(
        "anybody may blame",
        "blame",
        THREE,
        Line(
            f"{SESSION}._check_names",
            "if isinstance(message, Abort) and message.blamed is not None and name != Role.ENCLAVE.value:",
            "if False:",
        ),
    ),
    fault("a message need not be for this enclave", "blame", TWO, _BINDING),
    fault(
        "the wrong party is blamed for an input",
        "blame",
        TWO,
        Line(f"{ENCLAVE}._compute_when_ready", "blamed=name", "blamed=contract.parties[0]"),
    ),
    fault(
        "the wrong party is blamed for a seal",
        "blame",
        TWO,
        Line(f"{ENCLAVE}._hear", "blamed=heard.name", "blamed=session.contract.parties[0]"),
    ),
    fault(
        "the wrong party is blamed for a schema",
        "blame",
        TWO,
        Line(
            f"{ENCLAVE}._outcome",
            "session.contract.tables[outcome.bad_table].owner",
            "session.contract.tables[0].owner",
        ),
        kinds=("change_input",),
    ),
    fault(
        "a party accuses itself instead of who is blamed",
        "blame",
        TWO,
        Line(f"{PARTY}._hear", "proven against {heard.message.blamed}", "proven against {self._name}"),
    ),
    fault(
        "a chunk that does not open is its owner's fault",
        "blame",
        LONG,
        Line(
            f"{ENCLAVE}._open",
            "table.cipher.open_into(chunk.box, chunk.index, place)",
            "try:\n        table.cipher.open_into(chunk.box, chunk.index, place)\n    except SealError:\n"
            '        return self._abort("input", blamed=session.contract.tables[chunk.stream].owner)',
        ),
        kinds=("alter",),
    ),
    fault(
        "a chunk may stand anywhere",
        "blame",
        LONG,
        Line(f"{SEALING}ChunkCipher._position", "last = bytes([index == self._last])", "last, index = b'0', 0"),
        kinds=("swap",),
    ),
    fault(
        "signatures are not verified",
        "blame",
        TWO_HONEST,
        Line(
            "mpc.protocol.signing:open_signed", "verifier.verify(signature, _to_be_signed(protected, payload))", "pass"
        ),
        kinds=("alter", "repeat"),
    ),
    fault(
        "what a party committed to is not read back from the ledger",
        "blame",
        TWO_HONEST,
        Line(f"{PARTY}.__init__", "self._learn(memory)", "isinstance(memory, Committed) or self._learn(memory)"),
        kinds=("restart", "kill", "kill_between"),
    ),
    # erasure
    fault("the opening key is kept", "erasure", APPROVED, Line(f"{ENCLAVE}._outcome", "self._opening = None", "pass")),
    fault("content keys are kept", "erasure", APPROVED, Line(f"{ENCLAVE}._outcome", "self._inputs.clear()", "pass")),
    fault("tables are kept", "erasure", APPROVED, Line(f"{ENCLAVE}._outcome", "self._memory.erase()", "pass")),
    fault(
        "keys are kept after close",
        "erasure",
        TWO,
        Line(f"{ENCLAVE}._close", "self._signing = self._opening = None", "pass"),
    ),
    fault("results are kept after close", "erasure", TWO, Line(f"{ENCLAVE}._close", "self._results.clear()", "pass")),
    fault("inputs are kept after an abort", "erasure", TWO, Line(f"{ENCLAVE}._close", "self._inputs.clear()", "pass")),
    fault("tables are kept after an abort", "erasure", TWO, Line(f"{ENCLAVE}._close", "self._memory.erase()", "pass")),
    # what stands beside the ten
    fault(
        "results leave before approvals",
        FIRST_CHECK,
        APPROVED,
        Line(f"{ENCLAVE}._outcome", "if self._session.round is Round.RELEASE else []", ""),
    ),
    fault(
        "the enclave takes the word of another enclave for its own",
        FIRST_CHECK,
        TWO,
        Line(
            f"{ENCLAVE}._hear",
            "after, heard = session.hear(envelope)",
            "after, heard = session.hear(envelope)\n    self._session = after",
        ),
        kinds=("forge_attestation",),
    ),
    fault(
        "a chunk that nobody announced is counted",
        FIRST_CHECK,
        TWO,
        Line(
            f"{MAILBOX}.check_chunk",
            "if epoch != self.session.epoch:",
            "self._chunks[stream].add(index)\n    if epoch != self.session.epoch:",
        ),
        kinds=("post_stored", "alter", "call_dead"),
    ),
    fault(
        "a party remembers an epoch that it refuses",
        FIRST_CHECK,
        TWO,
        Line(
            f"{PARTY}._open_epoch",
            "if session.round is Round.CLOSE:",
            "self._epoch_called = max(self._epoch_called, epoch)\n    if session.round is Round.CLOSE:",
        ),
        kinds=("open_epoch",),
    ),
    fault(
        "the table of rounds calls one seal enough",
        CRASH,
        TWO_HONEST,
        Row("SEAL", "Seal", (("times", rounds.Times.ONE),)),
    ),
)
