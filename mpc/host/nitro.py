"""The `nitro` backend: an enclave is a virtual machine that AWS's hypervisor cuts out of this EC2 instance.

nitro-cli launches and ends it. Its channel is vsock, and it is the enclave that connects: to a port of this, the
parent instance, where we listen before it exists. So nothing in the enclave listens, nobody but that enclave (by its
CID, which the hypervisor vouches for) gets the channel, and nobody has to guess when the other is ready.
Tested against a stand-in for nitro-cli; not yet run on AWS hardware. See docs/NITRO.md.

Source: AWS Nitro Enclaves user guide, "Nitro CLI" and "Nitro Enclaves CLI error codes"; aws-nitro-enclaves-cli
src/common/document_errors.rs, src/enclave_proc/resource_manager.rs; man 7 vsock.
"""

import errno
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

from mpc.host import launched
from mpc.host.launched import EnclaveLost
from mpc.image import cache, eif, standin
from mpc.image.eif import ImageError, Kind
from mpc.image.measure import Measurements
from mpc.image.nitro_init import CHANNEL_PORT
from mpc.protocol.errors import LocalError

DEVICE = Path("/dev/nitro_enclaves")
PORT_S = 180  # to wait for another launch on this instance to be over
RUN_S = 600  # for nitro-cli to launch; it waits for the enclave's heartbeat itself, 90 s for each 6 GiB of image
ASK_S = 60  # for its other commands
CHANNEL_S = 60  # from the heartbeat until the application's connection
LOOK_S = 5  # meanwhile, how often to look whether the enclave lives
BACKLOG = 64  # connections that may wait, most of them strangers'
DEBUG_WARNING = (
    "DEBUG MODE: this instance reads the enclave's console, and the PCRs in the enclave's documents are all zero.\n"
    "No party will accept this enclave. Use it to find out why an image does not start, and never with data.\n"
)
_GUIDE = "docs/NITRO.md says how to set an instance up"
_ALLOCATOR = "/etc/nitro_enclaves/allocator.yaml, then: sudo systemctl restart nitro-enclaves-allocator"
_REMEDIES = {  # by the first error that nitro-cli names; those that follow it only say that it failed
    "E07": "sudo systemctl enable --now nitro-enclaves-allocator, and be a member of the group ne",
    "E22": f"ask for fewer ([enclave] cpus), or raise cpu_count in {_ALLOCATOR}",
    "E26": "give the enclave more memory ([enclave] memory): at least four times the size of its image",
    "E27": f"ask for less ([enclave] memory), or raise memory_mib in {_ALLOCATOR}",
    "E29": "x86 instances give whole cores: [enclave] cpus must be even; and the CPU pool must have them free "
    f"(nitro-cli describe-enclaves; cpu_count in {_ALLOCATOR})",
    "E35": f"the huge pages were not to be had; see memory_mib in {_ALLOCATOR}",
    "E36": "the image did not boot, or something else launched an enclave at that moment (nitro-cli cannot launch two "
    "at a time); launch again, then with a console",
    "E51": "source /etc/profile.d/nitro-cli-env.sh",
}
_IN_GENERAL = ("Such error", "This is used", "It arises", "In this case", "You can increase")  # sentences of its manual


