"""Ramdisks: what is packed reads back, and nothing else does."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mpc.image import cpio
from mpc.image.eif import ImageError

FILES = {"a/b.py": b"one", "a/c": b"", "a/d/e.so.26": b"x" * 4097, "z": b"last"}


def _archive(files: dict[str, bytes]) -> bytes:
    return b"".join(cpio.pack(files))


def _entries(archive: bytes) -> list[cpio.Entry]:
    return list(cpio.entries(lambda offset, size: archive[offset : offset + size], len(archive)))


def test_ramdisks_read_back() -> None:
    archive = _archive(FILES)
    found = {entry.name: archive[entry.offset : entry.offset + entry.size] for entry in _entries(archive)}
    assert found == {**FILES, "a": b"", "a/d": b""}
    assert [entry.name for entry in _entries(archive) if entry.folder] == ["a", "a/d"]
    assert {name: bytes(content) for name, content in cpio.contents(cpio.pack(FILES))} == found


@pytest.mark.skipif(shutil.which("cpio") is None, reason="no cpio here: our archives are not read by another program")
def test_ramdisks_are_cpio(tmp_path: Path) -> None:
    subprocess.run(["cpio", "-i", "--quiet"], input=_archive(FILES), cwd=tmp_path, check=True)
    assert {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == FILES


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a//b", "a/", "./a", "a b", "ä", "a\n", "a/.", "x" * 256])
def test_names_that_no_ramdisk_has(name: str) -> None:
    with pytest.raises(ImageError, match="file name"):
        cpio.pack({name: b""})


def test_any_flipped_bit_of_a_ramdisks_structure_is_refused() -> None:
    archive = _archive({"a/b": b"12345"})
    content = archive.index(b"12345")
    for position in range(len(archive)):
        bad = bytearray(archive)
        bad[position] ^= 1 << position % 8
        if content <= position < content + 5:
            continue
        try:
            names = [entry.name for entry in _entries(bytes(bad))]
        except ImageError:
            continue
        assert names != ["a", "a/b"], position  # another plain, sorted name
        assert archive[position : position + 1] in b"ab"


def test_folders_hold_no_content() -> None:
    """It would be measured and never unpacked."""
    head, empty, padding, *rest = (bytes(part) for part in cpio.pack({"a/b": b""}))
    assert (empty, padding, head[54:62]) == (b"", b"", b"00000000")
    archive = b"".join([head[:54], b"00000004", head[62:], b"evil", *rest])
    with pytest.raises(ImageError, match="not in the one form"):
        _entries(archive)


def test_ramdisks_out_of_order_or_twice() -> None:
    parts = [bytes(part) for part in cpio.pack({"a": b"1", "b": b"2"})]
    for order in ((3, 4, 5, 0, 1, 2, 6), (0, 1, 2, 0, 1, 2, 6), (0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 3, 4, 5, 6)):
        with pytest.raises(ImageError):
            _entries(b"".join(parts[index] for index in order))


@pytest.mark.parametrize("size", [b"-0000001", b"-0000003", b"+0000000", b" 0000000", b"0_000000", b"0000000g"])
def test_sizes_that_only_python_reads(size: bytes) -> None:
    """The kernel would read another archive than we."""
    head, *rest = (bytes(part) for part in cpio.pack({"a": b""}))
    with pytest.raises(ImageError):
        _entries(b"".join([head[:54], size, head[62:], *rest]))
