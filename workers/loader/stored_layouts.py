"""How the parts of weights in few bits lie in checkpoints, and how a run of their bytes becomes rows.

A source is lines of bytes. In most layouts a line is one or more rows of a weight `[N, K]`, with all its K; in those
that are *turned* it is some items of K, of all N. Decoded, values are words of 64 bits along K, the first item lowest:
codes of 4 bits as packing.py counts them (q + 8), or bytes (q + 128, or what a float is stored as). Scales, zeros and
offsets are one for every `group` items of K.

    layout            lines                                            from
    stream            codes along K, the first lowest, q + 8 or + 128  compressed-tensors, MXFP4, NVFP4
    signed            bytes, q in two's complement                     W8A8, bitsandbytes, torchao
    signed_halves     half bytes, likewise                             torchao
    bit_stream        codes of any bits along K, in words of 32 bits   compressed-tensors
    swapped_halves    codes along K, the first highest                 bitsandbytes
    words             turned: bits of the items of a column, the       GPTQ
                      lowest first, in words of 32 bits
    sorted_words      the same, where inputs are sorted by group       GPTQ
    awq_words         turned: a word has eight columns                 AWQ
    awq_stretches     four rows in stretches of 64 items               AWQ, gemv_fast
    items             an item is for a block of items of the weight    scales, zeros and offsets of all
    filled_items      the same, with more of them behind a row's       AWQ, gemv
    turned_items      turned: likewise
    absmax            one for a run of items, whatever rows they are   bitsandbytes
    absmax_8          127 times the scale of a row                     bitsandbytes
    packed_zeros      codes along N, in words of 32 bits               compressed-tensors
    packed_words      turned: codes along N, in words of 32 bits       GPTQ, version 2
    lessened_words    the same, each lessened by one                   GPTQ
    awq_zeros         turned: a word has eight columns                 AWQ
    q4_0, q4_k ...    blocks of items, each with its scales            GGUF
    added             floats, and a number that is added to each       GGUF
    whole             all bytes of a weight's values; `others` has     what is unpacked while it is loaded
                      its other parts
    fp8_blocks        FP8 along K; `others` has scales for blocks      what is unpacked while it is loaded
    filled_zeros      codes along K, with more of them behind a row's  AWQ, gemv
    one               one number for the whole weight                  NVFP4
    order             which group each item of K is in                 GPTQ, compressed-tensors

Where inputs are sorted by group, `others` of values is that, too.

Sources: the packages compressed-tensors, gptqmodel, autoawq, bitsandbytes and torchao, each of which writes its layout;
of GGUF see gguf_kernels.py.
"""

from __future__ import annotations

import math

import numpy as np

from flexgen_lite.model.formats.fp8 import kept_scales
from flexgen_lite.model.spec import ITEM_BYTES, StoredPart
from flexgen_lite.workers.loader.float_items import is_finite, to_float32
from flexgen_lite.workers.loader.lines import Layout, Lines
from flexgen_lite.workers.loader.weight_cast import Bits, bits_type
from flexgen_lite.workers.loader.whole_layouts import WHOLE

SIGN_BITS = {4: np.uint64(0x8888888888888888), 8: np.uint64(0x8080808080808080)}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # half byte of a word that has column j of its eight


def _stream(lines: Lines) -> Bits:
    return _sorted(lines.words(np.uint64), lines)


