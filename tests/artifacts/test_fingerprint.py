"""The chunked digest equals its definition, for files of every size around the edges of chunks."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingot.artifacts import fingerprint
from ingot.artifacts.errors import VerificationError
from ingot.artifacts.fingerprint import digest_bytes, digest_file, digest_files


def reference(data: bytes, chunk: int) -> str:
    """The definition, word for word."""
    digests = b""
    while data:
        digests += hashlib.sha256(data[:chunk]).digest()
        data = data[chunk:]
    return hashlib.sha256(digests).hexdigest()


CHUNK = 64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.integers(0, 5), more=st.integers(-2, 2), seed=st.integers(0, 99), piece=st.integers(1, 99))
def test_digest_is_the_definition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int, more: int, seed: int, piece: int
) -> None:
    data = random.Random(seed).randbytes(max(0, chunks * CHUNK + more))
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", piece)
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file", CHUNK) == digest_bytes(data, CHUNK) == reference(data, CHUNK)


def test_the_standard_chunk_is_64_mib(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.truncate((64 << 20) + 1)
    expected = hashlib.sha256(hashlib.sha256(bytes(64 << 20)).digest() + hashlib.sha256(bytes(1)).digest()).hexdigest()
    assert digest_file(tmp_path / "file") == expected


def test_many_files_at_once(tmp_path: Path) -> None:
    contents = {tmp_path / str(index): os.urandom(index * 7) for index in range(40)}
    for path, data in contents.items():
        path.write_bytes(data)
    assert digest_files(contents, CHUNK) == {path: reference(data, CHUNK) for path, data in contents.items()}
    assert digest_files([]) == {}


def test_every_flipped_bit_and_moved_chunk_shows() -> None:
    data = os.urandom(4 * CHUNK)
    digest = digest_bytes(data, CHUNK)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        assert digest_bytes(changed, CHUNK) != digest
    assert digest_bytes(data[CHUNK:] + data[:CHUNK], CHUNK) != digest


@pytest.mark.parametrize("kind", ["missing", "fifo", "folder", "link", "under a file"])
def test_only_plain_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "it"
    (tmp_path / "real").write_text("x")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("real")
    elif kind == "under a file":
        path = tmp_path / "real" / "it"
    with pytest.raises(VerificationError, match="it"):
        digest_files([tmp_path / "real", path])


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(300))
    pread = os.pread

    def cut(descriptor: int, length: int, offset: int) -> bytes:
        os.truncate(path, 100)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", cut)
    with pytest.raises(VerificationError, match="changed while"):
        digest_file(path, CHUNK)