class Listener(Protocol):
    """A listening vsock socket, or what a test has in its place: `accept` gives (connection, (CID, port))."""

    def accept(self) -> tuple[socket.socket, Any]: ...
    def settimeout(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class Launched(launched.Launched):
    """A running enclave."""

    def __init__(
        self, channel: socket.socket, info: dict[str, Any], measurements: Measurements, undo: ExitStack
    ) -> None:
        super().__init__(channel, measurements, undo)
        self.enclave_id: str = info["EnclaveID"]
        self.pid: int = info["ProcessID"]  # of nitro-cli's process that holds the enclave

    def describe(self) -> dict[str, Any]:
        found = _find("EnclaveID", self.enclave_id) or {"EnclaveID": self.enclave_id, "State": "TERMINATED"}
        return {"Measurements": {"HashAlgorithm": "Sha384 { ... }", **self.measurements.shown()}, **found}


def listen() -> Listener:
    """On the channel's port. The port is a lock, too: launches on one instance come one after the other.

    Raises: LocalError when there is no vsock, or somebody else keeps the port.
    """
    until = time.monotonic() + PORT_S
    try:
        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except (AttributeError, OSError):
        raise LocalError(
            f"this system has no vsock (sudo modprobe vsock), as every parent instance has; {_GUIDE}"
        ) from None
    while True:
        try:
            listener.bind((socket.VMADDR_CID_ANY, CHANNEL_PORT))
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < until:
                time.sleep(0.5)
                continue
            listener.close()
            raise LocalError(f"vsock port {CHANNEL_PORT} of this instance: {error.strerror}") from None
        listener.listen(BACKLOG)
        return listener


def check() -> None:
    """Raises LocalError when this machine is no parent instance, or this user may not launch enclaves."""
    if shutil.which("nitro-cli") is None:
        raise LocalError(
            "the nitro backend launches with nitro-cli, which is not here: run it on an EC2 instance with Nitro "
            f"Enclaves enabled (Amazon Linux 2023: sudo dnf install aws-nitro-enclaves-cli); {_GUIDE}"
        )
    if not DEVICE.exists():
        raise LocalError(
            f"{DEVICE} is missing: launch this instance with enclaves enabled (--enclave-options Enabled=true), and "
            f"load the driver (sudo modprobe nitro_enclaves); {_GUIDE}"
        )
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise LocalError(f"{DEVICE}: no permission; join its group (sudo usermod -aG ne $USER) and log in again")


def launch(path: Path, *, cpus: int, memory_bytes: int, console: Path | None = None) -> Launched:
    """Launch an image. Returns when its application has connected.

    Args: cpus: an even number on x86 instances. memory_bytes: all that the enclave has, its image unpacked included;
        rounded up to 1 MiB. console: launch in DEBUG MODE, which no party accepts, and write the console there.
    Raises: ImageError when the file is no image for this backend; LocalError, with what to do, when nitro-cli refuses;
        EnclaveLost when the enclave died before its application connected.
    """
    check()
    measured = measure(path)
    if console is not None:
        sys.stderr.write(DEBUG_WARNING)
        measured = Measurements(bytes(48), bytes(48), bytes(48))
    name = f"mpc-{secrets.token_hex(8)}"
    arguments = ["--eif-path", str(path.absolute()), "--cpu-count", str(cpus)]
    arguments += ["--memory", str(-(-memory_bytes >> 20)), *(["--debug-mode"] if console else [])]
    listener = listen()
    try:
        with ExitStack() as undo:
            info = _run(name, arguments)
            undo.callback(_end, name)
            if console is not None:
                undo.callback(_write_console(info["EnclaveID"], console))
            channel = _accept(listener, info, console)
            undo.callback(channel.close)
            return Launched(channel, info, measured, undo.pop_all())
    finally:
        listener.close()


def _run(name: str, arguments: list[str]) -> dict[str, Any]:
    """Returns when the enclave's first process lives; when that comes to nothing, no enclave is left."""
    try:
        return _started(_nitro_cli("run-enclave", "--enclave-name", name, *arguments, timeout_s=RUN_S))
    except BaseException:
        with suppress(LocalError):  # what went wrong first is what a person must hear
            _end(name)
        raise


def _started(info: Any) -> dict[str, Any]:
    kinds = {"EnclaveID": str, "EnclaveCID": int, "ProcessID": int}
    if not isinstance(info, dict) or any(type(info.get(key)) is not kind for key, kind in kinds.items()):
        raise LocalError("nitro-cli run-enclave", expected=f"JSON with {', '.join(kinds)}", got="something else")
    return info


def measure(path: Path) -> Measurements:
    """What an image measures. Raises ImageError when it is none for this backend."""
    with eif.opened(path) as image:
        if image.read(image.of(Kind.CMDLINE)[0]) == standin.CMDLINE:
            raise ImageError(f"{path}: an image for the local backend, without a kernel; {_GUIDE} and build one")
        return cache.measured(image)


def _accept(listener: Listener, info: dict[str, Any], console: Path | None) -> socket.socket:
    """The connection of the enclave with that CID. Anybody on this instance may connect; others are hung up on."""
    until = time.monotonic() + CHANNEL_S
    while (left := until - time.monotonic()) > 0:
        listener.settimeout(min(left, LOOK_S))
        try:
            connection, (theirs, _) = listener.accept()
        except TimeoutError:
            if _find("EnclaveID", info["EnclaveID"]) is None:
                raise EnclaveLost("the enclave ended before its application connected") from None
            continue
        if theirs == info["EnclaveCID"]:
            connection.settimeout(None)
            return connection
        connection.close()
    said = f"{console} has its console" if console else "to see why, launch it with a console (debug mode)"
    raise LocalError(f"the enclave booted, but its application did not connect within {CHANNEL_S} s; {said}")


def _write_console(enclave_id: str, file: Path) -> Callable[[], None]:
    """Returns what ends it."""
    try:
        with file.open("ab") as out:
            out.write(DEBUG_WARNING.encode())
            out.flush()
            command = ["nitro-cli", "console", "--enclave-id", enclave_id]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    except OSError as error:
        raise LocalError(f"{file}: the console cannot be written there ({error.strerror})") from None

    def end() -> None:
        process.kill()
        process.wait()

    return end


def _end(name: str) -> None:
    """The enclave of that name, if it (still) runs. Raises LocalError when it goes on."""
    found = _find("EnclaveName", name)
    if found is None:
        return
    try:
        _nitro_cli("terminate-enclave", "--enclave-id", found["EnclaveID"], timeout_s=ASK_S)
    except LocalError as error:
        if _find("EnclaveName", name) is not None:
            again = f"nitro-cli terminate-enclave --enclave-id {found['EnclaveID']}"
            raise LocalError(f"an enclave still runs; end it by hand ({again}): {error}") from None


def _find(key: str, value: str) -> dict[str, Any] | None:
    """What describe-enclaves says of one of this user's enclaves. Raises LocalError unless it is a list of them.

    What was not understood must not pass for an enclave that is gone: nobody would end it.
    """
    listed = _nitro_cli("describe-enclaves", timeout_s=ASK_S)
    if type(listed) is not list or any(
        type(one) is not dict or type(one.get("EnclaveID")) is not str for one in listed
    ):
        raise LocalError("nitro-cli describe-enclaves", expected="a JSON list of enclaves", got="something else")
    return next((entry for entry in listed if entry.get(key) == value), None)


def _nitro_cli(command: str, *arguments: str, timeout_s: float) -> Any:
    """The JSON that it prints. Raises LocalError with its first error, what that means here, and the remedy."""
    try:
        done = subprocess.run(
            ["nitro-cli", command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise LocalError(f"nitro-cli {command} did not end within {timeout_s} s") from None
    except OSError as error:
        raise LocalError(f"nitro-cli cannot be run ({error.strerror}); {_GUIDE}") from None
    if done.returncode < 0:
        raise LocalError(f"nitro-cli {command} was ended by a signal ({signal.strsignal(-done.returncode)})")
    if done.returncode > 0:
        raise LocalError(_explain(command, done.stderr))
    try:
        return json.loads(done.stdout)
    except (ValueError, RecursionError):
        raise LocalError(f"nitro-cli {command} printed no JSON; nitro-cli 1.2 or later does") from None


def _explain(command: str, said: str) -> str:
    """One sentence: the first error is the cause, and the log that it names may say more."""
    first = re.search(r"\[ (E\d\d) \] (.+?)(?=\n\n|\nFailed connections|\Z)", said, re.DOTALL)
    if first is None:
        lines = said.strip().splitlines() or ["nothing"]
        return f"nitro-cli {command} failed and said: {lines[-1][:300]}"
    code, words = first[1], " ".join(first[2].split())
    sentences = [one for one in re.split(r"(?<=\.) ", words) if not one.startswith(_IN_GENERAL)]
    cause = f" ({told})" if (told := _logged(said)) else ""
    remedy = _REMEDIES.get(code, f"nitro-cli explain --error-code {code}")
    if code == "E19" and ("/dev/nitro_enclaves" in words or "/sys/module/nitro_enclaves" in words):
        remedy = f"the driver is not loaded (sudo modprobe nitro_enclaves), or enclaves are not enabled here; {_GUIDE}"
    return f"nitro-cli {command}: {code}, {' '.join(sentences)[:300].rstrip('.')}{cause}; {remedy}"


def _logged(said: str) -> str:
    """The innermost action in the log of the first error, where this user may read it."""
    place = re.search(r'error log found at "(.+?)"', said)
    if place is None:
        return ""
    try:
        with Path(place[1]).open(errors="replace") as file:
            log = file.read(1 << 16)
    except OSError:
        return ""
    listed = re.search(r"Subactions:\n((?:    .+\n)+)", log)
    return listed[1].splitlines()[-1].strip()[:200] if listed else ""
