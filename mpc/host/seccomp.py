"""The system calls that a local enclave may make; the kernel answers every other one with ENOSYS.

An allowlist: what nobody thought of is refused too. ENOSYS rather than EPERM, because the C library takes it as "this
kernel is older" and does without, so that a newer one still runs. See docs/decisions/sandbox.md.
"""

import errno
import os
from functools import cache
from typing import Any

from mpc.protocol.errors import LocalError

# Reading what is mounted, all of it read-only, and descriptors. No call here makes, removes or renames a file.
FILES = """
    access close close_range dup dup2 dup3 eventfd2 faccessat faccessat2 fadvise64 fcntl fstat fstatfs getcwd getdents64
    lseek lstat newfstatat open openat pipe pipe2 poll ppoll pread64 preadv preadv2 pselect6 pwrite64 pwritev pwritev2
    read readlink readlinkat readv select stat statfs statx write writev
    epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait
"""
MEMORY = "brk fallocate ftruncate madvise memfd_create membarrier mincore mmap mprotect mremap msync munmap"
# Of sockets, only what one does with those that were inherited.
SOCKETS = "getpeername getsockname getsockopt recvfrom recvmsg sendmsg sendto setsockopt shutdown"
# `execve` starts the interpreter; the image's first code gives it up. `kill` reaches the enclave's own processes only.
PROCESSES = """
    alarm arch_prctl execve exit exit_group fork futex futex_wait futex_waitv futex_wake getcpu getegid geteuid getgid
    getgroups getitimer getpgid getpgrp getpid getppid getpriority getresgid getresuid getrlimit getrusage getsid gettid
    getuid kill pause prctl restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend
    rt_sigtimedwait sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getparam sched_getscheduler
    sched_yield set_robust_list set_tid_address setitimer sigaltstack sysinfo tgkill times uname vfork wait4 waitid
    clock_getres clock_gettime clock_nanosleep getrandom gettimeofday nanosleep time
"""
ALLOWED = " ".join((FILES, MEMORY, SOCKETS, PROCESSES)).split()
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET
_AF_UNIX = 1
_IOCTLS = {  # of any descriptor; none of a device, of which there is none
    "FIOCLEX": 0x5451,
    "FIONCLEX": 0x5450,
    "FIONBIO": 0x5421,
    "FIONREAD": 0x541B,
    "TCGETS": 0x5401,
    "TIOCGWINSZ": 0x5413,
}
_INSTALL = "install libseccomp (Debian, Ubuntu: apt install libseccomp2; Fedora: dnf install libseccomp)"


@cache
def program() -> bytes:
    """The filter for this machine, as BPF. `clone3` is among the refused: its flags lie in memory, beyond a filter."""
    try:
        import pyseccomp
    except RuntimeError:
        raise LocalError(f"the sandbox of the local backend needs libseccomp: {_INSTALL}") from None
    arg, equal = pyseccomp.Arg, pyseccomp.EQ
    rules: list[tuple[str, list[Any]]] = [(name, []) for name in ALLOWED]
    rules += [("ioctl", [arg(1, equal, request)]) for request in _IOCTLS.values()]
    rules += [
        ("clone", [arg(0, pyseccomp.MASKED_EQ, _NEW_NAMESPACES, 0)]),
        ("prlimit64", [arg(0, equal, 0)]),  # of itself
        ("socketpair", [arg(0, equal, _AF_UNIX)]),
    ]
    filter_ = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.ENOSYS))
    for name, conditions in rules:
        if (
            pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) != -1
        ):  # else a libseccomp that is older than the call
            filter_.add_rule(pyseccomp.ALLOW, name, *conditions)
    with os.fdopen(os.memfd_create("seccomp", os.MFD_CLOEXEC), "r+b") as file:
        filter_.export_bpf(file)
        file.seek(0)
        return file.read()
