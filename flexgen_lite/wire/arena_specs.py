"""How the exchange and the KV arena are divided, as workers are told: regions, pages, and which columns share them."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_lite.model.spec import first_seen


@dataclass(frozen=True, slots=True)
class SharedPart:
    """The first bytes of the weights are those of an arena that all engines of the machine map.

    Attributes:
        writable: else a write ends the process.
    """

    num_bytes: int
    writable: bool


@dataclass(frozen=True, slots=True)
class ExchangeSpec:
    """The exchange arena: `num_regions` regions of `region_bytes`, each for up to `max_tokens` rows."""

    num_regions: int
    region_bytes: int
    max_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Columns whose keys and values lie in the same pages.

    Attributes:
        columns: those of them that have keys and values of their own.
        page_tokens: tokens of a page.
        window: tokens that the columns see, at most; 0: all.
        attention_chunk: tokens of a chunk, if they see those of their own chunk alone; 0: no chunks.
    """

    columns: tuple[int, ...]
    page_tokens: int
    window: int = 0
    attention_chunk: int = 0

    def first_seen(self, position: int) -> int:
        """The first token that the one at `position` sees; no later one sees any before it."""
        return first_seen(position, self.window, self.attention_chunk)


@dataclass(frozen=True, slots=True)
class KvSpec:
    """The KV arena: `num_pages` pages of `page_bytes`, each with tokens of one group's columns.

    In a page, column c's keys are `[num_kv_heads, page_tokens, head_dim]` at byte `key_offsets[c]`, its values
    `[num_kv_heads, page_tokens, value_dim]` at byte `value_offsets[c]`; in int8 with a scale of each token and
    head among them, in float32.

    Attributes:
        group_of: the group of each column's keys and values.
    """

    num_pages: int
    page_bytes: int
    dtype: str
    groups: tuple[KvGroup, ...]
    group_of: tuple[int, ...]
    key_offsets: tuple[int, ...]
    value_offsets: tuple[int, ...]

    @property
    def arena_bytes(self) -> int:
        return self.num_pages * self.page_bytes


@dataclass(frozen=True, slots=True)
class PageRun:
    """Pages of a sequence in one group: `pages[i]` holds its tokens from `(first + i) * page_tokens` on."""

    first: int
    pages: tuple[int, ...]
