"""A job's time: its requests through the batching of the engine, pass by pass, each as long as the simulator says. Pure
logic.

Of a job with many requests some are followed, and the rest is taken to go on at the rate that they had in the middle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_lite.cost.simulator import Simulator
from flexgen_lite.queue.batching import Batcher, Result
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.waiting_queue import WaitingQueue
from flexgen_lite.wire.sampling import WireParams

FOLLOWED_ROUNDS = 5  # requests that are followed, in numbers of those that run at once
LEAST_FOLLOWED = 400
END = 1  # the token that ends a sequence here
DONE_PARTS = 20


@dataclass(frozen=True, slots=True)
class JobRequest:
    """Tokens of its prompt, of its answer as it is expected, and those that it may have at most."""

    prompt: int
    generated: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class JobTime:
    """
    Attributes:
        load: seconds until the weights that stay are there, and the first of the others.
        seconds: from then on.
        passes: of those that were followed.
        busy: share of the time in which each lane works.
        prompt_tokens, generated_tokens: of all requests.
        requests, followed: all, and those that were followed.
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
    pass_seconds: tuple[float, ...] = ()
    done_at: tuple[float, ...] = ()


def predict(batcher: Batcher, simulator: Simulator, requests: Sequence[JobRequest], at_once: int) -> JobTime:
    """
    Args:
        requests: all of the job, in their order.
        at_once: that run at once, at most.
    """
    followed = requests[: max(LEAST_FOLLOWED, FOLLOWED_ROUNDS * at_once)]
    waiting = WaitingQueue()
    lengths = {}
    for number, one in enumerate(followed):
        lengths[number] = one.generated
        waiting.add(_sequence(number, one))
    load = simulator.load_all()
    seconds, busy, each, ends = 0.0, Counter[str](), list[float](), list[float]()
    while micro_batches := batcher.compose(waiting):
        taken = simulator.run(micro_batches)
        seconds += taken.seconds
        each.append(taken.seconds)
        busy.update(taken.busy)
        results = [
            Result(tuple(_drawn(piece.request, lengths) for _, piece in batch.in_rows() if piece.completes))
            for batch in micro_batches
        ]
        ends += [seconds] * len(batcher.commit(micro_batches, results))
    shares = {lane: time / seconds for lane, time in busy.items() if seconds > 0}
    rest = len(requests) - len(followed)
    if rest:
        begin, end = len(ends) * 3 // 10, len(ends) * 8 // 10
        seconds += rest * (ends[end] - ends[begin]) / max(1, end - begin)
    first = ends[0] if ends else 0.0
    twentieths = range(DONE_PARTS + 1)
    if rest or not ends:
        done_at = tuple(first + (seconds - first) * part / DONE_PARTS for part in twentieths)
    else:
        done_at = tuple(ends[max(0, -(-len(ends) * part // DONE_PARTS) - 1)] for part in twentieths)
    return JobTime(
        load, seconds, len(each), shares, sum(one.prompt for one in requests), sum(one.generated for one in requests),
        len(requests), len(followed), tuple(each), done_at,
    )  # fmt: skip


def _sequence(number: int, one: JobRequest) -> RunningRequest:
    params = WireParams(
        max_tokens=one.max_tokens, min_tokens=0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_token_ids=(),
        ignore_eos=False, skip_special_tokens=True,
    )  # fmt: skip
    return RunningRequest(number, [0] * one.prompt, one.prompt, params, 0, frozenset((END,)))


def _drawn(request: RunningRequest, lengths: dict[int, int]) -> int:
    return END if request.num_generated + 1 >= lengths[request.id] else 0
