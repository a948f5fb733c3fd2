"""What the loader is told of KV on disk, and answers: pages and states that are written to files and read back.

A file has *slots* of `slot_bytes`, each for a page; a state takes as many as it needs. All four orders are answered
with `KvMoved`, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvDiskSpec:
    """Files, and what of the arenas goes into them.

    Attributes:
        page_bytes, kv_bytes: of a page, and of the KV arena.
        state_bytes, states_bytes: of a sequence's state, and of the arena of states; 0: the model has none.
        slot_bytes: a multiple of 4096.
        folder: where the file of stored prefixes is.
        identity: of all that K and V of a prompt depend on, and of how they lie in a page; "": no prefixes are stored.
        prefix_slots: blocks that the file of stored prefixes has room for.
        pages_of_block: pages of a block, those of all groups together.
    """

    page_bytes: int
    kv_bytes: int
    state_bytes: int
    states_bytes: int
    slot_bytes: int
    folder: str
    identity: str
    prefix_slots: int
    pages_of_block: int


@dataclass(frozen=True, slots=True)
class ParkKv:
    """Write these pages to the file of parked sequences, and the state at place `state` (-1: none) behind them, to the
    slots in this order."""

    ticket: int
    pages: tuple[int, ...]
    state: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FetchKv:
    """Read them back, to these pages and this place. `checksums`: of the slots."""

    ticket: int
    pages: tuple[int, ...]
    state: int
    slots: tuple[int, ...]
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockOnDisk:
    """A block of a prompt, and its slot in the file of stored prefixes. `pages`: those of all groups; -1 for those that
    are not wanted."""

    key: bytes
    slot: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoreBlocks:
    """Write these blocks of prompts, over what is in their slots."""

    ticket: int
    blocks: tuple[BlockOnDisk, ...]


@dataclass(frozen=True, slots=True)
class FetchBlocks:
    """Read them back."""

    ticket: int
    blocks: tuple[BlockOnDisk, ...]


@dataclass(frozen=True, slots=True)
class KvMoved:
    """An order was carried out, or `error` says why not: what it was to write, or where it was to read to, holds
    anything. `checksums`: of each slot that was written for a parked sequence."""

    ticket: int
    checksums: tuple[int, ...]
    num_bytes: int
    start_ns: int
    end_ns: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class StoredBlock:
    key: bytes
    slot: int


@dataclass(frozen=True, slots=True)
class PrefixesOpened:
    """The loader has the file of stored prefixes, with these blocks, those first that were stored first. Not `usable`:
    no prefixes are stored or read. `note`: what people should know, "": nothing."""

    blocks: tuple[StoredBlock, ...]
    usable: bool
    note: str


MoveKv = ParkKv | FetchKv | StoreBlocks | FetchBlocks
