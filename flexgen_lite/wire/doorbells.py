"""How the compute worker and the attention workers tell each other that a micro-batch's turn has come.

A doorbell is a pair of sockets that the coordinator makes and both processes inherit; a note on it carries three
numbers. It saves the way through the coordinator, twice in every layer: two processes are woken instead of four.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_NOTE = struct.Struct("<qii")


@dataclass(frozen=True, slots=True)
class Note:
    """From the compute worker: the rows of `micro_batch` in `column` are in the exchange region. Back: their K and V
    are stored and their attention output is there."""

    pass_id: int
    column: int
    micro_batch: int


def doorbell_pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a doorbell. Whole notes arrive, in order; there are never more on the way than micro-batches."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def ring(doorbell: socket.socket, note: Note) -> None:
    doorbell.send(_NOTE.pack(note.pass_id, note.column, note.micro_batch))


def heard(doorbell: socket.socket) -> list[Note]:
    """The notes that have arrived; never waits."""
    notes: list[Note] = []
    while True:
        try:
            data = doorbell.recv(_NOTE.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return notes
        if not data:
            return notes
        notes.append(Note(*_NOTE.unpack(data)))
