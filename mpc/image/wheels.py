"""Which wheels an image's packages must have come from: the lock file's, by what these unpack to.

pip compares a wheel with the lock's hash when it installs it, and keeps no trace of that. Here is, for each wheel, the
digest of its RECORD's rows, so that a build can compare what is installed, and not only RECORD with the files.
docs/decisions/image-inputs.md says how far this goes.

    python -m mpc.image.wheels FOLDER      # of wheels that pip downloaded with the lock's hashes: prints the table
"""

import csv
import hashlib
import platform
import sys
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mpc.protocol.errors import LocalError

LISTED = ("cp311", "x86_64")  # the interpreter and machine whose wheels are in the table


@dataclass(frozen=True)
class Wheel:
    file: str  # name-version-…
    sha256: str  # as the lock file has it
    unpacked: str  # `unpacked_digest` of its RECORD

    @property
    def distribution(self) -> str:
        return self.file.split("-")[0]

    @property
    def version(self) -> str:
        return self.file.split("-")[1]


WHEELS = (
    Wheel(
        file="cbor2-6.3.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        sha256="ebe634e9fe6ae36b3fe1c42d280c4ecb368397efbcd497f8d5826d48e9093f1b",
        unpacked="415ac03cfaf15f4ef5e83cf6c6eef4cf70897101178a4fdc32a9068231c262db",
    ),
    Wheel(
        file="cffi-2.1.1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        sha256="34e261f78cb6ceaaa36f42f2613f4380d94d9c759a9c73c769ee6e0247364632",
        unpacked="64acca42b1a1d5ffd11b55d6565feeb133f6ec6c7f6b6691fae352345d627353",
    ),
    Wheel(
        file="cryptography-50.0.2-cp311-abi3-manylinux_2_28_x86_64.whl",
        sha256="4061c0079120205fb760c58acab6443e217307dcf05e3702cf970e0689972856",
        unpacked="8437f6c5de7003f02501ea680df1028195b5cb397321a57b4ecf21778818612f",
    ),
    Wheel(
        file="cryptography-50.0.2-cp311-abi3-manylinux_2_34_x86_64.whl",
        sha256="9dab55f57c74c3cad24c323bacbbd04be4705ba6eb0d92e920b1fc4837ed5079",
        unpacked="5383294861f7a900e593df3e155f3411b5e7aad06197aff3c960a8460c19d0f1",
    ),
    Wheel(
        file="deprecated-1.3.1-py2.py3-none-any.whl",
        sha256="597bfef186b6f60181535a29fbe44865ce137a5079f295b479886c82729d5f3f",
        unpacked="a9e1c3d51f5a06ee6bdacad338c37f6b09d1b40df5854f2a3ecc5b7718a0aad0",
    ),
    Wheel(
        file="duckdb-2.0.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        sha256="5a3601121c7cc50d0b70412995634682fafcb58a0156d5d663dfd0b3bbe30a33",
        unpacked="55533ebc4615cb6a3c91500f1eb8458acf72a10a410a6a0fba23f4b29d3cfae5",
    ),
    Wheel(
        file="opendp-0.16.0-cp310-abi3-manylinux_2_28_x86_64.whl",
        sha256="e128faea9ac5404877f560d93039a081c3ef2b5661acdbd786b33cdbb3f737ec",
        unpacked="2130b9d7fe1ff0b2af7553c4f4f515d9f4cd8948f722f9746d98483eba2cb5ea",
    ),
    Wheel(
        file="pyarrow-26.0.1-cp311-cp311-manylinux_2_28_x86_64.whl",
        sha256="39cb0f2418282c24bea6ceda77b03e5a8f0a5766b63a8bf194d4e2a2c423548c",
        unpacked="857c072cba9384edd3915f89c6718a33742f45f897715222c98086ca36a2c7fb",
    ),
    Wheel(
        file="wasmtime-50.0.1-py3-none-manylinux1_x86_64.whl",
        sha256="cc14c3a17654e0394e0225b11813532ef0cd7bd1e222a0c5494cdedaabeddac4",
        unpacked="e7b1154cb4dcabdfd1111f283d665651e1aacbf8781619d8f007b9d38121b8a1",
    ),
    Wheel(
        file="wrapt-2.5.2-cp311-cp311-manylinux1_x86_64.manylinux_2_28_x86_64.manylinux_2_5_x86_64.whl",
        sha256="0743950d3dda9940e56f81f5334ba051c4fe2e1421e4e4a4ef8eb8fb86a90894",
        unpacked="2d248fcecdebc06c77a18691a2fbd57b9b6dcd118304c9c335950a3f3d358562",
    ),
)


def check(distributions: Iterable[str]) -> bool:
    """Compare what is installed of each with the table; False where this interpreter and machine are not in it.

    Raises: LocalError for another version than the locked one, or files that are of none of its wheels.
    """
    if (f"cp{sys.version_info[0]}{sys.version_info[1]}", platform.machine()) != LISTED:
        return False
    for name in distributions:
        wheels = [wheel for wheel in WHEELS if wheel.distribution == name]
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise LocalError(f"{name} is not installed: install the locked dependencies again") from None
        again = "install the locked dependencies again: pip install --require-hashes -r requirements.lock"
        if found.version not in {wheel.version for wheel in wheels}:
            expected = " or ".join(sorted({wheel.version for wheel in wheels}))
            raise LocalError(f"{name}: not the locked version; {again}", expected=expected, got=found.version)
        unpacked = unpacked_digest(rows(found.read_text("RECORD") or ""))
        if unpacked not in {wheel.unpacked for wheel in wheels}:
            raise LocalError(f"{name} {found.version}: its files are of no wheel that the lock names; {again}")
    return True


def rows(record: str) -> dict[str, str]:
    """Name → `sha256=…` of each file that a RECORD has a digest of."""
    return {row[0]: row[1] for row in csv.reader(record.splitlines()) if row[1]}


def unpacked_digest(record: Mapping[str, str]) -> str:
    """SHA-256 over names and digests of what a wheel puts on Python's path, with its METADATA.

    An installer adds rows of its own (bytecode, scripts, its name), which are left out: no image has them.
    """
    kept = sorted(
        (name, digest)
        for name, digest in record.items()
        if not name.startswith("../")
        and not name.endswith(".pyc")
        and (".dist-info/" not in name or name.endswith(".dist-info/METADATA"))
    )
    return hashlib.sha256("".join(f"{name}\0{digest}\n" for name, digest in kept).encode()).hexdigest()


def listed(path: Path) -> Wheel:
    """The table's row for a wheel file."""
    with zipfile.ZipFile(path) as archive:
        (record,) = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
        unpacked = unpacked_digest(rows(archive.read(record).decode()))
    return Wheel(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), unpacked)


if __name__ == "__main__":
    for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
        print(f"    {listed(wheel)},")
