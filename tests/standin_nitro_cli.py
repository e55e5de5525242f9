"""A stand-in for nitro-cli: its commands, JSON, errors and exit statuses, with a Unix socket in the place of vsock.

`test_nitro` installs it as an executable. NITRO_STANDIN is a folder: pool.json says what the instance has, vsock is the
socket on which the parent instance listens, running/ holds the enclaves, log/ the errors' logs, calls every command.
The enclave is a process whose Unix address, an abstract name `cid-port`, plays the part of its vsock address.

Source: AWS Nitro Enclaves user guide; aws-nitro-enclaves-cli src/common/{mod,document_errors,json_output}.rs,
src/enclave_proc/{resource_manager,utils}.rs.
"""

import json
import os
import secrets
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
        "ProcessID": start(cid, pool["enclave"]),
        "EnclaveCID": cid,
        "NumberOfCPUs": cpus,
        "CPUIDs": cores,
        "MemoryMiB": memory,
    }
    more = {"State": "RUNNING", "Flags": "DEBUG_MODE" if "--debug-mode" in asked else "NONE"}
    (HOME / "running" / info["EnclaveID"]).write_text(json.dumps(info | more))
    if pool["enclave"] == "prints nonsense":
        info = {"EnclaveID": info["EnclaveID"]}
    print(json.dumps(info, indent=2))


def start(cid: int, behaviour: str) -> int:
    """The enclave, in a process that nobody waits for."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        if (enclave := os.fork()) == 0:
            for descriptor in range(3):
                os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            be_enclave(cid, behaviour)
        os.write(writer, enclave.to_bytes(4, "big"))
        os._exit(0)
    os.waitpid(child, 0)
    return int.from_bytes(os.read(reader, 4), "big")


def be_enclave(cid: int, behaviour: str) -> None:
    """Connect to the parent instance, and return in pieces what comes."""
    kept = []
    try:
        if behaviour == "connects after strangers":
            kept += [connect(stranger, 1) for stranger in (1, 3, cid + 1)]
        if behaviour == "never connects":
            time.sleep(60)
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
    print(json.dumps(listed(), indent=2))


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
