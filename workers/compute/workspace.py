"""Temporaries of the forward in one piece of memory of the size that was planned for them.

PyTorch takes memory for tensors from the C library. There, blocks that stay (a program that oneDNN has made, a list)
cut up the places that large ones leave, the next large one needs a place of its own, and a process of hours has several
times what it uses. Here every large tensor gets its place from one region, which all of them have left at the end of a
pass: nothing adds up, what is resident is no more than planned, and pages are taken from the system once.

PyTorch has an interface for this, `c10::Allocator`, in C++ alone. The object that it is given is made by hand: the
table of functions is a copy of that of PyTorch's own allocator, with two functions of ours. How they are called is the
Itanium C++ ABI on x86-64; `install` looks whether it finds what it expects, and leaves everything as it was if not.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute.prefill_packing import OPTIONS, kernel
from flexgen_lite.workers.kernel_cache import from_cache

LEAST_BYTES = 64 << 10  # smaller tensors stay with the C library
UNIT = 16 << 10  # places are multiples of it
TABLE_WORDS = 8  # of the table of functions that are copied; allocators have six functions
LOOKS = 100  # at whose turn it is, some microseconds; a turn hardly takes longer
ALLOCATE = 2  # its place in the table, behind two destructors
RAW_DELETERS = (3, 4)  # where raw_deleter may be

FIELDS = (
    "table",  # what C++ expects first in an object: the address of its table of functions
    "other", "other_allocate", "other_release",  # PyTorch's own allocator, and its functions
    "release",  # what takes a place back
    "device",  # as PyTorch's own allocator names it
    "base", "units", "tags",  # region, its size, and for the first unit of each place its units, negative if it is free
    "next_ticket", "now_serving", "yield",
    "used", "peak", "misses",  # units, units, tensors that found no place
)  # fmt: skip
_at = {name: 8 * index for index, name in enumerate(FIELDS)}
(
    TABLE, OTHER, OTHER_ALLOCATE, OTHER_RELEASE, RELEASE, DEVICE, BASE, UNITS, TAGS, NEXT, NOW, YIELD, USED, PEAK,
    MISSES,
) = _at.values()  # fmt: skip

_address = types.int64
_load: Any = simd.load_int
_store: Any = simd.operation(lambda b, value, at: simd.store_to(b, value, at, 8), types.void, types.int64, _address)
_take_ticket: Any = simd.operation(
    lambda b, at, by: b.atomic_rmw("add", b.inttoptr(at, simd.I64.as_pointer()), by, "seq_cst"),
    types.int64, _address, types.int64,
)  # fmt: skip
_FUNCTION = ir.FunctionType(simd.I64, [simd.I64] * 3)
_call: Any = simd.operation(
    lambda b, function, x, y, z: b.call(b.inttoptr(function, _FUNCTION.as_pointer()), [x, y, z]),
    types.int64, *([_address] * 4),
)  # fmt: skip


@kernel
def _lock(this):  # type: ignore[no-untyped-def]
    """PyTorch's threads may take memory too, though hardly ever at the same time. Whoever waits for long leaves the
    processor to the one whose turn it is, which may have none."""
    ticket, looks = _take_ticket(this + NEXT, 1), 0
    while _take_ticket(this + NOW, 0) != ticket:
        looks += 1
        if looks > LOOKS:
            _call(_load(this + YIELD), 0, 0, 0)


@kernel
def _find(this, wanted):  # type: ignore[no-untyped-def]
    """The first free place of that many units, or -1; free neighbours become one on the way."""
    tags, units, at = _load(this + TAGS), _load(this + UNITS), 0
    while at < units:
        size = _load(tags + 8 * at)
        if size > 0:
            at += size
            continue
        free = -size
        while at + free < units and _load(tags + 8 * (at + free)) < 0:
            free -= _load(tags + 8 * (at + free))
        _store(-free, tags + 8 * at)
        if free >= wanted:
            if free > wanted:
                _store(wanted - free, tags + 8 * (at + wanted))
            _store(wanted, tags + 8 * at)
            return at
        at += free
    return -1


def allocate(result: int, this: int, size: int) -> int:
    """DataPtr allocate(size_t): `result` is where the DataPtr goes."""
    if size >= LEAST_BYTES:
        wanted = (size + UNIT - 1) // UNIT
        _lock(this)
        place = _find(this, wanted)
        if place >= 0:
            used = _load(this + USED) + wanted
            _store(used, this + USED)
            _store(max(used, _load(this + PEAK)), this + PEAK)
        else:
            _store(_load(this + MISSES) + 1, this + MISSES)
        _take_ticket(this + NOW, 1)
        if place >= 0:
            data = _load(this + BASE) + place * UNIT
            _store(data, result)
            _store(_load(this + RELEASE), result + 8)  # what is called in the end
            _store(data, result + 16)  # with this
            _store(_load(this + DEVICE), result + 24)
            return result
    elsewhere: int = _call(_load(this + OTHER_ALLOCATE), result, _load(this + OTHER), size)
    return elsewhere


def release(data: int, this: int) -> None:
    """The end of a tensor, whoever gave it its memory."""
    offset = data - _load(this + BASE)
    if not 0 <= offset < _load(this + UNITS) * UNIT:
        _call(_load(this + OTHER_RELEASE), data, 0, 0)
        return
    tag = _load(this + TAGS) + offset // UNIT * 8
    _lock(this)
    size = _load(tag)
    _store(-size, tag)
    _store(_load(this + USED) - size, this + USED)
    _take_ticket(this + NOW, 1)


@cache
def prepare() -> tuple[Any, Any]:
    """Both functions as C functions, compiled or from numba's cache; they stay as long as the process."""
    number = types.int64
    return from_cache(
        lambda: (
            cfunc(number(number, number, number), cache=True, **OPTIONS)(allocate),
            cfunc(types.void(number, number), cache=True, **OPTIONS)(release),
        ),
        "workspace",
    )


