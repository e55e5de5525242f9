"""`mpc doctor`: what this machine lacks for `mpc run`, and the line that mends it."""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path

import click

from mpc.cli.output import BAD, CAUTION, FAINT, GOOD, Output, examples, with_output
from mpc.protocol.errors import LocalError, MpcError

LIBRARIES = ("cbor2", "click", "cryptography", "duckdb", "msgpack", "msgspec", "pyarrow", "rich", "trio")
TRY_S = 10


@dataclass(frozen=True)
class Check:
    """One thing that `mpc run` needs."""

    name: str
    ok: bool
    found: str
    remedy: str = ""  # a line to run, when it is not ok


@click.command(epilog=examples("mpc doctor", "mpc doctor --json"))
@with_output
def doctor(out: Output) -> int:
    """Say what this machine lacks for `mpc run`, and the line that mends it.

    Exit status: 0 `mpc run` can work here; 1 something is missing.
    """
    checks = list(examine())
    limits = _limitations()
    ready = all(check.ok for check in checks)
    out.verdict("ready" if ready else "lacking", "for `mpc run` on this machine", GOOD if ready else BAD)
    out.line()
    out.facts((f"{'✓' if check.ok else '✗'} {check.name}", check.found) for check in checks)
    if not ready:
        out.heading("To mend it")
        out.points([check.remedy for check in checks if not check.ok], "→", CAUTION)
    if limits:
        out.heading("What the local backend cannot do here")
        out.points(limits, "–", FAINT)
    out.document(
        {
            "status": "ready" if ready else "lacking",
            "checks": [asdict(check) for check in checks],
            "limitations": limits,
        }
    )
    return 0 if ready else 1


def examine() -> Iterator[Check]:
    """Every check, none of which changes anything."""
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield Check("system", platform.system() == "Linux", system, "the local backend needs Linux: namespaces, seccomp")
    version = f"{platform.python_implementation()} {platform.python_version()}"
    supported = sys.version_info >= (3, 11) and platform.python_implementation() == "CPython"
    yield Check("Python", supported, version, "use CPython 3.11 or later")
    yield _libraries()
    yield _seccomp()
    yield from _sandbox()
    yield _image()


def _libraries() -> Check:
    missing, found = [], []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    text = f"missing: {', '.join(missing)}" if missing else ", ".join(found)
    return Check("libraries", not missing, text, f"{sys.executable} -m pip install {' '.join(missing)}")


def _seccomp() -> Check:
    install = "install libseccomp (Debian, Ubuntu: sudo apt install libseccomp2; Fedora: sudo dnf install libseccomp)"
    try:
        import_module("pyseccomp")
    except ModuleNotFoundError:
        return Check("seccomp", False, "pyseccomp is missing", f"{sys.executable} -m pip install pyseccomp")
    except Exception as error:  # whatever a binding raises that does not find its C library
        return Check("seccomp", False, f"libseccomp cannot be loaded ({type(error).__name__})", install)
    return Check("seccomp", True, f"pyseccomp {metadata.version('pyseccomp')}")


def _sandbox() -> Iterator[Check]:
    """bubblewrap, and whether it may make user namespaces here."""
    install = "install bubblewrap (Debian, Ubuntu: sudo apt install bubblewrap; Fedora: sudo dnf install bubblewrap)"
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        yield Check("sandbox", False, "bubblewrap is missing", install)
        return
    yield Check("sandbox", True, f"{_tried([bwrap, '--version'])[1]} at {bwrap}")
    empty = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL", "--ro-bind", "/", "/"]
    worked, said = _tried([*empty, "--", shutil.which("true") or "/bin/true"])
    yield Check(
        "namespaces",
        worked,
        "user, mount, PID, network, IPC and UTS namespaces work" if worked else f"bubblewrap says: {said}",
        "let this user make namespaces (Ubuntu 24.04: sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0; "
        "older Debian: sudo sysctl kernel.unprivileged_userns_clone=1; containers: a seccomp profile that allows "
        "unshare)",
    )


def _tried(command: list[str]) -> tuple[bool, str]:
    """Whether a command succeeds, and the last line that it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TRY_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, type(error).__name__
    said = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode == 0, said[-1][:200] if said else "nothing"


def _image() -> Check:
    """Whether the image can be built, and where built ones lie; building is left to those who need it."""
    from mpc.image import cache, variant

    try:
        files = len(variant.files("sql"))
        built = len(list(Path(cache.folder()).glob("image-sql-*.eif")))
    except LocalError as error:
        return Check("image", False, str(error), "install this program's locked dependencies again")
    state = f"{built} built, in {cache.folder()}" if built else "not built yet; the first `mpc run` builds it"
    return Check("image", True, f"{files} files of this installation; {state}")


def _limitations() -> list[str]:
    try:
        local = import_module("mpc.host.local")
        return [str(sentence) for sentence in local.limitations()]
    except (ImportError, MpcError):
        return []  # what is missing for that is among the checks
