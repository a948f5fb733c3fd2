"""What Ray Data makes one of in each actor: an engine, and batches of rows that go through it together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import pyarrow as pa

from flexgen_lite.client.completion import Completion
from flexgen_lite.client.request import Request
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.errors import EngineError
from flexgen_lite.llm import FlexGenLite
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.ray.answers import answers
from flexgen_lite.ray.claimed_cpus import ClaimedCpus
from flexgen_lite.ray.config import FlexGenLiteProcessorConfig
from flexgen_lite.ray.own_process import at_normal_priority, bind_process
from flexgen_lite.ray.results import Outcome, error_of, with_results
from flexgen_lite.ray.row_seed import RowSeeds
from flexgen_lite.ray.rows import ASKED, ERROR, READ, RowReader, error_in, unpack
from flexgen_lite.ray.shares import Share

MOST_STARTS = 3  # of an engine, before the first that is there
FREE_RAM = 0.85  # of what is free at the start, as an engine takes by itself

_LOOKED_AT = (*READ, ASKED, ERROR)

_log = logging.getLogger("flexgen_lite")


class FlexGenLiteEngine:
    """Called with many batches at once: the rows of all of them are in the queue of one engine.

    An engine that is lost is started again, and what was open is submitted again (EngineSupervisor). One that is given
    up ends this process: Ray starts the actor again and gives it the same batches.

    Args:
        config: of the processor.
        share: of the machine.
        template_kwargs: further variables of the chat template.
        keeps_asked: what was asked is wanted by who comes after.

    Raises:
        EngineError: the engine did not start.
    """

    def __init__(
        self,
        config: FlexGenLiteProcessorConfig,
        share: Share,
        template_kwargs: Mapping[str, Any],
        keeps_asked: bool,
    ) -> None:
        self._keeps_asked = keeps_asked
        self._continues = config.should_continue_on_error
        self._claim = _claim(share)
        at_normal_priority()  # where that is not allowed, `RAY_worker_niceness=0` is Ray's own setting
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray's, of a worker that computes itself; the engine has its own
        free = inspect_machine().available_ram * FREE_RAM
        ram = {} if share.ram is None else {"ram": int(min(share.ram, free))}
        self._model = _started(config.engine_config(**ram))
        self._client = self._model.connect()
        self._reader = RowReader(
            self._client.request_of, config.apply_chat_template, config.chat_template, template_kwargs
        )

    async def __call__(self, table: pa.Table) -> pa.Table:
        """The rows of the table, each with what came of it.

        Raises:
            ValueError: a row failed, and that is to end the job.
        """
        requests, outcomes = self._requests(table)
        try:
            for place, completion in zip(requests, await self._answers(list(requests.values())), strict=True):
                outcomes[place] = completion
        except EngineError as error:
            if error.comes_again:  # for any engine of this model
                raise
            _leave(error)
        self._check(table, outcomes)
        if ASKED in table.column_names and not self._keeps_asked:
            table = table.drop_columns([ASKED])
        return with_results(table, outcomes)

    async def _answers(self, requests: list[Request]) -> list[Completion]:
        return await answers(self._client, requests) if requests else []

    def _requests(self, table: pa.Table) -> tuple[dict[int, Request], list[Outcome]]:
        """By the number of the row; of the others, why there is none."""
        rows = _with_asked(table.select([name for name in _LOOKED_AT if name in table.column_names]))
        seed_of = _seeds(table)
        requests: dict[int, Request] = {}
        outcomes: list[Outcome] = [""] * len(rows)
        for number, row in enumerate(rows):
            if error := error_in(row):  # its preparation has failed, or what came before that
                outcomes[number] = error
                continue
            try:
                requests[number] = self._reader.request(row, partial(seed_of, number))
            except Exception as error:  # of any kind: it is this row's alone
                outcomes[number] = f"{type(error).__name__}: {error}"
        return requests, outcomes

    def _check(self, table: pa.Table, outcomes: list[Outcome]) -> None:
        if self._continues:
            return
        for number, outcome in enumerate(outcomes):
            if why := error_of(outcome):
                raise ValueError(
                    f"row {number} of a batch of {table.num_rows} failed: {why}; with should_continue_on_error=True it "
                    f"comes back with {ERROR}, and the others with their answers"
                )


def _started(config: EngineConfig) -> FlexGenLite:
    """An actor that does not start ends the job: an engine that is lost on its way is started again before."""
    for _ in range(MOST_STARTS - 1):
        try:
            return FlexGenLite(config.model, config=config)
        except EngineError as error:
            if error.comes_again:
                raise
            _log.warning("warning: the engine did not start, and is started again: %s", error)
    return FlexGenLite(config.model, config=config)


def _seeds(table: pa.Table) -> Callable[[int], int]:
    """The seed of each row. Those of all rows are made as soon as one is wanted: equal rows are told apart by what
    comes before them."""
    found: list[int] = []

    def seed_of(number: int) -> int:
        if not found:
            seeds = RowSeeds()
            found.extend(seeds.seed(row) for row in _with_asked(table))
        return found[number]

    return seed_of


def _with_asked(table: pa.Table) -> list[dict[str, Any]]:
    return [{**row, **unpack(row.pop(ASKED, None))} for row in table.to_pylist()]


def _claim(share: Share) -> ClaimedCpus | None:
    """The processors of this actor, where it has not all of the machine; its engine is bound to them."""
    available = inspect_machine().cpus
    wanted = share.num_cpus(len(available))
    if wanted == len(available):
        return None
    claim = ClaimedCpus(wanted, available)
    if claim.cpus:
        bind_process(claim.cpus)
    else:
        _log.warning("warning: other actors have all processors of this machine: this one shares them; give num_cpus")
    return claim


def _leave(error: EngineError) -> NoReturn:
    """End the process: to raise would give the same batches to this actor again, which has no engine any more."""
    _log.error("the engine is given up, and this actor with it: %s", error)
    logging.shutdown()
    os._exit(1)
