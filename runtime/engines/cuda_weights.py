"""Streams weights files to the device through a small ring of pinned memory, digesting them on the way.

Several threads each take chunks of 64 MiB, the unit of the digest (fingerprint.py): read a piece into pinned memory,
digest it there, and let the bus copy it while the next piece is read. A file lies on the device exactly as on disk.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from ...artifacts.errors import VerificationError
from ...artifacts.files import open_plain, os_errors
from ...artifacts.fingerprint import CHUNK_BYTES, combine
from ..weights import WeightsFile
from .cuda import Driver

_PIECE_BYTES = 4 << 20
_SLOTS = 2  # pieces of one thread: one is read while the other is on the bus
_MAX_THREADS = 16
_FIX = "fetch an intact copy of the artifact, or build it again with `ingot build`"


@dataclass(frozen=True)
class Chunk:
    """A chunk of a file: which of the file's, and where."""

    file: int
    index: int
    start: int
    end: int


class WeightStream:
    """One streaming of files to device addresses.

    Args:
        addresses: where each file goes. digests: the expected digest of each file that is to be digested, by its place
            in `files`.
    """

    def __init__(
        self,
        driver: Driver,
        files: Sequence[WeightsFile],
        addresses: Sequence[int],
        digests: Mapping[int, str],
        piece_bytes: int = _PIECE_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._driver, self._files, self._addresses, self._expected = driver, files, addresses, digests
        self._piece = min(piece_bytes, max((file.size for file in files), default=1))
        self._chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        self._found: dict[tuple[int, int], bytes] = {}
        self._stop = threading.Event()
        self._counts = [-(-file.size // chunk_bytes) for file in files]
        for number, file in enumerate(files):
            for index, start in enumerate(range(0, file.size, chunk_bytes)):
                self._chunks.put(Chunk(number, index, start, min(start + chunk_bytes, file.size)))

    def run(self) -> None:
        """Copy everything; returns when all of it is on the device and every digest was compared.

        Raises:
            VerificationError: a file's content is not what was built, or changed while it was read.
            ResourceError: a file cannot be read, or the device refuses.
        """
        count = max(1, min(_MAX_THREADS, os.cpu_count() or 1, sum(self._counts)))
        stream = self._driver.stream()
        try:
            with ThreadPoolExecutor(count, "ingot-weights") as pool:
                workers = [pool.submit(self._work, stream) for _ in range(count)]
                try:
                    done = wait(workers, return_when=FIRST_EXCEPTION).done
                finally:
                    self._stop.set()  # after an error or Ctrl-C the rest is not read
                for worker in done:
                    worker.result()
        finally:
            self._driver.destroy_stream(stream)
        wrong = [
            file.path.name
            for number, file in enumerate(self._files)
            if number in self._expected and self._digest(number) != self._expected[number]
        ]
        if wrong:
            what = f"the weights {', '.join(wrong)} are not intact"
            raise VerificationError(what, "wrong digest: the content is not what was built", _FIX)

    def _digest(self, number: int) -> str:
        return combine(self._found[number, index] for index in range(self._counts[number]))

    def _work(self, stream: Any) -> None:
        driver = self._driver
        driver.activate()
        memory = driver.pinned(_SLOTS * self._piece)
        events = [driver.event() for _ in range(_SLOTS)]
        try:
            turn = 0
            while not self._stop.is_set():
                try:
                    chunk = self._chunks.get_nowait()
                except queue.Empty:
                    break
                turn = self._copy(chunk, memory, events, turn, stream)
            driver.synchronize(stream)
        except BaseException:
            self._stop.set()
            driver.synchronize(stream)  # what is still on the bus reads from the memory freed below
            raise
        finally:
            for event in events:
                driver.destroy_event(event)
            driver.free_pinned(memory)

    def _copy(self, chunk: Chunk, memory: Any, events: list[Any], turn: int, stream: Any) -> int:
        """Read, digest and send one chunk; `turn` counts the pieces of this thread."""
        driver, file, piece = self._driver, self._files[chunk.file], self._piece
        digest = hashlib.sha256() if chunk.file in self._expected else None
        base, address = memory.ctypes.data, self._addresses[chunk.file]
        with open_plain(file.path) as descriptor, os_errors(f"cannot read {file.path}"):
            for position in range(chunk.start, chunk.end, piece):
                if self._stop.is_set():
                    return turn
                slot, length = turn % _SLOTS, min(piece, chunk.end - position)
                driver.wait(events[slot])
                view = memory[slot * piece : slot * piece + length]
                _read(descriptor, memoryview(view), position, file)
                if digest is not None:
                    digest.update(view)
                driver.upload(address + position, base + slot * piece, length, stream)
                driver.record(events[slot], stream)
                turn += 1
            if os.fstat(descriptor).st_size != file.size:
                raise _changed(file)
        if digest is not None:
            self._found[chunk.file, chunk.index] = digest.digest()
        return turn


def _read(descriptor: int, view: memoryview, position: int, file: WeightsFile) -> None:
    """Fill the view from the file; the header among it must still be the one that was parsed."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            raise _changed(file)
        done += count
    header = file.header[position : position + len(view)]
    if view[: len(header)] != header:
        raise _changed(file)


def _changed(file: WeightsFile) -> VerificationError:
    return VerificationError(
        f"{file.path} changed while it was read",
        "its content is not what it was a moment ago",
        "wait until nothing writes to it any more",
    )
