"""A stand-in for nitro-cli: its commands, JSON, errors and exit statuses, with a Unix socket in the place of vsock.

`test_nitro` installs it as an executable. NITRO_STANDIN is a folder: pool.json says what the instance has, vsock is the
socket on which the parent instance listens, running/ holds the enclaves, log/ the errors' logs, calls every command.
The enclave is a process whose Unix address, an abstract name `cid-port`, plays the part of its vsock address. What it
does is in pool.json (`enclave`): it returns what it gets, or `computes`: then it is the image's own application.

Source: AWS Nitro Enclaves user guide; aws-nitro-enclaves-cli src/common/{mod,document_errors,json_output}.rs,
src/enclave_proc/{resource_manager,utils}.rs.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

HOME = Path(os.environ["NITRO_STANDIN"])
TAIL = (
    "Failed connections: 1\n[ E39 ] Enclave process connection failure. Such error appears when the enclave manager "
    "fails to connect to at least one enclave process for retrieving the description information.\n\n"
    "For more details, please visit https://docs.aws.amazon.com/enclaves/latest/user/cli-errors.html#E39\n\n"
)


def fail(code: str, words: str, *actions: str, tail: str = TAIL) -> None:
    log = HOME / "log" / f"err{time.time_ns()}.log"
    listed = "".join(f"    {action}\n" for action in ("Failed to execute command `Run`", *actions))
    log.write_text(f"  Action: Run Enclave\n  Subactions:\n{listed}  Root error file: src/x.rs\n  Root error line: 1\n")
    sys.stderr.write(
        f"[ {code} ] {words}\n\nFor more details, please visit https://docs.aws.amazon.com/enclaves/latest/user/"
        f'cli-errors.html#{code}\n\nIf you open a support ticket, please provide the error log found at "{log}"\n{tail}'
    )
    sys.exit(1)


def options(given: list[str], flags: set[str], valued: set[str]) -> dict[str, str]:
    """As strict as nitro-cli's parser."""
    found, left = {}, list(given)
    while left:
        name = left.pop(0)
        if name not in flags | valued or name in found:
            sys.stderr.write(f"error: Found argument '{name}' which wasn't expected, or isn't valid in this context\n")
            sys.exit(1)
        found[name] = "" if name in flags else left.pop(0)
    return found


