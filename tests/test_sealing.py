"""What is sealed, and the frames it travels in to the enclave."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from mpc.protocol import channel
from mpc.protocol.channel import Frame
from mpc.protocol.errors import EncodingError, SealError
from mpc.protocol.sealing import (
    CHUNK_BYTES,
    ChunkCipher,
    Cryptography,
    OpeningKey,
    StreamSecret,
    chunk_bytes,
    chunk_count,
    chunk_digest,
    cut,
    input_commitment,
    pad,
    padded_bytes,
    result_commitment,
    result_context,
    table_context,
    tree_root,
)

LENGTHS = [0, 1, 4095, 4096, 4097, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 9]


@pytest.mark.parametrize("length", LENGTHS)
def test_a_stream_comes_back_and_shows_only_its_padded_size(length: int) -> None:
    data = bytes(range(251)) * (length // 251 + 1)
    data = data[:length]
    secret = StreamSecret(bytes(32), bytes(32), length)
    cipher, opened = ChunkCipher(secret), bytearray()
    chunks = list(cut(data))
    assert len(chunks) == chunk_count(length)
    for index, chunk in enumerate(chunks):
        assert len(chunk) == chunk_bytes(length, index)
        place = bytearray(len(chunk))
        cipher.open_into(cipher.seal(chunk, index), index, memoryview(place))
        opened += place
    assert len(opened) == padded_bytes(length)
    assert bytes(opened) == data + bytes(len(opened) - length)


@pytest.mark.parametrize(
    ("length", "sizes"),
    [
        (0, [4096]),
        (4096, [4096]),
        (4097, [8192]),
        (CHUNK_BYTES // 2 + 1, [CHUNK_BYTES]),
        (CHUNK_BYTES, [CHUNK_BYTES]),
        (CHUNK_BYTES + 1, [CHUNK_BYTES, 4096]),
        (2 * CHUNK_BYTES + 5000, [CHUNK_BYTES, CHUNK_BYTES, 8192]),
    ],
)
def test_the_padding_rule(length: int, sizes: list[int]) -> None:
    assert [chunk_bytes(length, index) for index in range(chunk_count(length))] == sizes


def boxes(length: int = 2 * CHUNK_BYTES + 5) -> tuple[StreamSecret, list[bytes]]:
    secret = StreamSecret(bytes([3] * 32), bytes(32), length)
    return secret, [ChunkCipher(secret).seal(chunk, index) for index, chunk in enumerate(cut(bytes(length)))]


def opens(secret: StreamSecret, box: bytes, index: int) -> None:
    ChunkCipher(secret).open_into(box, index, memoryview(bytearray(max(len(box) - 16, 0))))


def test_a_chunk_opens_at_its_place_in_its_stream_only() -> None:
    secret, (first, second, last) = boxes()
    opens(secret, first, 0)
    assert first != second  # the same zeros at two places
    for box, index in ((first, 1), (second, 0), (last, 1), (first, 2), (second, 2)):
        with pytest.raises(SealError):
            opens(secret, box, index)
    for other in (replace(secret, key=bytes(32)), replace(secret, length=3 * CHUNK_BYTES + 5)):
        with pytest.raises(SealError):
            opens(other, last, 2)  # a stream that goes on after it: its last-chunk flag differs


@pytest.mark.parametrize(
    "change", [lambda box: box[:-1], lambda box: box + b"\0", lambda box: b"", lambda box: box[:16]]
)
def test_a_chunk_that_was_cut_does_not_open(change: Callable[[bytes], bytes]) -> None:
    secret, (*_, last) = boxes()
    with pytest.raises(SealError):
        opens(secret, change(last), 2)


def test_a_wrapped_key_opens_for_its_context_only() -> None:
    opening, secret = OpeningKey(bytes(32)), StreamSecret(bytes([1] * 32), bytes([2] * 32), 77)
    context = table_context(bytes(48), bytes(32), "rows")
    wrapped = Cryptography().wrap(secret.encode(), opening.public, context)
    assert StreamSecret.decode(opening.unwrap(wrapped, context)) == secret
    others = [
        table_context(bytes([1] * 48), bytes(32), "rows"),
        table_context(bytes(48), bytes([1] * 32), "rows"),
        table_context(bytes(48), bytes(32), "more"),
        result_context(bytes(48), bytes(32), "rows"),
        b"",
    ]
    assert len({context, *others}) == 6
    for other in others:
        with pytest.raises(SealError):
            opening.unwrap(wrapped, other)
    with pytest.raises(SealError):
        OpeningKey(bytes([9] * 32)).unwrap(wrapped, context)
    for altered in (wrapped[:-1], wrapped + b"\0", b"", bytes([wrapped[0] ^ 1]) + wrapped[1:]):
        with pytest.raises(SealError):
            opening.unwrap(altered, context)


@pytest.mark.parametrize("key", [bytes(1216), b"\xff" * 1216, OpeningKey(bytes(32)).public[:1184] + bytes(32)])
def test_what_is_no_sealing_key_is_refused(key: bytes) -> None:
    if key == bytes(1216):
        key = key[:-1]
    with pytest.raises(SealError, match="sealing key"):
        Cryptography().wrap(bytes(72), key, b"")


def test_a_commitment_covers_all_that_an_input_is() -> None:
    tree = tree_root([chunk_digest(pad(b"rows", 4, 0))])
    one = (bytes(32), bytes(48), bytes(32), [("rows", 4, tree)])
    changed = [
        (bytes([1] * 32), *one[1:]),
        (one[0], bytes([1] * 48), *one[2:]),
        (*one[:2], bytes([1] * 32), one[3]),
        (*one[:3], [("more", 4, tree)]),
        (*one[:3], [("rows", 5, tree)]),
        (*one[:3], [("rows", 4, tree_root([bytes(48)]))]),
        (*one[:3], [("rows", 4, tree), ("rows", 4, tree)]),
    ]
    assert len({input_commitment(*one), *(input_commitment(*other) for other in changed)}) == 8
    assert result_commitment(bytes(32), bytes(48), bytes(32), b"rows") not in {input_commitment(*one)}
    leaves = [bytes(48), bytes([1] * 48)]
    assert len({tree_root(leaves), tree_root(leaves[::-1]), tree_root([*leaves, leaves[0]]), leaves[0]}) == 4
    assert chunk_digest(b"".join(leaves)) != tree_root(leaves)  # a leaf is never a node


# The enclave's channel.


def test_frames_come_back() -> None:
    message = channel.frame(Frame.MESSAGE, b"envelope")
    assert channel.parse_header(message[:5]) == (Frame.MESSAGE, 8)
    begin = channel.begin_frame(3, b"contract")
    assert channel.parse_begin(begin[5:]) == (3, b"contract")
    chunk = channel.chunk_head(2, 1 << 20, 3) + b"box"
    kind, length = channel.parse_header(chunk[:5])
    assert (kind, length) == (Frame.CHUNK, len(chunk) - 5)
    stream, index, box = channel.parse_chunk(memoryview(chunk)[5:])
    assert (stream, index, bytes(box)) == (2, 1 << 20, b"box")


@pytest.mark.parametrize("header", [b"\0\0\0\0\1", b"\5\0\0\0\1", b"\2\xff\xff\xff\xff", b"\2\1\0\0\0"])
def test_a_frame_of_no_kind_or_too_large_is_refused_by_its_header(header: bytes) -> None:
    with pytest.raises(EncodingError, match="frame"):
        channel.parse_header(header)


def test_a_body_that_is_too_short_is_refused() -> None:
    for parse in (channel.parse_begin, channel.parse_chunk):
        for body in (b"", b"\0\0\0"):
            with pytest.raises(EncodingError, match="frame body"):
                parse(body)
