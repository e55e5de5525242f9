"""Images: built from the installation, compared with it, remembered; and the lists of what is in them."""

import base64
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mpc.image import build, cache, cpio, eif, standin, variant, wheels
from mpc.image.eif import ImageError, Kind
from mpc.image.measure import describe, measure
from mpc.image.signature import Signer
from mpc.protocol.errors import LocalError

HERE = Path(__file__).parent
CHECKOUT = HERE.parent


def pcr(content: bytes) -> str:
    return hashlib.sha384(bytes(48) + hashlib.sha384(content).digest()).hexdigest()


CURVES: dict[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def signer(curve: str = "P-384") -> Signer:
    key = ec.generate_private_key(CURVES[curve])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "release team")])
    dates = (datetime(2024, 3, 5, tzinfo=UTC), datetime(2044, 3, 15, tzinfo=UTC))
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, *dates).sign(key, hashes.SHA384())
    return Signer(key, certificate)


# --- building


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("core") / "core.eif"
    build.build("core", out)
    return out


@pytest.fixture(scope="module")
def sql(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sql") / "sql.eif"
    build.build("sql", out)
    return out


def test_two_builds_are_the_same_bytes(core: Path, tmp_path: Path) -> None:
    """In another folder, by another process with another environment."""
    out = tmp_path / "somewhere" / "else.eif"
    out.parent.mkdir()
    code = """
import os, sys
from pathlib import Path
from mpc.image import build
os.umask(0o077)
build.build("core", Path(sys.argv[1]))
"""
    environment = {"PYTHONPATH": str(CHECKOUT), "TZ": "Asia/Tokyo", "PYTHONHASHSEED": "7", "HOME": "/nowhere"}
    subprocess.run([sys.executable, "-B", "-c", code, str(out)], env=environment, cwd=tmp_path, check=True)
    assert out.read_bytes() == core.read_bytes()
    assert list(out.parent.iterdir()) == [out]


def test_built_images_measure_as_said(core: Path, sql: Path, tmp_path: Path) -> None:
    assert build.measure_installation("core") == build.build("core", tmp_path / "again.eif") == measure(core)
    assert build.measure_installation("sql") == measure(sql)
    assert measure(core).pcr1 == measure(sql).pcr1
    assert measure(core).pcr2 != measure(sql).pcr2
    assert describe(core)["ImageName"] == "enclave-mpc core"


def test_an_image_for_nitro_has_the_same_application(core: Path, tmp_path: Path) -> None:
    kernel, bootstrap = tmp_path / "bzImage", tmp_path / "init.img"
    kernel.write_bytes(b"\x1f\x8bkernel")
    bootstrap.write_bytes(b"bootstrap")
    boot = build.Boot.nitro(kernel, "reboot=k panic=30\n", bootstrap, "aarch64")
    out, by = tmp_path / "nitro.eif", signer()
    measured = build.build("core", out, boot=boot, signer=by)
    assert measured == measure(out)
    assert measured.pcr2 == measure(core).pcr2
    assert measured.pcr1.hex() == pcr(b"\x1f\x8bkernel" + b"reboot=k panic=30" + b"bootstrap")
    assert measured.pcr8 is not None
    with eif.opened(out) as image:
        assert image.architecture == "aarch64"
    with pytest.raises(LocalError, match="kernel command line"):
        build.Boot.nitro(kernel, "a\0b", bootstrap, "x86_64")
    with pytest.raises(LocalError, match="absent: cannot be read"):
        build.Boot.nitro(tmp_path / "absent", "x", bootstrap, "x86_64")


def _names(path: Path) -> list[str]:
    with eif.opened(path) as image:
        section = image.of(Kind.RAMDISK)[1]
        return [entry.name for entry in cpio.entries(image.reader(section), section.size)]


def test_what_is_in(core: Path, sql: Path) -> None:
    names = _names(sql)
    assert set(_names(core)) < set(names)
    assert "app/mpc/__init__.py" in names
    assert "app/enclave_runtime/__main__.py" in names
    assert {name.split("/")[1] for name in names if name.count("/") and "." not in name.split("/")[1]} == {
        *("mpc", "enclave_runtime", "cbor2", "cryptography", "duckdb", "pyarrow")
    }
    assert {name.split("/")[2] for name in names if name.startswith("app/mpc/")} == {"__init__.py", "protocol"}
    unwanted = (".pyc", ".pyi", ".pxd", ".pyx", ".h", "py.typed", "/tests", "numpy", "pandas", "flight", "_s3")
    assert [name for name in names if name.endswith(unwanted) or any(word in name for word in unwanted[6:])] == []


@pytest.mark.parametrize("name", variant.variants())
def test_each_file_that_stays_out_has_a_reason(name: str) -> None:
    included = {file.name for file in variant.files(name)}
    for listed in variant.load(name).listed:
        for recorded in variant.recorded(listed.distribution):
            assert recorded in included or listed.why_not(recorded), recorded


def test_no_such_variant() -> None:
    with pytest.raises(LocalError, match=r"image variant: expected one of core, .*sql.*, got \.\./\.\./etc/passwd"):
        build.measure_installation("../../etc/passwd")


IN_A_BARE_FOLDER = """
import sys
sys.path.append(sys.argv[1])
assert not [path for path in sys.path if "packages" in path]
from enclave_runtime import nsm
from mpc.protocol import channel, contract, messages, rounds, sealing, signing
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite
key = MLKEM768X25519PrivateKey(MLKEM768PrivateKey.generate(), X25519PrivateKey.generate())
suite = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA384, AEAD.AES_256_GCM)
assert suite.decrypt(suite.encrypt(b"key", key.public_key(), info=b"i"), key, info=b"i") == b"key"
signer = Ed25519PrivateKey.from_private_bytes(bytes(32))
signer.public_key().verify(signer.sign(b"x"), b"x")
assert AESGCM(bytes(32)).decrypt(bytes(12), AESGCM(bytes(32)).encrypt(bytes(12), b"x", b""), b"") == b"x"
if sys.argv[2] == "sql":
    import io, mmap
    import duckdb, pyarrow as pa, pyarrow.compute as pc
    import enclave_runtime.programs.sql
    table = pa.table({
        "a": pa.array(range(1000)), "b": pa.array([str(i % 7) for i in range(1000)]),
        "c": pa.array([i / 3 for i in range(1000)]), "d": pa.array(range(1000), pa.date32()),
        "e": pa.array(range(1000), pa.timestamp("us")), "f": pa.array([True, None] * 500),
    })
    for write, read in ((pa.ipc.new_stream, pa.ipc.open_stream), (pa.ipc.new_file, pa.ipc.open_file)):
        sink = io.BytesIO()
        with write(sink, table.schema) as writer:
            writer.write_table(table)
        place = mmap.mmap(-1, len(sink.getvalue()))
        place[:] = sink.getvalue()
        opened = read(pa.py_buffer(place)).read_all()
        opened.validate(full=True)
    connection = duckdb.connect(config={"enable_external_access": False})
    connection.register("t", opened)
    query = "SELECT b, sum(a) AS s, avg(c), max(e), min(d), count(f) FROM t GROUP BY b ORDER BY b"
    result = connection.sql(query).to_arrow_table()
    assert pc.sum(result["s"].cast(pa.int64())).as_py() == sum(range(1000))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, result.schema) as writer:
        writer.write_table(result)
    assert connection.execute("SELECT json_serialize_sql('SELECT 1')").fetchone()
    assert not {"numpy", "pandas"} & set(sys.modules)
foreign = [m.__file__ for m in sys.modules.values() if getattr(m, "__file__", None) and "packages" in m.__file__]
assert not foreign, foreign
"""


@pytest.mark.parametrize("name", ["core", "sql"])
def test_the_list_is_enough(name: str, core: Path, sql: Path, tmp_path: Path) -> None:
    """What an enclave does, with the image's files and the standard library alone."""
    with eif.opened({"core": core, "sql": sql}[name]) as image:
        section = image.of(Kind.RAMDISK)[1]
        read = image.reader(section)
        for entry in cpio.entries(read, section.size):
            path = tmp_path / entry.name
            if entry.folder:
                path.mkdir()
            else:
                path.write_bytes(read(entry.offset, entry.size))
    interpreter = str(standin.interpreter().executable)
    command = [interpreter, "-I", "-S", "-B", "-c", IN_A_BARE_FOLDER, str(tmp_path / "app"), name]
    done = subprocess.run(command, env={}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the installation


def _installed(folder: Path, name: str) -> Path:
    """A copy of an installed distribution in a folder of its own."""
    for file, (path, _) in variant.recorded(name).items():
        if not file.startswith(".."):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, folder / file)
    record = next(folder.glob("*.dist-info")) / "RECORD"
    shutil.copy2(Path(variant.recorded(name)[f"{record.parent.name}/METADATA"][0]).parent / "RECORD", record)
    return folder


def test_a_file_that_was_changed_after_its_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: Path
) -> None:
    monkeypatch.syspath_prepend(str(_installed(tmp_path, "cbor2")))
    assert build.measure_installation("core") == measure(core)
    changed = tmp_path / "cbor2" / "__init__.py"
    changed.write_bytes(changed.read_bytes() + b"\n")
    with pytest.raises(LocalError, match=r"cbor2/__init__.py was changed after it was installed"):
        build.measure_installation("core")
    changed.unlink()
    with pytest.raises(LocalError, match=r"cbor2/__init__.py: cannot be read"):
        build.build("core", tmp_path / "x.eif")
    assert not (tmp_path / "x.eif").exists()