def run_enclave(given: list[str]) -> None:
    valued = {"--enclave-name", "--cpu-count", "--cpu-ids", "--memory", "--eif-path", "--enclave-cid"}
    asked = options(given, {"--debug-mode", "--attach-console"}, valued)
    for needed in ("--memory", "--eif-path"):
        if needed not in asked:
            fail("E01", f"Missing mandatory argument. User did not provide the `{needed[2:]}` argument.", tail="")
    pool = json.loads((HOME / "pool.json").read_text())
    cpus, memory, eif = int(asked["--cpu-count"]), int(asked["--memory"]), Path(asked["--eif-path"])
    minimum = -(-eif.stat().st_size >> 20) * 4
    if cpus > pool["cpus"]:
        fail(
            "E22",
            f"Insufficient CPUs available in the pool. User provided `cpu-count` is {cpus}, which is more than the "
            "configured CPU pool size.\nYou can increase the CPU pool size by editing the `cpu_count` value from "
            "'/etc/nitro_enclaves/allocator.yaml' and then enable the nitro-enclaves-allocator.service.",
        )
    if memory < minimum:
        fail(
            "E26",
            f"Insufficient memory requested. User provided `memory` is {memory} MB, but based on the EIF file size, "
            f"the minimum memory should be {minimum} MB",
            f"At least {minimum} MB must be allocated (which is 4 times the EIF file size)",
        )
    if pool.get("device") == "broken":
        fail(
            "E19",
            "File operation failure. Such error appears when the system fails to perform the requested file "
            "operations, such as opening the EIF file when launching an enclave, or seeking to a specific offset in "
            "the EIF file, or writing to the log file.\nFile: '/dev/nitro_enclaves', failing operation: 'Open'.",
            'Failed to open device file: Os { code: 2, kind: NotFound, message: "No such file or directory" }',
        )
    sys.stderr.write("Start allocating memory...\n")
    if memory > pool["memory_mib"]:
        fail(
            "E27",
            f"Insufficient memory available. User provided `memory` is {memory} MB, which is more than the available "
            "hugepage memory.\nYou can increase the available memory by editing the `memory_mib` value from "
            "'/etc/nitro_enclaves/allocator.yaml' and then enable the nitro-enclaves-allocator.service.",
        )
    if cpus % 2:
        fail(
            "E29",
            "Ioctl failure. Such error is used as a general ioctl error and appears whenever an ioctl fails. In this "
            "case, the error backtrace provides detailed information on what specifically failed during the ioctl.",
            "Start enclave ioctl failed",
            "The enclave cannot start because full CPU cores have not been set",
        )
    cid = int(asked.get("--enclave-cid", 16 + secrets.randbelow(1000)))
    cores = list(range(1, 2 * cpus, 2))
    sys.stderr.write(f"Started enclave with enclave-cid: {cid}, memory: {memory} MiB, cpu-ids: {cores}\n")
    if pool["enclave"] == "does not boot":
        fail(
            "E36",
            "Enclave boot failure. Such error appears when attempting to receive the `ready` signal from a freshly "
            "booted enclave. It arises in several contexts, for instance, when the enclave is booted from an invalid "
            "EIF file and the enclave process immediately exits, failing to submit the `ready` signal. In this case, "
            "the error backtrace provides detailed information on what specifically failed during the enclave boot "
            "process.",
            "Waiting on enclave to boot failed with error VsockTimeoutError",
        )
    info = {
        "EnclaveName": asked.get("--enclave-name", eif.stem),
        "EnclaveID": f"i-0123456789abcdef0-enc{secrets.token_hex(8)}",
        "ProcessID": start(cid, eif, behaviour(pool), "--debug-mode" in asked or bool(pool.get("debug"))),
        "EnclaveCID": cid,
        "NumberOfCPUs": cpus,
        "CPUIDs": cores,
        "MemoryMiB": memory,
    }
    more = {"State": "RUNNING", "Flags": "DEBUG_MODE" if "--debug-mode" in asked else "NONE"}
    (HOME / "running" / info["EnclaveID"]).write_text(json.dumps(info | more))
    cli = pool.get("cli")
    if cli == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if cli == "prints half":
        info = {"EnclaveID": info["EnclaveID"]}
    print({"prints rubbish": "\0{", "prints nothing": ""}.get(cli, json.dumps(info, indent=2)))


def behaviour(pool: dict) -> str:
    """A list of them is for one enclave after the other."""
    if isinstance(pool["enclave"], str):
        return pool["enclave"]
    first, *pool["enclave"] = pool["enclave"]
    (HOME / "pool.json").write_text(json.dumps(pool))
    return first


