"""What a pass is made of: pieces of sequences, packed into micro-batches, and what came of them. Pure logic."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.wire.sampling import Scored, TokenLogprobs
from flexgen_lite.wire.worker_messages import KvBatch, KvSpan, TokenBatch, TokenSpan


@dataclass(frozen=True, slots=True)
class Result:
    """Of a micro-batch: the drawn tokens in the order of its rows, the logprobs of those that asked for them, and those
    of the prompts' tokens that are scored."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """The next `num_rows` tokens of a request, from its first token without stored K and V."""

    request: RunningRequest
    num_rows: int

    @property
    def prefill(self) -> bool:
        """No earlier token: the rows attend to each other on the compute device."""
        return self.request.stored == 0

    @property
    def completes(self) -> bool:
        """The last known token is among them, so the next one can be sampled."""
        return self.request.stored + self.num_rows == len(self.request.tokens)

    @property
    def scored(self) -> Scored | None:
        """The tokens of the prompt that follow its rows, as far as their logprobs are wanted and not known."""
        request = self.request
        if request.prompt_logprobs is None:
            return None
        begin = max(request.stored + 1, request.params.scored_from + len(request.prompt_logprobs))
        end = min(request.num_prompt_tokens, request.stored + self.num_rows + 1)
        if begin >= end:
            return None
        skip = begin - 1 - request.stored
        return Scored(skip, tuple(request.tokens[begin:end]), request.params.prompt_logprobs or 0)


@dataclass(slots=True)
class MicroBatch:
    """Pieces that go through a layer together; the rows that attention workers attend to come first."""

    pieces: list[Piece] = field(default_factory=list)
    num_rows: int = 0

    def add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.num_rows += piece.num_rows

    def workers(self) -> tuple[int, ...]:
        return tuple(sorted({piece.request.worker for piece in self.pieces}))

    def in_rows(self) -> list[tuple[int, Piece]]:
        """(first row, piece) in the order of the rows."""
        row, placed = 0, []
        for piece in sorted(self.pieces, key=lambda piece: piece.prefill):
            placed.append((row, piece))
            row += piece.num_rows
        return placed

    def token_batch(self, index: int) -> TokenBatch:
        """For the compute worker; micro-batch k uses exchange region k."""
        token_ids: list[int] = []
        spans = []
        for row, piece in self.in_rows():
            request = piece.request
            token_ids.extend(request.tokens[request.stored : request.stored + piece.num_rows])
            sample = request.next_sample() if piece.completes else None
            spans.append(
                TokenSpan(
                    row, piece.num_rows, request.stored, piece.prefill, sample, piece.scored, *request.state_places
                )
            )
        return TokenBatch(index, index, tuple(token_ids), tuple(spans), self.workers())

    def kv_batch(self, index: int, worker: int) -> KvBatch:
        """For one attention worker: its requests only."""
        spans = tuple(
            KvSpan(row, piece.num_rows, piece.request.stored, not piece.prefill, piece.request.pages)
            for row, piece in self.in_rows()
            if piece.request.worker == worker
        )
        return KvBatch(index, index, spans)
