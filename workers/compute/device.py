"""Where the products are computed, and the copies between it and host memory.

The two classes have one interface. On CUDA every copy has its own stream and is ordered by events; `when_done` calls
back from a thread that waits for an event, so the worker's loop never waits for the device. On the CPU copies are
plain and everything is done at once.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from flexgen_lite.memory.usage import give_back_memory
from flexgen_lite.workers.serve import UserError

SMALL_COPY = 1 << 20
UPLOAD_CHUNK = 16 << 20  # a small copy waits for no more than this one


class CpuDevice:
    torch_device = torch.device("cpu")
    name = "cpu"
    total_bytes = 0
    credit = 1  # segments that may be under way

    def page_lock(self, arena: torch.Tensor) -> str | None:
        """Nothing to lock."""
        return None

    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory that results can be copied into."""
        return torch.empty(size, dtype=dtype)

    def to_host(self, host: torch.Tensor, value: torch.Tensor) -> None:
        """Copy a result into host memory; done when the next `when_done` calls back.

        Small ones without PyTorch's threads: waking them takes longer than the copy.
        """
        num_bytes = value.numel() * value.element_size()
        if num_bytes <= SMALL_COPY and host.dtype == value.dtype and host.is_contiguous() and value.is_contiguous():
            assert host.shape == value.shape
            ctypes.memmove(host.data_ptr(), value.data_ptr(), num_bytes)
        else:
            host.copy_(value)

    def fetch(self, value: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, at once."""
        host = self.host_buffer(value.numel(), value.dtype).view(value.shape)
        self.to_host(host, value)
        return host

    def from_host(self, host: torch.Tensor) -> torch.Tensor:
        """A tensor on the device with the host tensor's content."""
        return host

    def when_done(self, callback: Callable[[int], None]) -> None:
        """Calls back once everything that was enqueued so far is done, with the nanoseconds since the first copy of
        results to the host began; 0 where that is not a lane of its own."""
        callback(0)

    def upload(self, target: torch.Tensor, host: torch.Tensor, done: Callable[[], None]) -> None:
        """Copy a layer into its device slot beside everything else, then call back."""
        target.copy_(host)
        done()

    def copy_weights(self, target: torch.Tensor, host: torch.Tensor) -> None:
        """Copy weights to the device, before what is computed next."""
        target.copy_(host)

    def give_back_memory(self) -> None:
        """Temporaries larger than any of a pass are gone: the allocator, told to keep what it has, lets go of them."""
        give_back_memory()

    def limit_memory(self, num_bytes: int) -> None:
        """PyTorch allocates no more than so much of the device's memory."""

    def peak_bytes(self) -> int:
        """Most of the device's memory that PyTorch has held at once."""
        return 0

    def compute(self) -> Any:
        """Context in which the model's operations are enqueued."""
        return torch.no_grad()

    def synchronize(self) -> None:
        """Waits for all that was enqueued."""

    def close(self) -> None:
        """Nothing to end."""


class CudaDevice:
    """Not exercised where no GPU is at hand; see docs/gpu.md."""

    credit = 2  # the next one is enqueued while the first runs

    def __init__(self, name: str) -> None:
        if not torch.cuda.is_available():
            raise UserError(
                f"device {name} was asked for, but torch {torch.__version__} sees no CUDA GPU: use device cpu"
            )
        self.torch_device = torch.device(name)
        torch.cuda.set_device(self.torch_device)
        self.name = torch.cuda.get_device_name(self.torch_device)
        self.total_bytes = torch.cuda.get_device_properties(self.torch_device).total_memory
        self._compute = torch.cuda.Stream(self.torch_device)
        # q, k, v and the attention output are small and urgent: streams of their own, one per direction
        self._to_host = torch.cuda.Stream(self.torch_device, priority=-1)
        self._from_host = torch.cuda.Stream(self.torch_device, priority=-1)
        self._layers = torch.cuda.Stream(self.torch_device)  # whole layers
        self._results_begin: Any = None  # event before the first copy to the host since the last `when_done`
        self._waiting = _Completions("device-to-host")
        self._uploads = _Completions("host-to-device")

    def page_lock(self, arena: torch.Tensor) -> str | None:
        """Page-locks an arena, so that copies run beside the kernels; a warning where it fails.

        Copies from and to memory that is not locked are still right: the driver stages them, and they overlap less.
        The arena is locked as one piece: a copy that touches two of them is an error to CUDA.
        """
        code = int(torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), arena.numel(), 0))
        if code == 0:
            return None
        return f"cannot page-lock {arena.numel()} bytes (CUDA error {code}), copies will be slow: raise `ulimit -l`"

    def host_buffer(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def to_host(self, host: torch.Tensor, value: torch.Tensor) -> None:
        self._to_host.wait_event(self._compute.record_event())
        if self._results_begin is None:
            self._results_begin = torch.cuda.Event(enable_timing=True)
            self._results_begin.record(self._to_host)
        with torch.cuda.stream(self._to_host):
            host.copy_(value, non_blocking=True)
        value.record_stream(self._to_host)

    def fetch(self, value: torch.Tensor) -> torch.Tensor:
        host = self.host_buffer(value.numel(), value.dtype).view(value.shape)
        self._to_host.wait_event(self._compute.record_event())
        with torch.cuda.stream(self._to_host):
            host.copy_(value, non_blocking=True)
        self._to_host.synchronize()
        return host

    def from_host(self, host: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._from_host):
            value = host.to(self.torch_device, non_blocking=True)
            arrived = self._from_host.record_event()
        self._compute.wait_event(arrived)
        value.record_stream(self._compute)
        return value

    def when_done(self, callback: Callable[[int], None]) -> None:
        begin, self._results_begin = self._results_begin, None
        copied = torch.cuda.Event(enable_timing=True)
        copied.record(self._to_host)
        self._to_host.wait_event(self._compute.record_event())

        def done() -> None:
            callback(0 if begin is None else int(1e6 * begin.elapsed_time(copied)))

        self._waiting.add(_sleeping_event(self._to_host), done)

    def upload(self, target: torch.Tensor, host: torch.Tensor, done: Callable[[], None]) -> None:
        with torch.cuda.stream(self._layers):
            for to, source in zip(target.split(UPLOAD_CHUNK), host.split(UPLOAD_CHUNK), strict=True):
                to.copy_(source, non_blocking=True)
            self._uploads.add(_sleeping_event(self._layers), done)

    def copy_weights(self, target: torch.Tensor, host: torch.Tensor) -> None:
        with torch.cuda.stream(self._compute):
            for to, source in zip(target.split(UPLOAD_CHUNK), host.split(UPLOAD_CHUNK), strict=True):
                to.copy_(source, non_blocking=True)

    def give_back_memory(self) -> None:
        """Host memory is not where temporaries are."""

    def limit_memory(self, num_bytes: int) -> None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, num_bytes / self.total_bytes), self.torch_device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.torch_device)

    def compute(self) -> Any:
        return torch.cuda.stream(self._compute)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        self._waiting.close()
        self._uploads.close()


def _sleeping_event(stream: Any) -> Any:
    """An event of everything on the stream so far, whose waiter sleeps instead of spinning."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event


class _Completions:
    """A thread that waits for events in the order in which they were recorded, and calls back after each."""

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[Any, Callable[[], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def add(self, event: Any, callback: Callable[[], None]) -> None:
        self._queue.put((event, callback))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            event, callback = item
            event.synchronize()
            callback()


Device = CpuDevice | CudaDevice


def cuda_devices() -> list[tuple[str, int]]:
    """Name and bytes of each GPU that PyTorch sees."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [(properties.name, properties.total_memory) for properties in found]


def open_device(name: str) -> Device:
    """The device for "auto", "cpu", "cuda" or "cuda:N"."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CpuDevice()
    return CudaDevice("cuda:0" if name in ("auto", "cuda") else name)
