"""A job's time: its requests through the batching of the engine, pass by pass, each as long as the simulator says. Pure
logic.

Of a job with many requests some are followed, and the rest is taken to go on at the rate that they had in the middle.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexgen_lite.cost.simulator import Simulator
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.kept_logprobs import KeptLogprobs
from flexgen_lite.queue.micro_batch import MicroBatch, Result
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.waiting_queue import WaitingQueue
from flexgen_lite.wire.kv_on_disk import FetchKv, KvMoved, ParkKv
from flexgen_lite.wire.sampling import TokenLogprobs, WireParams

FOLLOWED_ROUNDS = 5  # requests that are followed, in numbers of those that run at once
LEAST_FOLLOWED = 400
STRETCH = 16  # requests that follow each other, of those that are followed: neighbours may begin alike
SHARED_TOKENS = 16
MOST_SKIPPED = 16  # passes in a row that are taken to be as the one before: only contexts grow
END = 1  # the token that ends a sequence here
NO_SCORE = TokenLogprobs(0.0, 1, ())
DONE_PARTS = 20


@dataclass(frozen=True, slots=True)
class JobRequest:
    """
    Attributes:
        prompt: tokens of it.
        generated: of its answer, as it is expected.
        max_tokens: that it may have at most.
        scored: whether its prompt's tokens are.
        shared: keys of its prompt's first blocks of SHARED_TOKENS, as far as other prompts begin with them.
        common, copy: behind the first `common` keys only those with the same `copy` do.
    """

    prompt: int
    generated: int
    max_tokens: int
    scored: bool = False
    shared: tuple[bytes, ...] = ()
    common: int = 0
    copy: int = 0


@dataclass(frozen=True, slots=True)
class JobTime:
    """
    Attributes:
        load: seconds until the weights that stay are there, and the first of the others.
        seconds: from then on.
        passes: of those that were followed.
        busy: share of the time in which each lane works.
        prompt_tokens, generated_tokens: of all requests that the engine takes, going by those that were followed.
        requests, followed: all, and those that were followed.
        preempted: sequences of those that were followed, each time that one had to make room.
        pass_seconds: of each pass that was followed.
        done_at: seconds by which each twentieth of the requests is done; the first is when the first one is.
    """

    load: float
    seconds: float
    passes: int
    busy: dict[str, float]
    prompt_tokens: int
    generated_tokens: int
    requests: int
    followed: int
    preempted: int = 0
    pass_seconds: tuple[float, ...] = ()
    done_at: tuple[float, ...] = ()


def predict(
    batcher: Batcher,
    simulator: Simulator,
    requests: Sequence[JobRequest],
    at_once: int,
    rounds: int = FOLLOWED_ROUNDS,
    longest: int | None = None,
) -> JobTime | None:
    """None where the engine would take none of them.

    Args:
        requests: all of the job, in their order.
        at_once: that run at once, at most.
        rounds: of these, that are followed.
        longest: tokens of a sequence that the engine takes; None: any number.
    """
    count = min(len(requests), max(LEAST_FOLLOWED, rounds * at_once))
    chosen = (requests[index] for index in _chosen(len(requests), count))
    followed = [one for one in (_taken(request, longest) for request in chosen) if one is not None]
    if not followed:
        return None
    waiting = WaitingQueue[RunningRequest]()
    lengths = {}
    for number, one in enumerate(followed):
        lengths[number] = one.generated
        waiting.add(_sequence(number, one, batcher.block_tokens))
    load = simulator.load_all()
    seconds, busy, each, ends = 0.0, Counter[str](), list[float](), list[float]()
    while True:
        micro_batches = batcher.compose(waiting)
        is_moving = _send_orders(batcher, simulator)
        if not micro_batches and not is_moving:
            break
        taken = simulator.run(micro_batches) if micro_batches else simulator.wait_for_move()
        seconds += taken.seconds
        busy.update(taken.busy)
        for order in simulator.take_moved():
            checksums = order.slots if isinstance(order, ParkKv) else ()
            batcher.moved(KvMoved(order.ticket, checksums, 0, 0, 0), waiting)
        if not micro_batches:
            continue
        each.append(taken.seconds)
        results = [_result(batch, lengths) for batch in micro_batches]
        finished = batcher.commit(micro_batches, results)
        ends += [seconds] * len(finished)
        if not finished and not is_moving and (skipped := _skip(batcher, micro_batches, lengths)):
            seconds += skipped * taken.seconds
            each += [taken.seconds] * skipped
            busy.update({lane: skipped * time for lane, time in taken.busy.items()})
    shares = {lane: time / seconds for lane, time in busy.items() if seconds > 0}
    of_each = len(requests) / count  # requests that stand behind each that was chosen
    rest = round(len(followed) * of_each) - len(ends)
    if rest and ends:
        begin, end = len(ends) * 3 // 10, len(ends) * 8 // 10
        seconds += rest * (ends[end] - ends[begin]) / max(1, end - begin)
    first = ends[0] if ends else 0.0
    twentieths = range(DONE_PARTS + 1)
    if rest or not ends:
        done_at = tuple(first + (seconds - first) * part / DONE_PARTS for part in twentieths)
    else:
        done_at = tuple(ends[max(0, -(-len(ends) * part // DONE_PARTS) - 1)] for part in twentieths)
    prompts, generated = sum(one.prompt for one in followed), sum(one.generated for one in followed)
    return JobTime(
        load, seconds, len(each), shares, round(of_each * prompts), round(of_each * generated), len(requests),
        len(followed), batcher.num_preempted, tuple(each), done_at,
    )  # fmt: skip


def _send_orders(batcher: Batcher, simulator: Simulator) -> bool:
    """Whether KV is on its way to disk, or from it."""
    if batcher.disk is None:
        return False
    orders = batcher.disk.take_orders()
    simulator.move([order for order in orders if isinstance(order, ParkKv | FetchKv)])
    return batcher.disk.is_moving


def _chosen(total: int, count: int) -> list[int]:
    """`count` places of `total`: stretches from everywhere, for a file may be in order."""
    if count >= total:
        return list(range(total))
    stretches = -(-count // STRETCH)
    begins = [k * total // stretches for k in range(stretches)]
    places = [begin + i for begin in begins for i in range(min(STRETCH, total - begin))]
    return places[:count]


def _taken(one: JobRequest, longest: int | None) -> JobRequest | None:
    """As the engine does: what is too long is refused, and an answer ends where there is no more room."""
    if one.prompt + one.max_tokens <= 1 or (longest is not None and one.prompt >= longest):
        return None
    room = one.max_tokens if longest is None else min(one.max_tokens, longest - one.prompt)
    return replace(one, max_tokens=room, generated=min(one.generated, room))


def _result(batch: MicroBatch, lengths: dict[int, int]) -> Result:
    pieces = [piece for _, piece in batch.in_rows()]
    drawn = tuple(_drawn(piece.request, lengths) for piece in pieces if piece.completes)
    scores = sum(len(piece.scored.targets) for piece in pieces if piece.scored is not None)
    return Result(drawn, prompt_logprobs=(NO_SCORE,) * scores)


def _skip(batcher: Batcher, micro_batches: Sequence[MicroBatch], lengths: dict[int, int]) -> int:
    """Has all running sequences go some tokens on, where the passes that compute them would be alike; how many."""
    running = batcher.running.values()
    pieces = [piece for batch in micro_batches for piece in batch.pieces]
    if len(pieces) != len(running) or any(piece.num_rows > 1 or piece.prefill for piece in pieces):
        return 0
    if any(request.num_left != 1 for request in running):
        return 0
    count = min(MOST_SKIPPED, *(lengths[request.id] - request.num_generated - 1 for request in running))
    for request in running:
        request.tokens.extend([0] * max(0, count))
        request.stored += max(0, count)
    return max(0, count)


def _sequence(number: int, one: JobRequest, block_tokens: int) -> RunningRequest:
    """`block_tokens`: of blocks that prompts share; 0: they share none."""
    params = WireParams(
        max_tokens=one.max_tokens, min_tokens=0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_token_ids=(),
        ignore_eos=False, skip_special_tokens=True, prompt_logprobs=0 if one.scored else None,
    )  # fmt: skip
    kept = KeptLogprobs(0) if one.scored else None
    tokens = array("i", bytes(4 * one.prompt))
    keys: tuple[bytes, ...] = ()
    if block_tokens:
        places = [end // SHARED_TOKENS - 1 for end in _block_ends(len(one.shared), block_tokens)]
        copy = one.copy.to_bytes(8, "little")
        known = [one.shared[place] + (copy if place >= one.common else b"") for place in places]
        own = (f"{number} {block}".encode() for block in range(len(known), one.prompt // block_tokens))
        keys = (*known, *own)
    return RunningRequest(
        number, tokens, one.prompt, params, 0, frozenset((END,)), prompt_logprobs=kept, block_keys=keys
    )


def _block_ends(count: int, block_tokens: int) -> range:
    """Of the engine's blocks within `count` blocks of SHARED_TOKENS."""
    return range(block_tokens, count * SHARED_TOKENS + 1, block_tokens)


def _drawn(request: RunningRequest, lengths: dict[int, int]) -> int:
    return END if request.num_generated + 1 >= lengths[request.id] else 0