class Workspace:
    """Args:
    num_bytes: of the region.

    It serves from `install` on, for good: tensors may live as long as the process.
    """

    def __init__(self, num_bytes: int) -> None:
        self._units = max(1, -(-num_bytes // UNIT))
        self._region = mmap.mmap(-1, self._units * UNIT, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._region.madvise(mmap.MADV_HUGEPAGE)
        self._tags = np.zeros(self._units, np.int64)
        self._tags[0] = -self._units
        self._state = np.zeros(len(FIELDS), np.int64)
        self._table = (ctypes.c_int64 * TABLE_WORDS)()

    @property
    def num_bytes(self) -> int:
        return self._units * UNIT

    @property
    def peak_bytes(self) -> int:
        """Most that was in use at once."""
        return int(self._state[PEAK // 8]) * UNIT

    @property
    def misses(self) -> int:
        """Tensors that found no place and got theirs from the C library."""
        return int(self._state[MISSES // 8])

    def install(self) -> bool:
        """Have PyTorch take the memory of large tensors on the CPU from here. False where that is not to be had."""
        if platform.machine() != "x86_64":
            return False
        try:
            protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
            self._code = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE, protection)
            self._yield = ctypes.CDLL(None).sched_yield
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
            current, replace = library._ZN3c1015GetCPUAllocatorEv, library._ZN3c1015SetCPUAllocatorEPNS_9AllocatorEh
        except (OSError, AttributeError):
            return False
        current.restype = ctypes.c_int64
        replace.restype, replace.argtypes = None, [ctypes.c_void_p, ctypes.c_uint8]
        other = current()
        if not self._prepare(other):
            return False
        replace(self._state.ctypes.data, 255)
        if self._serves():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))  # tensors may outlive every module
            return True
        replace(other, 255)
        return False

    def _prepare(self, other: int) -> bool:
        """Fills in the object; False where PyTorch's own is not as expected."""
        table = ctypes.c_int64.from_address(other).value
        ctypes.memmove(self._table, table, 8 * TABLE_WORDS)
        other_allocate = self._table[ALLOCATE]
        found, nothing = (ctypes.c_int64 * 4)(), (ctypes.c_int64 * 8)()
        returned = _as_function(other_allocate, 3)(ctypes.addressof(found), other, LEAST_BYTES)
        data, deleter, context, device = found
        if returned != ctypes.addressof(found) or data == 0 or data != context or deleter == 0:
            return False
        _as_function(deleter, 1)(context)
        empty = ctypes.addressof(nothing)  # good for whatever the other function there takes
        raw = next(
            (n for n in RAW_DELETERS if _as_function(self._table[n], 4)(other, empty, empty, 0) == deleter), None
        )
        if raw is None:
            return False
        self._functions = allocate_here, release_any = prepare()
        state, release_here = self._state.ctypes.data, _address_of(self._code)
        # mov rsi, state; mov rax, release; jmp rax: who lets go of a tensor knows its memory alone.
        jump = b"\x48\xbe" + state.to_bytes(8, "little") + _INTO_RAX + release_any.address.to_bytes(8, "little")
        give_release = _INTO_RAX + release_here.to_bytes(8, "little") + b"\xc3"  # mov rax, release_here; ret
        self._code.write((jump + b"\xff\xe0").ljust(64, b"\xcc") + give_release)
        values = {
            "table": ctypes.addressof(self._table),
            "other": other,
            "other_allocate": other_allocate,
            "other_release": deleter,
            "release": release_here,
            "device": device & 0xFFFF,
            "base": _address_of(self._region),
            "units": self._units,
            "tags": self._tags.ctypes.data,
            "yield": ctypes.cast(self._yield, ctypes.c_void_p).value or 0,
        }
        for index, name in enumerate(FIELDS):
            self._state[index] = values.get(name, 0)
        self._table[ALLOCATE], self._table[raw] = allocate_here.address, release_here + 64
        return True

    def _serves(self) -> bool:
        """Whether tensors lie in the region now, the small ones elsewhere, and leave it again."""
        if self.num_bytes < LEAST_BYTES:
            return True
        large, small = torch.zeros(LEAST_BYTES, dtype=torch.uint8), torch.zeros(16)
        begin = int(self._state[BASE // 8])
        inside = [begin <= tensor.data_ptr() < begin + self.num_bytes for tensor in (large, small)]
        alike = large.device == torch.device("cpu") and int(large.sum()) == 0
        del large, small
        return inside == [True, False] and alike and int(self._state[USED // 8]) == 0


_INTO_RAX = b"\x48\xb8"


def _as_function(address: int, arguments: int) -> Any:
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * arguments)(address)


def _address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
