"""A parent instance of AWS Nitro Enclaves with a stand-in for nitro-cli, and a Unix socket in the place of vsock."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from mpc.host import nitro
from mpc.image import build, standin

STANDIN = Path(__file__).with_name("standin_nitro_cli.py")


class UnixVsock:
    """The parent instance's listening socket: a Unix one, whose peers are named as in vsock."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.bind(str(path))
        self._sock.listen(64)

    def accept(self) -> tuple[socket.socket, tuple[int, int]]:
        connection, name = self._sock.accept()
        cid, port = name.decode().rsplit("-", 2)[1:]
        return connection, (int(cid), int(port))

    def settimeout(self, seconds: float) -> None:
        self._sock.settimeout(seconds)

    def close(self) -> None:
        self._sock.close()


class Instance:
    """A parent instance with a stand-in for nitro-cli."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.device = folder, folder / "nitro_enclaves"
        self.device.touch()
        for name in ("running", "log", "bin"):
            (folder / name).mkdir()
        program = folder / "bin" / "nitro-cli"
        program.write_text(f"#!{sys.executable}\n{STANDIN.read_text()}")
        program.chmod(0o755)
        self.has()

    def has(self, **pool: Any) -> None:
        """See standin_nitro_cli."""
        usual = {"cpus": 4, "memory_mib": 1024, "enclave": "connects", "device": "works"}
        (self.folder / "pool.json").write_text(json.dumps(usual | pool))

    def listen(self) -> nitro.Listener:
        return UnixVsock(self.folder / "vsock")

    def calls(self, command: str) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call[0] == command]

    def running(self) -> list[str]:
        listed = subprocess.run(["nitro-cli", "describe-enclaves"], capture_output=True, check=True)
        return [info["EnclaveID"] for info in json.loads(listed.stdout)]

    def launch(self, image: Path, **options: Any) -> nitro.Launched:
        options = {"cpus": 2, "memory_bytes": 64 << 20, **options}
        return nitro.launch(image, **options)


def image_of(folder: Path, application: bytes = b"pass\n") -> Path:
    """An image with a kernel and a ramdisk of sorts, which lie beside it."""
    (folder / "kernel").write_bytes(b"a kernel")
    (folder / "bootstrap").write_bytes(b"a ramdisk, padded to a multiple of 4 bytes..")
    boot = build.Boot.nitro(folder / "kernel", "reboot=k panic=30", folder / "bootstrap", standin.architecture())
    build.write_image({"hello.py": application}, folder / "image.eif", boot, title="test")
    return folder / "image.eif"
