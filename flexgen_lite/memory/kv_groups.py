"""Which columns keep their keys and values in the same pages, and how many pages a sequence takes: pure arithmetic.

Columns that see all tokens, and columns with a window, are in groups of their own, for the pages of the latter are free
behind the window. All pages have the same size, so that any page serves any group and no group can run short while
another has pages left: a group has as many columns, and its pages as many tokens, as come near that size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from flexgen_lite.memory.kv_layout import page_bytes
from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.wire.arena_specs import KvGroup

LENGTHS = (200, 1024, 8192, 65536)  # tokens of the sequences for which groups are to be good
MOST_PARTS = 16  # of the columns that see alike
FACTORS = (1, 2, 4)  # of the tokens of a page
GROUP_COST = 0.01  # what another group costs, as a share of all pages

Kind = tuple[int, int]  # window and attention chunk, 0: none


def kv_groups(
    columns: Sequence[AttentionSpec], kv_columns: Sequence[int], page_tokens: int, dtype: str, max_length: int
) -> tuple[KvGroup, ...]:
    """The groups of the columns that have keys and values of their own.

    Args:
        kv_columns: whose keys and values each column reads: its own, or those of one before it.
        page_tokens: of a page, at least.
        max_length: tokens of a sequence; no window is larger.
    """
    kinds: dict[Kind, list[int]] = {}
    for column, source in enumerate(kv_columns):
        if column == source:
            readers = [spec for spec, other in zip(columns, kv_columns, strict=True) if other == source]
            kinds.setdefault(_kind_of_all(readers, max_length), []).append(column)
    together = KvGroup(tuple(sorted(itertools.chain(*kinds.values()))), page_tokens, *_widest(list(kinds)))
    options = [(together,), *_divided(kinds, columns, page_tokens, dtype)]

    def cost(groups: tuple[KvGroup, ...]) -> float:
        size = max(_bytes(group, columns, dtype) for group in groups)
        whole = page_bytes([columns[column] for column in together.columns], 1, dtype)
        shares = [
            pages_for(groups, min(length, max_length)) * size / (whole * min(length, max_length)) for length in LENGTHS
        ]
        return sum(shares) * (1 + GROUP_COST * len(groups))

    return min(options, key=cost)


def block_tokens(groups: Sequence[KvGroup]) -> int:
    """Tokens of a *block*: what every group has in whole pages."""
    return max(group.page_tokens for group in groups)


def pages_for(groups: Sequence[KvGroup], num_tokens: int, rows: int = 1) -> int:
    """Most pages of a sequence of `num_tokens`, of which `rows` at most are computed in one pass."""
    block, total = block_tokens(groups), 0
    for group in groups:
        blocks = -(-num_tokens // block)
        if reach := group.window or group.attention_chunk:
            blocks = min(blocks, -(-(reach + rows - 2) // block) + 1)
        total += blocks * (block // group.page_tokens)
    return total


def _divided(
    kinds: dict[Kind, list[int]], columns: Sequence[AttentionSpec], page_tokens: int, dtype: str
) -> Iterator[tuple[KvGroup, ...]]:
    """Groups of each kind's own, for every size of a page that suits one of them."""
    if len(kinds) == 1:
        return
    forms: dict[Kind, list[tuple[int, tuple[KvGroup, ...]]]] = {}  # with the bytes of their largest page
    for kind, own in kinds.items():
        forms[kind] = []
        for count, factor in itertools.product(range(1, min(len(own), MOST_PARTS) + 1), FACTORS):
            groups = tuple(KvGroup(part, factor * page_tokens, *kind) for part in _parts(own, count, columns, dtype))
            forms[kind].append((max(_bytes(group, columns, dtype) for group in groups), groups))
    for size in {size for of_kind in forms.values() for size, _ in of_kind}:
        fitting = [[groups for needed, groups in of_kind if needed <= size] for of_kind in forms.values()]
        if all(fitting):
            best = [min(options, key=lambda groups: len(groups) / groups[0].page_tokens) for options in fitting]
            yield tuple(itertools.chain(*best))


def _parts(own: Sequence[int], count: int, columns: Sequence[AttentionSpec], dtype: str) -> list[tuple[int, ...]]:
    """Columns in `count` parts of about the same size."""
    parts: list[list[int]] = [[] for _ in range(count)]
    sizes = [0] * count
    for column in own:
        least = min(range(count), key=sizes.__getitem__)
        parts[least].append(column)
        sizes[least] += page_bytes([columns[column]], 1, dtype)
    return [tuple(part) for part in parts]


def _bytes(group: KvGroup, columns: Sequence[AttentionSpec], dtype: str) -> int:
    return page_bytes([columns[column] for column in group.columns], group.page_tokens, dtype)


def _kind_of_all(readers: Sequence[AttentionSpec], max_length: int) -> Kind:
    return _widest([_kind(spec, max_length) for spec in readers])


def _kind(spec: AttentionSpec, max_length: int) -> Kind:
    window, chunk = spec.sliding_window or 0, spec.attention_chunk or 0
    return (0 if window >= max_length else window), (0 if chunk >= max_length else chunk)


def _widest(kinds: Sequence[Kind]) -> Kind:
    """What holds enough for all of them."""
    if len(set(kinds)) == 1:
        return kinds[0]
    has_chunk, has_all = any(chunk for _, chunk in kinds), (0, 0) in kinds
    return (0, 0) if has_chunk or has_all else (max(window for window, _ in kinds), 0)
