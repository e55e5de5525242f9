"""The first code of a `local` enclave, in the place of a kernel's init: bootstrap ramdisk, measured in PCR0 and PCR1.

Started as `python -I -B -S /init.py` with descriptors 0 to 2 (the console), 3 (the channel) and 4 (the NSM).
Until the application starts, the console tells its launcher what is missing; from then on nothing reaches it, since
an error's words may quote data.
"""

import ctypes
import importlib
import os
import platform
import struct
import sys

_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_EXECVE = {"x86_64": (59, 322), "aarch64": (221, 281)}  # execve, execveat; other ABIs are refused by the launcher


def refuse_programs() -> None:
    """No other program in this process or its children, for ever: nothing here needs one.

    Source: Linux Documentation/userspace-api/seccomp_filter.rst. Raises OSError.
    """
    execve, execveat = _EXECVE[platform.machine()]
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, 0),  # the number of the system call
            (_EQUAL, 1, 0, execve),
            (_EQUAL, 0, 1, execveat),
            (_RETURN, 0, 0, _REFUSE),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    described = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp filter")


def main() -> None:
    os.closerange(5, os.sysconf("SC_OPEN_MAX"))
    os.environ.clear()
    sys.argv = [""]
    sys.path.append("/app")
    application = importlib.import_module("enclave_runtime.__main__")
    refuse_programs()
    os.write(1, b"\n")  # started
    os.dup2(0, 1)  # descriptor 0 is /dev/null
    os.dup2(0, 2)
    application.main()


if __name__ == "__main__":
    main()
