"""What the coordinator knows of a model: sizes, tensors and attention shapes; no tensor library.

The compute worker, which has Transformers, describes the model in these terms; the plan, the loader and the attention
workers work from the description alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexgen_lite.model.packing import Packing

ITEM_BYTES = {
    "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when the model was opened; another stamp means another content."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class SmallSource:
    """A few bytes of a file that are needed to read others: one scale for all, a table."""

    file: int
    offset: int
    num_bytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class PartOfWhole:
    """A part of a weight that is put together to be unpacked, as StoredPart has them.

    Attributes:
        dtype: of its source.
        num_others: that its layout needs.
    """

    fills: str
    layout: str
    num_bits: int
    block: tuple[int, int]
    number: float
    dtype: str
    num_others: int


@dataclass(frozen=True, slots=True)
class StoredPart:
    """Which part of a weight `[N, K]` in few bits a source is, and how it lies.

    Attributes:
        fills: "values", "scales", "zeros", "offsets", "factors" or "order"; "all": items have their scales beside them.
        layout: a name in workers/loader/stored_layouts.py.
        num_bits: of an item of values or zeros.
        block: rows and items of K that one item of the source is for.
        others: what the layout needs beside it, in an order of its own.
        number: likewise.
        packing: of a weight that is put together to be unpacked.
        members: its parts; `others` are the sources of all but the first, and behind each, as behind the first, what
            its layout needs.
    """

    fills: str
    layout: str
    num_bits: int = 0
    block: tuple[int, int] = (1, 1)
    others: tuple[SmallSource, ...] = ()
    number: float = 0.0
    packing: Packing | None = None
    members: tuple[PartOfWhole, ...] = ()


@dataclass(frozen=True, slots=True)
class SourcePiece:
    """One source tensor of a checkpoint, and the part of a parameter that it fills.

    The source is read as `source_shape`, taken through the `views` in order, and assigned to `parameter[region]`.
    A view is a tuple whose first item is its name: ("transpose", dim0, dim1), ("reshape", *shape) or
    ("slice", dim, start, stop). An empty region means the whole parameter.

    With `part` the source is a part of a weight in few bits, and `source_shape` that of the weight.
    """

    file: int  # index into ModelSpec.files
    offset: int  # of the first byte, from the start of the file
    num_bytes: int
    source_name: str
    source_dtype: str
    source_shape: tuple[int, ...]
    views: tuple[tuple[str | int, ...], ...] = ()
    region: tuple[tuple[int, int], ...] = ()
    part: StoredPart | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One parameter as the model uses it, and where it lies in its unit's slot (`offset`, in bytes).

    With a `packing` it is kept in so few bits: `dtype` and `shape` are those that the model knows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    pieces: tuple[SourcePiece, ...]
    packing: Packing | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of file bytes that is read straight into the slot: offsets and length are multiples of 4096."""

    file: int
    file_offset: int
    num_bytes: int
    slot_offset: int


@dataclass(frozen=True, slots=True)
class UnitSpec:
    """The tensors that are loaded together: one decoder layer, or everything outside the layers.

    `extents` are read straight into the slot. The tensors named in `converted` (indices into `tensors`) are not
    covered by them: they go through a bounce buffer and are cast or rearranged on the way.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    extents: tuple[Extent, ...]
    converted: tuple[int, ...]
    num_bytes: int  # of the slot, a multiple of 4096


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """An attention call of a decoder layer, as Transformers makes it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int  # of values
    scaling: float
    sliding_window: int | None
    softcap: float | None
    sinks: bool
    attention_chunk: int | None = None  # tokens see those of their own chunk alone, of so many
    values_in_keys: bool = False  # a value is the beginning of its key, and not kept beside it

    @property
    def stored_value_dim(self) -> int:
        """Elements of a value that are kept beside its key."""
        return 0 if self.values_in_keys else self.value_dim

    @property
    def exchange_width(self) -> int:
        """Elements that one token takes in an exchange region: q, k, v and the output."""
        return self.num_heads * (self.head_dim + self.value_dim) + self.kv_width

    @property
    def kv_width(self) -> int:
        """Elements that one token takes in the KV cache."""
        return self.num_kv_heads * (self.head_dim + self.stored_value_dim)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """A tensor that a sequence keeps from token to token beside keys and values.

    Attributes:
        kind: "conv", "recurrent", "linear" or "attribute".
        layer, number: as the model's class counts them.
        offset: bytes from the beginning of the sequence's state.
    """

    kind: str
    layer: int
    number: int
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


STATE_ALIGNMENT = 64  # bytes, of its tensors


def first_seen(position: int, window: int, attention_chunk: int) -> int:
    """The first token that the one at `position` sees, 0: there is no window, or are no chunks; a later one sees none
    before it."""
    if attention_chunk:
        return position // attention_chunk * attention_chunk
    return max(0, position + 1 - window) if window else 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """`units[:num_layers]` are the decoder layers in order, `units[num_layers]` is everything else.

    A *column* is an attention call with what leads to it in its layer, or a *stop*: what leads to the end of a mixer
    that keeps other state than keys and values, or of a layer with neither. Every layer has a column at least.
    """

    model_type: str
    class_name: str
    dtype: str
    num_layers: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_length: int  # positions: prompt and generated tokens of one sequence
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    num_parameters: int
    files: tuple[str, ...]
    stamps: tuple[FileStamp, ...]  # of the files
    units: tuple[UnitSpec, ...]
    columns: tuple[int, ...]  # the layer of each
    attention: tuple[AttentionSpec, ...]  # the call of each
    kv_columns: tuple[int, ...]  # the column whose K and V each reads: itself, or one before it; of a stop any
    stops: tuple[int, ...] = ()  # columns; `attention` has any other column's in their place
    states: tuple[StateSpec, ...] = ()  # of a sequence
    held_bytes: int = 0  # that a token takes in the compute worker, at most, while its attention is computed elsewhere
    pass_bytes: int = 0  # and on its way through a layer; both measured, without what libraries take
    mix_bytes: int = 0  # and of a prompt in a mixer, besides
    head_copy_bytes: int = 0  # of a copy of the tied head that suits the processor's products better; 0: no use
    projections: tuple[tuple[int, ...], ...] = ()  # by layer: tensors of its unit that lead to its attention calls
    warnings: tuple[str, ...] = ()

    @property
    def own_kv(self) -> tuple[AttentionSpec, ...]:
        """The attention of the columns that have K and V of their own."""
        return tuple(spec for c, spec in enumerate(self.attention) if self.kv_columns[c] == c)

    @property
    def state_bytes(self) -> int:
        """Of a sequence."""
        if not self.states:
            return 0
        end = max(state.offset + state.num_bytes for state in self.states)
        return -(-end // STATE_ALIGNMENT) * STATE_ALIGNMENT

    @property
    def column_names(self) -> tuple[str, ...]:
        """Of the columns, and of the end behind them."""
        alone = {layer for layer in self.columns if self.columns.count(layer) == 1}
        names = [
            f"layer {layer}" if layer in alone else f"layer {layer}, call {column - self.columns.index(layer)}"
            for column, layer in enumerate(self.columns)
        ]
        return *names, f"layer {self.num_layers}"

    @property
    def has_few_bits(self) -> bool:
        """Some of its weights are kept in fewer than 16."""
        return any(tensor.packing is not None for unit in self.units for tensor in unit.tensors)

    @property
    def weight_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self.units)