def _bit_stream(lines: Lines) -> Bits:
    from flexgen_lite.workers.loader import layout_kernels

    words, bits = lines.words(np.uint32), lines.part.num_bits
    rows = np.empty((len(words), lines.width * kept_bits(bits) // 64), np.uint64)
    layout_kernels.widen_stream(words, bits, int(lines.part.number), middle(bits), rows)
    return _sorted(rows, lines)


def _sorted(rows: Bits, lines: Lines) -> Bits:
    """Rows with their items by group, where they are to be."""
    from flexgen_lite.workers.loader import layout_kernels

    if not lines.others:
        return rows
    found = np.empty_like(rows)
    layout_kernels.sort_items(rows, order_of(lines.others[0]), kept_bits(lines.part.num_bits), found)
    return found


def order_of(groups: Bits) -> Bits:
    """The inputs by group, int32, from the group of each."""
    return np.argsort(groups.view(np.int32), kind="stable").astype(np.int32)


def kept_bits(bits: int) -> int:
    """In memory, of codes of so many bits."""
    return 4 if bits <= 4 else 8


def middle(bits: int) -> int:
    """What to add to codes of compressed-tensors, whose zero is in their middle, for those of packing.py."""
    return (1 << (kept_bits(bits) - 1)) - (1 << (bits - 1))


def _signed(lines: Lines) -> Bits:
    return np.asarray(lines.words(np.uint64) ^ SIGN_BITS[8])


def _signed_halves(lines: Lines) -> Bits:
    return np.asarray(lines.words(np.uint64) ^ SIGN_BITS[4])


def _swapped_halves(lines: Lines) -> Bits:
    from flexgen_lite.workers.loader import layout_kernels

    words = lines.words(np.uint64)
    rows = np.empty_like(words)
    layout_kernels.swap_halves(words, rows)
    return rows


def _awq_stretches(lines: Lines) -> Bits:
    from flexgen_lite.workers.loader import layout_kernels

    words = lines.words(np.uint64)
    rows = np.empty((len(words) * 4, words.shape[1] // 4), np.uint64)
    layout_kernels.part_stretches(words, rows)
    return rows


def _items(lines: Lines) -> Bits:
    """Of a line, the items that the groups of its rows have: scales as float32, zeros as bytes."""
    return _spread(_decoded_items(lines), lines)


def _filled_items(lines: Lines) -> Bits:
    return np.ascontiguousarray(_decoded_items(lines)[:, : lines.width // lines.part.block[1]])


def _turned_items(lines: Lines) -> Bits:
    items = np.ascontiguousarray(_decoded_items(lines).T)
    return _spread(items, lines)


def _decoded_items(lines: Lines) -> Bits:
    if lines.part.fills == "zeros":  # numbers with a sign, that fit in bytes
        codes = lines.bytes if lines.dtype == "int8" else lines.words(np.uint32).astype(np.uint8)
        return np.asarray(codes + np.uint8(1 << (lines.part.num_bits - 1)))
    if lines.part.fills == "scales" and kept_scales(lines.dtype) == lines.kept.scale_dtype:
        return lines.words(bits_type(lines.dtype))  # as they are kept
    return to_float32(lines.bytes, lines.dtype)


def are_finite(lines: Lines) -> bool:
    """Whether scales, offsets or factors are, with what they are multiplied with; what divides is not 0."""
    if lines.part.fills == "factors" and lines.kept.divides and not lines.bytes.view(np.float32).all():
        return False
    factors = [other.view(np.float32) for other in lines.others if other.dtype == np.uint32]
    are_places = lines.part.layout == "absmax" and lines.dtype == "uint8"
    return all(bool(np.isfinite(factor).all()) for factor in factors) and (
        are_places or is_finite(lines.bytes, lines.dtype)
    )


def _one(lines: Lines) -> Bits:
    return lines.words(np.uint32).view(np.float32)


def _spread(items: Bits, lines: Lines) -> Bits:
    """For each group of K its item."""
    each = lines.part.block[1]
    if each == lines.group:
        return items
    groups = min(items.shape[1] * each, lines.width - lines.first) // lines.group
    return np.asarray(items[:, np.arange(groups) * lines.group // each])


def _absmax(lines: Lines) -> Bits:
    """All of them are one line; where they are bytes, these are places in a table whose values are scaled once more."""
    each, columns = lines.part.block[1], lines.part.block[0]
    if lines.others:
        nested, table = (other.view(np.float32) for other in lines.others)
        codes = lines.bytes.reshape(-1)
        scales = table[codes]
        whole = codes.size // 256
        scales[: whole * 256].reshape(whole, 256)[...] *= nested[:whole, None]
        scales[whole * 256 :] *= nested[whole:]
        scales += np.float32(lines.part.number)
    else:
        scales = to_float32(lines.bytes, lines.dtype).reshape(-1)
    if each == lines.group:
        return scales.reshape(columns, -1)
    begins = np.arange(0, columns * lines.width, lines.group)
    return np.asarray(scales[begins // each].reshape(columns, -1))


def _absmax_8(lines: Lines) -> Bits:
    items = to_float32(lines.bytes, lines.dtype)
    return items if lines.kept.finish == "127" else np.asarray(items * np.float32(1 / 127))


def _packed_zeros(lines: Lines) -> Bits:
    """A line has the zeros of 32 / bits rows, or several lines those of 32."""
    bits, words = lines.part.num_bits, lines.words(np.uint32)
    if 32 % bits:
        return np.asarray(_fields(words.T, bits) + np.uint8(middle(bits)))
    shifts = np.arange(32 // bits, dtype=np.uint32)[:, None] * np.uint32(bits)
    zeros = (words[:, None, :] >> shifts) & np.uint32((1 << bits) - 1)
    return np.asarray(zeros.reshape(-1, words.shape[1]).astype(np.uint8) + np.uint8(middle(bits)))


def _packed_words(lines: Lines) -> Bits:
    return _fields(lines.words(np.uint32), lines.part.num_bits)


def _lessened_words(lines: Lines) -> Bits:
    """From a word a one has been taken for each of its fields, with what they borrow of each other."""
    words, bits = lines.words(np.uint32), lines.part.num_bits
    if 32 % bits:  # fields that go on in the next word
        return np.asarray((_fields(words, bits) + np.uint8(1)) & np.uint8((1 << bits) - 1))
    ones = sum(1 << place for place in range(0, 32, bits))
    return _fields(words + np.uint32(ones), bits)


def _fields(words: Bits, bits: int) -> Bits:
    """`[fields of a line, lines]`."""
    from flexgen_lite.workers.loader import layout_kernels

    found = np.empty((words.shape[1] * 32 // bits, len(words)), np.uint8)
    layout_kernels.fields(words, bits, found)
    return found


def _awq_zeros(lines: Lines) -> Bits:
    words = lines.words(np.uint32)
    shifts = 4 * np.array(_AWQ_ORDER, np.uint32)
    zeros = (words[:, :, None] >> shifts) & np.uint32(15)
    return np.ascontiguousarray(zeros.reshape(len(words), -1).astype(np.uint8).T)


def _filled_zeros(lines: Lines) -> Bits:
    zeros = _fields(lines.words(np.uint32), lines.part.num_bits).T
    return np.ascontiguousarray(zeros[:, : lines.width // lines.part.block[1]])


def _order(lines: Lines) -> Bits:
    return order_of(lines.words(np.uint32))


def _not_in_rows(lines: Lines) -> Bits:
    raise AssertionError(f"{lines.part.layout} is put where it belongs without rows")


def _along_k(part: StoredPart, columns: int, width: int, dtype: str) -> int:
    return width * part.num_bits // 8


def _along_n(part: StoredPart, columns: int, width: int, dtype: str) -> int:
    return columns * part.num_bits // 8


def _item_line(part: StoredPart, columns: int, width: int, dtype: str) -> int:
    return -(-width // part.block[1]) * ITEM_BYTES[dtype]


def _stream_line(part: StoredPart, columns: int, width: int, dtype: str) -> int:
    words = -(-width // int(part.number)) if part.number else -(-width * part.num_bits // 32)
    return 4 * words


def _zero_lines(part: StoredPart) -> tuple[int, int]:
    lines = part.num_bits // math.gcd(part.num_bits, 32)
    return lines, lines * 32 // part.num_bits


def _words_unit(part: StoredPart) -> tuple[int, int]:
    return part.num_bits, 32


LAYOUTS = {
    "stream": Layout(_stream, _along_k),
    "bit_stream": Layout(_bit_stream, _stream_line),
    "signed": Layout(_signed, _along_k),
    "signed_halves": Layout(_signed_halves, _along_k),
    "swapped_halves": Layout(_swapped_halves, _along_k),
    "words": Layout(_not_in_rows, lambda part, n, k, dtype: 4 * n, _words_unit, is_turned=True),
    "sorted_words": Layout(_not_in_rows, lambda part, n, k, dtype: 4 * n, _words_unit, is_turned=True),
    "awq_stretches": Layout(_awq_stretches, lambda part, n, k, dtype: 2 * k, lambda part: (1, 4)),
    "awq_words": Layout(_not_in_rows, _along_n, lambda part: (16, 16), is_turned=True),
    "items": Layout(_items, _item_line),
    "filled_items": Layout(_filled_items, lambda part, n, k, dtype: int(part.number) * ITEM_BYTES[dtype]),
    "turned_items": Layout(
        _turned_items, lambda part, n, k, dtype: n * ITEM_BYTES[dtype], lambda part: (1, part.block[1]), is_turned=True
    ),
    "absmax": Layout(_absmax, lambda part, n, k, dtype: -(-n * k // part.block[1]) * ITEM_BYTES[dtype]),
    "absmax_8": Layout(_absmax_8, _item_line),
    "packed_zeros": Layout(_packed_zeros, lambda part, n, k, dtype: k // part.block[1] * 4, _zero_lines),
    "packed_words": Layout(_packed_words, _along_n, lambda part: (1, part.block[1]), is_turned=True),
    "lessened_words": Layout(_lessened_words, _along_n, lambda part: (1, part.block[1]), is_turned=True),
    "awq_zeros": Layout(_awq_zeros, _along_n, lambda part: (1, part.block[1]), is_turned=True),
    "filled_zeros": Layout(_filled_zeros, lambda part, n, k, dtype: int(part.number) * part.num_bits // 8),
    "one": Layout(_one, lambda part, n, k, dtype: ITEM_BYTES[dtype]),
    "order": Layout(_order, lambda part, n, k, dtype: 4 * k),
}

LAYOUTS |= WHOLE


def num_lines(part: StoredPart, columns: int, width: int) -> int:
    """Of all of a part of a weight `[N, K]`."""
    layout = LAYOUTS[part.layout]
    lines, covers = layout.unit(part)
    return math.ceil((width if layout.is_turned else columns) / covers) * lines
