"""The tensors of a checkpoint while those of its layers in few bits are put together."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.section import Section
from flexgen_lite.model.packing import STEP
from flexgen_lite.model.spec import SmallSource, StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown_text

REMEDY = "use the unquantised model with `quantization`"
AGAIN = "download the model again"
FLOATS = ("float32", "bfloat16", "float16")
FP8 = "float8_e4m3fn"
_UNPACK = {"float32": "<f", "float16": "<e", "int64": "<q", "int32": "<i", "uint8": "B"}

Part = tuple[StoredPart, StoredTensor]


@dataclass
class StoredLayers:
    """
    Attributes:
        tensors: by name. Those that a format has put together are replaced by the weight that they stand for.
        section: what the files say of how it was quantised.
        files: their paths.
        metadata: of the files' headers.
        read: gives a few bytes of a file.
    """

    tensors: dict[str, StoredTensor]
    section: Section
    files: tuple[str, ...]
    metadata: tuple[Mapping[str, str], ...]
    read: Callable[[SmallSource], bytes]

    @contextmanager
    def apart(self, name: str, beside: StoredTensor) -> Iterator[None]:
        """What is wrong with the weight `name` counts only if the model has it: there are checkpoints of more than one
        part, of which some are never read."""
        try:
            yield
        except CheckpointError as error:
            self.tensors[name] = replace(beside, name=name, fault=str(error), bits=None, members=())

    def layers(self, suffix: str) -> Iterator[tuple[str, StoredTensor]]:
        """Of all tensors whose names end so: the names without it, and the tensors."""
        for name, tensor in list(self.tensors.items()):
            if name.endswith(suffix) and name in self.tensors:
                yield name.removesuffix(suffix), tensor

    def take(self, name: str) -> StoredTensor | None:
        """The tensor of that name, which is none of the model's own."""
        return self.tensors.pop(name, None)

    def needed(self, layer: str, name: str, beside: StoredTensor) -> StoredTensor:
        """The same; raises CheckpointError where it is not there."""
        found = self.take(layer + name)
        if found is None:
            raise self.error(layer, beside, f"has no {name.lstrip('._')}, which {beside.name} needs: {AGAIN}")
        return found

    def add(
        self, name: str, shape: tuple[int, ...], bits: StoredBits, values: StoredTensor, dtype: str = "bfloat16"
    ) -> None:
        """Puts the weight `name` in the place of its parts."""
        self.check_alone(name, values)
        self.tensors[name] = _weight(name, shape, bits, values, dtype)

    def check_alone(self, name: str, values: StoredTensor) -> None:
        """Raises CheckpointError where the weight that `values` are of is there without them, too."""
        if self.tensors.get(name, values) is not values:
            raise self.error(name, values, f"is there twice, as {values.name} and as it is: {AGAIN}")

    def error(self, layer: str, tensor: StoredTensor, message: str) -> CheckpointError:
        return CheckpointError(f"{self.files[tensor.file]}, layer {shown_text(layer)} {message}")

    def misfit(self, layer: str, *tensors: StoredTensor | None) -> CheckpointError:
        """Shapes or dtypes that do not go together."""
        shown = ", ".join(f"{t.name.removeprefix(layer).lstrip('._')} {t.dtype} {list(t.shape)}" for t in tensors if t)
        first = next(tensor for tensor in tensors if tensor is not None)
        return self.error(layer, first, f"has parts that do not fit each other ({shown}): {AGAIN}, config.json too")

    def each(self, layer: str, tensor: StoredTensor, width: int, groups: int) -> int:
        """Items of K that one of `groups` scales is for."""
        if not groups or not width or width % groups:
            raise self.error(
                layer, tensor, f"has {groups} scales for {width} inputs, which does not go without a rest: {REMEDY}"
            )
        return width // groups

    def group(self, layer: str, tensor: StoredTensor, width: int, each: int) -> int:
        """Items of K with one scale in memory, where a scale is for `each` of `width` in the file."""
        group = math.gcd(width, each)
        if group % STEP:
            raise self.error(
                layer, tensor, f"has a scale for every {group} inputs, and only multiples of {STEP} are read: {REMEDY}"
            )
        return group

    def number(self, tensor: StoredTensor, index: int = 0) -> float:
        """An item of it. Raises CheckpointError where it has none, or of another dtype than such tensors have."""
        kind = _UNPACK.get(tensor.dtype)
        size = struct.calcsize(kind) if kind else 0
        if kind is None or tensor.num_bytes < (index + 1) * size:
            raise self.error(tensor.name, tensor, f"cannot be read as {tensor.dtype} {list(tensor.shape)}: {AGAIN}")
        source = SmallSource(tensor.file, tensor.offset + index * size, size, tensor.dtype)
        return float(struct.unpack(kind, self.read(source))[0])


def small(tensor: StoredTensor) -> SmallSource:
    """All of it, to be read along with others."""
    return SmallSource(tensor.file, tensor.offset, tensor.num_bytes, tensor.dtype)


def _weight(name: str, shape: tuple[int, ...], bits: StoredBits, values: StoredTensor, dtype: str) -> StoredTensor:
    return StoredTensor(name, values.file, values.offset, values.num_bytes, dtype, shape, bits)


def several(
    name: str, joined: StoredTensor, bits: list[StoredBits], shape: tuple[int, int], is_turned: bool = False
) -> StoredTensor:
    """Weights `[N, K]` that are one tensor, `[E, N, K]`, or `[E, K, N]` where it `is_turned`."""
    members = tuple(_weight(name, shape, one, one.parts[0][1], "bfloat16") for one in bits)
    inner = shape[::-1] if is_turned else shape
    return StoredTensor(
        name, joined.file, joined.offset, joined.num_bytes, "bfloat16", (len(bits), *inner), None, members, is_turned
    )


def member(tensor: StoredTensor, index: int, count: int, shape: tuple[int, ...]) -> StoredTensor:
    """Number `index` of the `count` parts of a tensor along its first dimension, seen as `shape`."""
    size = tensor.num_bytes // count
    return replace(tensor, offset=tensor.offset + index * size, num_bytes=size, shape=shape)