def start(cid: int, eif: Path, behaviour: str, debug: bool) -> int:
    """The enclave, in a process that nobody waits for."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        if (enclave := os.fork()) == 0:
            for descriptor in range(3):
                os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            be_enclave(cid, eif, behaviour, debug)
        os.write(writer, enclave.to_bytes(4, "big"))
        os._exit(0)
    os.waitpid(child, 0)
    return int.from_bytes(os.read(reader, 4), "big")


def be_enclave(cid: int, eif: Path, behaviour: str, debug: bool) -> None:
    """Connect to the parent instance, and return in pieces what comes; or compute."""
    kept = []
    try:
        if "after strangers" in behaviour:
            kept += [connect(stranger, 1) for stranger in (1, 3, cid + 1)]
        if behaviour == "dies while it starts":
            return
        if behaviour == "never connects":
            time.sleep(60)
        if behaviour.startswith("computes"):
            compute(connect(cid, 1024), eif, debug)
            return
        channel = connect(cid, 1024)
        while data := channel.recv(65536):
            for place in range(0, len(data), 1000):
                channel.sendall(data[place : place + 1000])
        if behaviour in ("outlives its channel", "does not end"):
            time.sleep(60)
    except ConnectionError:
        return
    finally:
        os._exit(0)


# As /init does it, but for descriptor 4: the NSM is a socket here, and no device.
FIRST = """
import ctypes, importlib, importlib.util, os, platform, sys
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
os.closerange(5, os.sysconf("SC_OPEN_MAX"))
described = importlib.util.spec_from_file_location("init", sys.argv[1])
init = importlib.util.module_from_spec(described)
described.loader.exec_module(init)
sys.path.append(sys.argv[2])
init.allow_calls(platform.machine())
importlib.import_module("enclave_runtime.__main__").main()
"""


def compute(channel: socket.socket, eif: Path, debug: bool) -> None:
    """Run the image's application, as root where we are root; its NSM is simulated, under this machine's root."""
    from mpc.host.simulated_nsm import SimulatedNsm, SimulatedRoot
    from mpc.image import cpio, nitro_init
    from mpc.image.eif import Kind, opened
    from mpc.image.measure import measure_image

    root = SimulatedRoot.load_or_create(Path(os.environ["XDG_STATE_HOME"]) / "enclave-mpc")
    folder = HOME / f"memory-{os.getpid()}"
    with opened(eif) as image:
        ramdisk = image.of(Kind.RAMDISK)[1]
        read = image.reader(ramdisk)
        for entry in cpio.entries(read, ramdisk.size):
            if entry.folder:
                (folder / entry.name).mkdir(parents=True)
            else:
                (folder / entry.name).write_bytes(read(entry.offset, entry.size))
        pcrs = measure_image(image)[0].pcrs
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        kept = [os.dup(channel.fileno()), os.dup(its.fileno())]
        for there, here in enumerate(kept, start=3):
            os.dup2(here, there)
        program = [sys.executable, "-I", "-B", "-S", "-c", FIRST, nitro_init.__file__, str(folder / "app")]
        os.execve(sys.executable, program, {})
    its.close()
    channel.close()
    SimulatedNsm(root, pcrs, debug=debug).serve(ours)
    shutil.rmtree(folder)


def connect(cid: int, port: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.bind(f"\0{HOME}-{cid}-{port}")
    connection.connect(str(HOME / "vsock"))
    return connection


def listed() -> list[dict]:
    """Whoever still runs; nitro-cli forgets the others."""
    found = []
    for path in sorted((HOME / "running").iterdir()):
        info = json.loads(path.read_text())
        stat = Path(f"/proc/{info['ProcessID']}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
            found.append(info)
        else:
            path.unlink()
    return found


def describe_enclaves(given: list[str]) -> None:
    options(given, {"--metadata"}, set())
    odd = json.loads((HOME / "pool.json").read_text()).get("describes")
    print(odd or json.dumps(listed(), indent=2))


def terminate_enclave(given: list[str]) -> None:
    asked = options(given, {"--all"}, {"--enclave-id", "--enclave-name"})
    info = next((info for info in listed() if info["EnclaveID"] == asked["--enclave-id"]), None)
    pool = json.loads((HOME / "pool.json").read_text())
    if info is None or pool["enclave"] == "does not end":
        words = "Socket error. This is used as an error for catching any other socket operation errors not covered by "
        fail("E11", f"{words}previous custom errors.", tail="")
    os.kill(info["ProcessID"], signal.SIGKILL)
    (HOME / "running" / info["EnclaveID"]).unlink()
    sys.stderr.write(f"Successfully terminated enclave {info['EnclaveID']}.\n")
    print(json.dumps({key: info[key] for key in ("EnclaveName", "EnclaveID")} | {"Terminated": True}, indent=2))


def console(given: list[str]) -> None:
    asked = options(given, set(), {"--enclave-id", "--enclave-name", "--disconnect-timeout"})
    info = next(info for info in listed() if info["EnclaveID"] == asked["--enclave-id"])
    if info["Flags"] != "DEBUG_MODE":
        fail("E44", "Enclave console connection failure. Such error appears when …", tail="")
    print("Connecting to the console for enclave 17...\nSuccessfully connected to the console.", flush=True)
    print("[    0.000000] Linux version 6.12", flush=True)
    time.sleep(60)


COMMANDS = {
    "run-enclave": run_enclave,
    "describe-enclaves": describe_enclaves,
    "terminate-enclave": terminate_enclave,
    "console": console,
}

if __name__ == "__main__":
    with (HOME / "calls").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    COMMANDS[sys.argv[1]](sys.argv[2:])
