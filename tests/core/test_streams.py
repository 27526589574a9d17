"""Compressed files: every kind unpacks to the same bytes, in pieces, and damage is one error."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import zlib
from collections.abc import Callable

import pyarrow as pa
import pytest

from freehold.core.streams import Damaged, is_compressed, plain_name, unpack, unpacked

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".dz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}  # fmt: skip
DATA = random.Random(1).randbytes(100_000) + b"a" * 3_000_000


@pytest.mark.parametrize("ending", PACK)
def test_every_kind_unpacks_to_the_same_bytes(ending: str) -> None:
    packed = PACK[ending](DATA)
    assert unpacked(io.BytesIO(packed)).read() == DATA
    assert unpack(f"A.TXT{ending.upper()}", packed, len(DATA)) == DATA
    assert unpack(f"a{ending}", packed, len(DATA) - 1) is None
    assert is_compressed(f"a{ending}")
    assert plain_name(f"a.jsonl{ending}") == "a.jsonl"


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_members_one_after_the_other_are_one_stream(ending: str) -> None:
    packed = PACK[ending](b"one\n") + PACK[ending](b"two\n")
    assert unpacked(io.BytesIO(packed)).readlines() == [b"one\n", b"two\n"]


@pytest.mark.parametrize("ending", PACK)
def test_damaged_streams_are_one_error(ending: str) -> None:
    packed = PACK[ending](DATA)
    with pytest.raises(Damaged):
        unpacked(io.BytesIO(packed[: len(packed) // 2])).read()
    with pytest.raises(Damaged, match="Not a"):
        unpack(f"a{ending}", b"plain text", 100)


def test_xz_header_that_asks_for_much_memory_is_refused() -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30, "preset": 0, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3}]
    small = lzma.compress(b"few bytes", filters=[{**filters[0], "dict_size": 1 << 16}])
    # The size of the dictionary is one byte of the block's header; its checksum is the last four bytes.
    place = small.index(b"\x21\x01") + 2
    header = bytearray(small[12 : 12 + (small[12] + 1) * 4])
    header[place - 12] = 38
    header[-4:] = zlib.crc32(bytes(header[:-4])).to_bytes(4, "little")
    with pytest.raises(Damaged, match="[Mm]emory"):
        unpacked(io.BytesIO(small[:12] + bytes(header) + small[12 + len(header) :])).read()


def test_what_is_not_compressed_is_read_as_it_is() -> None:
    assert unpacked(io.BytesIO(b"plain")).read() == b"plain"
    assert unpack("plain.txt", b"plain", 2) == b"plain"
