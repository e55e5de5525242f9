"""The first process of a Nitro enclave: /init of its bootstrap ramdisk, measured in PCR0 and PCR1.

It loads the drivers, tells nitro-cli that the enclave lives, connects to the parent instance, and runs the
application in a child whose descriptor 3 is that channel; the NSM is /dev/nsm. When the child has ended, so does the
enclave. Nothing here listens, and no connection goes anywhere but to the parent instance.
Until the application starts, the console (which only debug mode has) says what is missing; from then on nothing
reaches it, since an error's words may quote data.

Source: aws-nitro-enclaves-sdk-bootstrap init/init.c; Linux net/vmw_vsock/virtio_transport_common.c,
Documentation/userspace-api/seccomp_filter.rst.
"""

import ctypes
import errno
import importlib
import os
import platform
import socket
import struct
import sys
import time
import traceback
from pathlib import Path

PARENT_CID = 3  # the parent instance, always
HEARTBEAT_PORT, HEARTBEAT = 9000, b"\xb7"  # nitro-cli's, which answers with the same byte
CHANNEL_PORT = 0x6D706331  # "mpc1": mpc.host.nitro listens there before it starts us
CHANNEL_FD = 3
_CONNECT_S, _PAUSE_S = 20, 0.5
_LAST_WORDS_S = 10  # the kernel delivers what a closed connection still has for up to 8 s (VSOCK_CLOSE_TIMEOUT)

_NOSUID_NOEXEC = 2 | 8
_RB_AUTOBOOT = 0x01234567
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.ENOSYS, 0x80000000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
# The calls that the application may make, by number: those of the local backend's sandbox (mpc.host.seccomp) but for
# execve, and what the engine needs to leave root: ioctl (of the NSM), chroot, mkdir, setgroups, setgid, setuid.
# No call among them opens a socket, so that the engine, which reads hostile tables, cannot reach the parent instance.
_ALLOWED = {
    "x86_64": """
        0-28 32-39 44-48 51-58 60-63 72 77 79-80 83 89 96-100 102 104-108 110-111 115-116 118 120-121 124 127-128
        130-131 137-138 140 143 145-147 157-158 161 186 201-202 204 217-219 221 228-234 247 257-258 262 267 269-271
        273 281 285 290-293 295-296 302 309 318-319 324 327-328 332 334 436 439 441 449 454-455
    """,
    "aarch64": """
        17 19-25 29 34 43-44 46-49 51 56-57 59 61-70 72-73 78-80 93-96 98-99 101-103 113-115 120-121 123-126 128-129
        131-137 139 141 144 146 148 150 153 155-156 158-160 163 165 167-169 172-179 199 204-212 214-216 220 222-223
        226-227 232-233 260-261 278-279 283 286-287 291 293 436 439 441 449 454-455
    """,
}


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        _devices(libc)
        with connect(HEARTBEAT_PORT) as nitro_cli:
            heartbeat(nitro_cli)
        child = os.fork()
        if child == 0:
            _child()
        while os.wait()[0] != child:
            pass
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        time.sleep(_LAST_WORDS_S)
        libc.reboot(_RB_AUTOBOOT)


def _devices(libc: ctypes.CDLL) -> None:
    """/dev, the console, and the drivers that the kernel has not built in (/modules, in the order of their names)."""
    if libc.mount(b"dev", b"/dev", b"devtmpfs", _NOSUID_NOEXEC, None) and ctypes.get_errno() != errno.EBUSY:
        raise OSError(ctypes.get_errno(), "/dev cannot be mounted")
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    console = os.open("/dev/console", os.O_WRONLY | os.O_NOCTTY)
    os.dup2(console, 1)
    os.dup2(console, 2)
    for driver in sorted(Path("/modules").iterdir()):
        with driver.open("rb") as file:
            if libc.syscall(_FINIT_MODULE[platform.machine()], file.fileno(), b"", 0):
                raise OSError(ctypes.get_errno(), f"{driver}: cannot be loaded")
    if not Path("/dev/nsm").exists():
        raise FileNotFoundError("/dev/nsm: the kernel has no driver for it, and the bootstrap ramdisk no nsm.ko")


def connect(port: int) -> socket.socket:
    """To the parent instance. Who listens there was there first; but strangers may fill its queue for a while."""
    until = time.monotonic() + _CONNECT_S
    while True:
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            connection.connect((PARENT_CID, port))
        except OSError:
            connection.close()
            if time.monotonic() > until:
                raise
            time.sleep(_PAUSE_S)
        else:
            return connection


def heartbeat(nitro_cli: socket.socket) -> None:
    nitro_cli.sendall(HEARTBEAT)
    if nitro_cli.recv(1) != HEARTBEAT:
        raise ConnectionError("nitro-cli did not return the heartbeat")


def _child() -> None:
    try:
        run_application(connect(CHANNEL_PORT))
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


def run_application(channel: socket.socket) -> None:
    """Never more than descriptors 0 to 3, no environment, and no way to get either."""
    os.dup2(channel.detach(), CHANNEL_FD)
    os.closerange(CHANNEL_FD + 1, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    sys.argv = [""]
    sys.path.append("/app")
    allow_calls(platform.machine())  # before there is a second thread, which would not be bound by it
    application = importlib.import_module("enclave_runtime.__main__")
    os.dup2(0, 1)  # descriptor 0 is /dev/null
    os.dup2(0, 2)
    application.main()


def allow_calls(machine: str) -> None:
    """For this process and all that it starts, for ever: every other call is answered with ENOSYS. Raises OSError."""
    allowed: list[int] = []
    for part in _ALLOWED[machine].split():
        first, _, last = part.partition("-")
        allowed += range(int(first), int(last or first) + 1)
    instructions = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number of the call; x32's have a bit more than any of these
        *((_EQUAL, len(allowed) - place, 0, number) for place, number in enumerate(allowed)),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(instructions), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described, 0, 0
    ):
        raise OSError(ctypes.get_errno(), "seccomp filter")


if __name__ == "__main__":
    main()
