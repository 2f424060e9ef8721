"""Chunked digests: sha256 over the concatenated sha256 digests of a file's 64 MiB chunks.

Chunks are independent, so a large file is digested by several threads at once (hashlib gives the GIL back), and a
loader can digest each chunk as it streams past. An empty file has no chunk: its digest is that of no bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import VerificationError
from .files import open_plain, os_errors

CHUNK_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20  # what a thread holds at once
_MAX_THREADS = 16


def combine(chunk_digests: Iterable[bytes]) -> str:
    """The file's digest (hexadecimal) from its chunks' raw 32-byte digests, in order."""
    return hashlib.sha256(b"".join(chunk_digests)).hexdigest()


def digest_bytes(data: bytes | bytearray | memoryview, chunk_bytes: int = CHUNK_BYTES) -> str:
    """The digest of a file with this content, hexadecimal."""
    view = memoryview(data).cast("B")
    offsets = range(0, len(view), chunk_bytes)
    return combine(hashlib.sha256(view[offset : offset + chunk_bytes]).digest() for offset in offsets)


def digest_file(path: str | Path, chunk_bytes: int = CHUNK_BYTES) -> str:
    """The digest of one file, hexadecimal, its chunks in parallel. Errors: see `digest_files`."""
    return digest_files([path], chunk_bytes)[Path(path)]


def digest_files(paths: Iterable[str | Path], chunk_bytes: int = CHUNK_BYTES) -> dict[Path, str]:
    """The digests of many files, hexadecimal, by path; all chunks of all files in parallel, in bounded memory.

    Raises:
        VerificationError: a path is missing or no plain file, or a file changes while it is read.
        ResourceError: the system does not let us read one.
    """
    return {path: combine(chunks) for path, chunks in _digest_chunks(paths, chunk_bytes).items()}


def sha256_files(paths: Iterable[str | Path]) -> dict[Path, str]:
    """The plain sha256 of many files, hexadecimal, by path: what other tools ask for. Errors: see `digest_files`.

    Files are read in parallel, each from its beginning to its end by one thread.
    """
    whole = _digest_chunks(paths, 1 << 62)
    return {path: chunks[0].hex() if chunks else hashlib.sha256().hexdigest() for path, chunks in whole.items()}


def _digest_chunks(paths: Iterable[str | Path], chunk_bytes: int) -> dict[Path, list[bytes]]:
    sizes: dict[Path, int] = {}
    for path in map(Path, paths):
        with open_plain(path) as descriptor:
            sizes[path] = os.fstat(descriptor).st_size
    pool = ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="ingot-digest")
    try:
        chunks = {
            path: [
                pool.submit(_digest_chunk, path, size, start, min(chunk_bytes, size - start))
                for start in range(0, size, chunk_bytes)
            ]
            for path, size in sizes.items()
        }
        return {path: [future.result() for future in futures] for path, futures in chunks.items()}
    finally:
        # After an error or Ctrl-C the chunks still waiting are dropped, not read.
        pool.shutdown(wait=True, cancel_futures=True)


def _digest_chunk(path: Path, size: int, start: int, length: int) -> bytes:
    # Each chunk opens the file itself: descriptors stay as few as threads. Reading and not mapping: a file cut short
    # under a mapping kills the process (SIGBUS), under a read it is an error.
    digest = hashlib.sha256()
    with open_plain(path) as descriptor, os_errors(f"cannot read {path}"):
        position, end = start, start + length
        while position < end and (piece := os.pread(descriptor, min(_PIECE_BYTES, end - position), position)):
            digest.update(piece)
            position += len(piece)
        changed = position != end or os.fstat(descriptor).st_size != size
    if changed:
        why = "its size is not what it was a moment ago"
        raise VerificationError(f"{path} changed while it was read", why, "wait until nothing writes to it any more")
    return digest.digest()
