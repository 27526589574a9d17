"""Hostile GGUF files are refused in Python, before llama.cpp sees them."""

from __future__ import annotations

import random
import struct

import pytest

from freehold.core.errors import ArtifactError
from freehold.infer.gguf_header import check_gguf
from freehold.infer.llama import Llama


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(version=3, tensors=None, keys=None, counts=None, magic=b"GGUF", data=b"\0" * 256) -> bytes:
    keys = [(b"general.architecture", 8, text(b"afmoe")), (b"n", 4, struct.pack("<I", 7))] if keys is None else keys
    tensors = [(b"a", (32, 1), 0, 0), (b"b", (32, 1), 8, 128)] if tensors is None else tensors
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    out = magic + struct.pack("<IQQ", version, n_tensors, n_keys)
    out += b"".join(text(name) + struct.pack("<I", kind) + value for name, kind, value in keys)
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, offset)
    return out + b"\0" * (-len(out) % 32) + data


def check(path, data: bytes) -> dict:
    path.write_bytes(data)
    return check_gguf(path)


def test_sound_file_gives_its_metadata(tmp_path):
    keys = [(b"a", 8, text(b"x")), (b"list", 9, struct.pack("<IQ", 5, 3) + struct.pack("<3i", 1, 2, 3)),
            (b"names", 9, struct.pack("<IQ", 8, 2) + text(b"q") + text(b"r"))]  # fmt: skip
    assert check(tmp_path / "x.gguf", header(keys=keys)) == {"a": "x", "list": 3, "names": 2}


HOSTILE = {
    "empty": b"",
    "other magic": header(magic=b"GGML"),
    "other byte order": header(magic=b"FUGG"),
    "version 1": header(version=1),
    "version of the future": header(version=99),
    "huge tensor count": header(counts=(2**63, 2)),
    "huge key count": header(counts=(2, 2**63)),
    "more tensors than there are": header(counts=(60_000, 2)),
    "huge name": header(keys=[(b"n", 8, struct.pack("<Q", 2**62) + b"x")]),
    "huge array": header(keys=[(b"n", 9, struct.pack("<IQ", 4, 2**61))]),
    "array longer than the file": header(keys=[(b"n", 9, struct.pack("<IQ", 10, 100_000))]),
    "array of arrays": header(keys=[(b"n", 9, struct.pack("<IQIQ", 9, 1, 9, 1))]),
    "unknown type of a value": header(keys=[(b"n", 77, b"")]),
    "name that is no UTF-8": header(keys=[(b"\xff\xfe", 4, struct.pack("<I", 1))]),
    "key twice": header(keys=[(b"n", 4, struct.pack("<I", 1))] * 2),
    "alignment 0": header(keys=[(b"general.alignment", 4, struct.pack("<I", 0))]),
    "alignment 33": header(keys=[(b"general.alignment", 4, struct.pack("<I", 33))]),
    "alignment as text": header(keys=[(b"general.alignment", 8, text(b"32"))]),
    "unknown type of a tensor": header(tensors=[(b"a", (32,), 250, 0)]),
    "five dimensions": header(tensors=[(b"a", (1, 1, 1, 1, 1), 0, 0)]),
    "no dimensions": header(tensors=[(b"a", (), 0, 0)]),
    "a dimension of 0": header(tensors=[(b"a", (0, 4), 0, 0)]),
    "product that overflows": header(tensors=[(b"a", (2**32, 2**32), 0, 0)]),
    "row that fits no block": header(tensors=[(b"a", (33,), 8, 0)]),
    "offset beyond the file": header(tensors=[(b"a", (32,), 0, 2**40)]),
    "offset that wraps": header(tensors=[(b"a", (32,), 0, 2**64 - 32)]),
    "offset between alignments": header(tensors=[(b"a", (32,), 0, 4)]),
    "tensors that overlap": header(tensors=[(b"a", (32,), 0, 0), (b"b", (32,), 0, 64)]),
    "tensor cut at the end": header(data=b"\0" * 100),
    "tensor name twice": header(tensors=[(b"a", (32,), 0, 0), (b"a", (32,), 0, 128)]),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_header_is_refused_before_llama_cpp(tmp_path, data):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="not a sound GGUF file"):
        Llama(path, 64)


def test_cut_and_changed_headers_end_cleanly(tmp_path):
    good, dice = header(), random.Random(0)
    for cut in range(len(good) - 256):
        with pytest.raises(ArtifactError):
            check(tmp_path / "cut.gguf", good[:cut])
    for _ in range(500):
        data = bytearray(good)
        data[dice.randrange(len(data) - 256)] = dice.randrange(256)
        try:
            check(tmp_path / "changed.gguf", bytes(data))
        except ArtifactError:
            continue
