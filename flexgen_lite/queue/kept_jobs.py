"""Jobs that outlive their client: what came of their requests is kept until somebody fetches or discards it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array

from flexgen_lite.wire.client_messages import RequestDone, WireRequest
from flexgen_lite.wire.codec import Codec

_CODEC = Codec(RequestDone)
_REQUEST_CODEC = Codec(WireRequest)
_OPEN, _IN_MEMORY = 2**64 - 1, 2**64 - 2
_SIZE_BYTES = 8


class KeptJob:
    """Results lie in a file without a name, so that nothing of them is left when the engine ends; a request takes 16
    bytes of memory.

    `client`: who is to be told, the last that submitted it; None where it is gone.
    """

    def __init__(self) -> None:
        self.client: bytes | None = None
        self._digests = array("Q")  # of the requests, by index
        self._places = array("Q")  # in the file, of the results, by index; _OPEN where there is none yet
        self._in_memory: dict[int, RequestDone] = {}  # results that the file had no room for
        self._num_done = 0
        # as long as the job; unbuffered, for a buffer would try what failed again
        self._file = tempfile.TemporaryFile(prefix="flexgen-lite-", buffering=0)  # noqa: SIM115
        self._end = 0

    @property
    def num_submitted(self) -> int:
        return len(self._digests)

    @property
    def num_open(self) -> int:
        return len(self._digests) - self._num_done

    def submit(self, request: WireRequest) -> str | None:
        """Takes note of a request; what is wrong with it, if anything. Its index must be known already or the next."""
        digest = int.from_bytes(hashlib.blake2b(_REQUEST_CODEC.encode(request), digest_size=8).digest(), "little")
        if request.index == len(self._digests):
            self._digests.append(digest)
            self._places.append(_OPEN)
        elif not 0 <= request.index < len(self._digests):
            return f"request {request.index} of a kept job was submitted, {len(self._digests)} comes next"
        elif self._digests[request.index] != digest:
            return f"the job is known, and its request {request.index} was another one: give the job another id"
        return None

    def add(self, done: RequestDone) -> None:
        self._num_done += self._places[done.index] == _OPEN
        data = _CODEC.encode(done)
        try:
            self._write(len(data).to_bytes(_SIZE_BYTES, "little") + data)
        except OSError:  # no room for temporary files
            self._in_memory[done.index] = done
            self._places[done.index] = _IN_MEMORY
            return
        self._places[done.index] = self._end
        self._end += _SIZE_BYTES + len(data)

    def result(self, index: int) -> RequestDone | None:
        """What came of a request; None while it is open."""
        if self._places[index] == _OPEN:
            return None
        if self._places[index] == _IN_MEMORY:
            return self._in_memory[index]
        place = self._places[index]
        size = int.from_bytes(self._read(_SIZE_BYTES, place), "little")
        done: RequestDone = _CODEC.decode(self._read(size, place + _SIZE_BYTES))
        return done

    def _write(self, data: bytes) -> None:
        written = 0
        while written < len(data):  # the last of the room takes a part
            written += os.pwrite(self._file.fileno(), data[written:], self._end + written)

    def _read(self, size: int, place: int) -> bytes:
        data = b""
        while len(data) < size:
            more = os.pread(self._file.fileno(), size - len(data), place + len(data))
            if not more:
                raise OSError("the end of the kept results came too early")
            data += more
        return data

    def close(self) -> None:
        self._file.close()