def test_our_own_files_are_checked_when_a_wheel_installed_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "enclave_mpc-9.9.dist-info" / "RECORD"
    record.parent.mkdir()
    (record.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: enclave-mpc\nVersion: 9.9\n")
    right = base64.urlsafe_b64encode(hashlib.sha256((CHECKOUT / "mpc/__init__.py").read_bytes()).digest()).decode()
    record.write_text(f"mpc/__init__.py,sha256={right.rstrip('=')},1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    build.measure_installation("core")
    record.write_text(f"mpc/__init__.py,sha256={'A' * 43},1\n")
    with pytest.raises(LocalError, match=r"mpc/__init__.py was changed"):
        build.measure_installation("core")


def test_a_distribution_that_lacks_a_listed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _installed(tmp_path, "cbor2")
    record = next(folder.glob("*.dist-info")) / "RECORD"
    record.write_text("".join(line for line in record.read_text().splitlines(True) if "_cbor2" not in line))
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(LocalError, match=r"cbor2: the installed version has no cbor2/_cbor2"):
        build.measure_installation("core")


def test_compare_names_the_first_file_that_differs(core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.compare(core, "core") is None
    assert build.compare(core, "sql") == "app/_duckdb.cpython-311-x86_64-linux-gnu.so (only here)".replace(
        "cpython-311-x86_64-linux-gnu", _abi()
    )
    boot = build.Boot.local()
    files = {file.name: bytes(file.read()) for file in variant.files("core")}
    changes: list[tuple[dict[str, bytes], str]] = [
        (files | {"mpc/__init__.py": b"#"}, "app/mpc/__init__.py"),
        (files | {"mpc/zzz.py": b""}, "app/mpc/zzz.py (only in the image)"),
        (
            {name: content for name, content in files.items() if name != "cbor2/__init__.py"},
            "app/cbor2/__init__.py (only here)",
        ),
    ]
    out = tmp_path / "x.eif"
    for changed, words in changes:
        build.write_image(changed, out, boot, title="x")
        assert build.compare(out, "core") == words
    described = standin.describe()
    described["interpreter"]["version"] = "CPython 3.99"
    kernel, bootstrap = standin.sections(described)
    build.write_image(files, out, build.Boot(kernel, boot.cmdline, bootstrap, boot.architecture), title="x")
    assert build.compare(out, "core") == "interpreter.json"
    build.write_image(files, out, build.Boot(b"x", boot.cmdline, boot.bootstrap, boot.architecture), title="x")
    assert build.compare(out, "core") == "the KERNEL section"


def test_compare_reads_a_strangers_list_up_to_the_first_difference(core: Path, tmp_path: Path) -> None:
    """It may be gigabytes of names. What is called the same was read to its last byte."""
    out = tmp_path / "x.eif"
    build.write_image({"A": b""}, out, build.Boot.local(), title="x")
    for path in (core, out):
        (tmp_path / "broken.eif").write_bytes(path.read_bytes()[:-1] + b"x")
        if path == out:
            assert build.compare(tmp_path / "broken.eif", "core") == "app/A (only in the image)"
        else:
            with pytest.raises(ImageError, match="its end"):
                build.compare(tmp_path / "broken.eif", "core")


def _abi() -> str:
    return next(file.name for file in variant.files("sql") if file.name.startswith("_duckdb")).split(".")[1]


# --- remembering


def test_the_cache_builds_once(home: Path, core: Path) -> None:
    path, measured = cache.cached_image("core")
    assert path.is_relative_to(home)
    assert path.read_bytes() == core.read_bytes()
    assert measured == measure(path) == cache.measure_from_source("core")
    stamp = path.stat().st_mtime_ns
    assert cache.cached_image("core") == (path, measured)
    assert path.stat().st_mtime_ns == stamp
    assert cache.description() == standin.describe()
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_damaged_cache_is_built_again(home: Path) -> None:
    path, measured = cache.cached_image("core")
    os.truncate(path, 1000)
    assert cache.cached_image("core") == (path, measured)
    assert measure(path) == measured
    path.with_suffix(".json").write_text("{")
    assert cache.cached_image("core") == (path, measured)


def test_a_changed_installation_finds_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _installed(home / "packages", "cbor2")
    before, _ = cache.cached_image("core")
    monkeypatch.syspath_prepend(str(folder))
    moved, _ = cache.cached_image("core")
    assert moved != before
    os.utime(folder / "cbor2" / "__init__.py")  # even when the bytes stay
    assert cache.cached_image("core")[0] not in (before, moved)


def test_old_entries_are_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(cache.KEPT + 2):
        (cache.folder() / f"image-x-{index}.eif").write_bytes(b"")
        cache.remembered("image-x", str(index), lambda index=index: {"value": index})  # type: ignore[misc]
    assert len(list(cache.folder().glob("image-x-*.json"))) == cache.KEPT
    assert len(list(cache.folder().glob("image-x-*.eif"))) == cache.KEPT
    assert cache.remembered("image-x", str(cache.KEPT + 1), dict) == {"value": cache.KEPT + 1}


def test_two_processes_at_once(home: Path) -> None:
    code = """
from mpc.image import cache
path, measured = cache.cached_image("core")
print(path, measured.pcr0.hex(), path.stat().st_ino)
"""
    environment = {"PYTHONPATH": str(CHECKOUT), "XDG_CACHE_HOME": str(home / "cache")}
    command = [sys.executable, "-B", "-c", code]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert said[0] == said[1] != ""
    assert len([path for path in cache.folder().iterdir() if ".eif" in path.name]) == 1


def test_threads_share_an_open_image(core: Path) -> None:
    found: list[bytes] = []
    with eif.opened(core) as image:
        section = image.of(Kind.RAMDISK)[1]

        def digest() -> None:
            state = hashlib.sha384()
            for chunk in image.chunks(section.offset, section.size):
                state.update(chunk)
            found.append(state.digest())

        threads = [threading.Thread(target=digest) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 1


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LocalError, match="set XDG_CACHE_HOME to a folder of yours"):
        cache.cached_image("core")


def test_the_table_of_wheels_is_the_lock_files() -> None:
    blocks = re.split(r"\n(?=\w)", (Path(__file__).parents[1] / "requirements.lock").read_text())
    locked = {block.split(" ")[0]: block for block in blocks}
    for wheel in wheels.WHEELS:
        assert f"--hash=sha256:{wheel.sha256}" in locked[f"{wheel.distribution}=={wheel.version}"]
    needed = {package for name in variant.variants() for package in variant.packages(name)}
    assert {wheel.distribution for wheel in wheels.WHEELS} == needed


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation of cbor2 alone, whose files can be changed."""
    monkeypatch.setattr(wheels, "LISTED", (f"cp{sys.version_info[0]}{sys.version_info[1]}", platform.machine()))
    record = {"cbor2/__init__.py": "sha256=AA", "cbor2-6.3.0.dist-info/METADATA": "sha256=BB"}
    made = wheels.Wheel("cbor2-6.3.0-cp311-none-any.whl", "00", wheels.unpacked_digest(record))
    monkeypatch.setattr(wheels, "WHEELS", (made,))
    folder = tmp_path / "cbor2-6.3.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: cbor2\nVersion: 6.3.0\n")
    lines = [*(f"{name},{digest},9" for name, digest in record.items()), "cbor2-6.3.0.dist-info/RECORD,,"]
    by_pip = ["cbor2-6.3.0.dist-info/INSTALLER,sha256=CC,4", "../../bin/cbor2,sha256=DD,9", "cbor2/a.pyc,,"]
    (folder / "RECORD").write_text("\n".join([*lines, *by_pip]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_what_is_installed_is_compared_with_the_lock_files_wheels(installed: Path) -> None:
    assert wheels.check(["cbor2"])
    record = (installed / "RECORD").read_text()
    for changed in (record.replace("=AA", "=EE"), record + "cbor2/more.py,sha256=FF,1\n", record.split("\n", 1)[1]):
        (installed / "RECORD").write_text(changed)
        with pytest.raises(LocalError, match="of no wheel that the lock names"):
            wheels.check(["cbor2"])
    (installed / "METADATA").write_text("Name: cbor2\nVersion: 6.3.1\n")
    with pytest.raises(LocalError, match=r"expected 6\.3\.0, got 6\.3\.1"):
        wheels.check(["cbor2"])


def test_another_platform_is_not_compared_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "LISTED", ("cp399", "vax"))
    assert not wheels.check(["cbor2"])
