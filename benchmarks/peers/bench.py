"""Runs a cell: every system in turn, round after round, so that a drift of the machine meets all alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.peers.cell import Cell, Lane
from benchmarks.peers.environments import python_of
from benchmarks.peers.job import Job, Options
from benchmarks.peers.models import model_path
from benchmarks.peers.systems import SYSTEMS, System
from benchmarks.peers.trial import Outcome, Trial
from benchmarks.peers.tuning import Tuning, best
from benchmarks.peers.workloads import prompts


@dataclasses.dataclass
class Bench:
    cache: Path
    repeats: int
    timeout: float  # seconds of one run, loading included
    tune_again: bool
    given_options: Mapping[str, list[Options]]  # per system, instead of its own
    make_reference: bool  # run Transformers once for its tokens where it is not measured
    keys: Mapping[str, str]  # per system: its versions and the processor

    def run(self, cell: Cell, on_round: Callable[[], None]) -> None:
        print(f"\n{cell.title}", flush=True)
        for lane in cell.lanes.values():
            self._prepare(cell, lane)
        for lane in cell.lanes.values():
            if not lane.refusal:
                self._tune(cell, lane)
        for number in range(self.repeats):
            for lane in cell.lanes.values():
                if lane.options is not None and not lane.hopeless:
                    label = f"round {number + 1}/{self.repeats}"
                    lane.rounds.append(self._run(cell, lane.system, lane.options, cell.memory_bytes, label))
            on_round()
        cell.reference = self._reference(cell)
        on_round()

    def _prepare(self, cell: Cell, lane: Lane) -> None:
        lane.refusal = lane.system.refusal(cell.workload, cell.shape) or ""
        if not lane.refusal:
            try:
                python_of(lane.system.environment, self.cache)
                model_path(cell.shape.name, lane.system.model_format, self.cache)
            except RuntimeError as error:
                lane.refusal = str(error)
        if lane.refusal:
            print(f"{lane.system.name}: {lane.refusal}", flush=True)

    def _tune(self, cell: Cell, lane: Lane) -> None:
        name = lane.system.name
        choices = self.given_options.get(name) or lane.system.options(cell.workload, cell.shape)
        if len(choices) == 1:
            lane.options = choices[0]
            return
        tuning, key = Tuning(self.cache), f"{name} | {cell.title} | {self.keys[name]}"
        for options in choices:
            outcome = None if self.tune_again else tuning.known(key, options)
            if outcome is None:
                outcome = self._run(cell, lane.system, options, cell.memory_bytes, "try")
                tuning.add(key, outcome)
            lane.tries.append(outcome)
        lane.options = best(lane.tries)

    def _run(self, cell: Cell, system: System, options: Options, memory_bytes: int, label: str) -> Outcome:
        print(f"{label:12} {system.name} {options} ...", flush=True)
        model = model_path(cell.shape.name, system.model_format, self.cache)
        command = [str(python_of(system.environment, self.cache)), "-m", f"benchmarks.peers.{system.script}"]
        token_ids = prompts(cell.workload, cell.shape.vocab_size)
        job = Job(str(model), token_ids, cell.workload.max_tokens, options, memory_bytes)
        log = self.cache / "logs" / f"{cell.shape.name}-{cell.workload.name}-{system.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        outcome = Trial(system.name, command, job, self.timeout, log).run()
        print(f"{'':12} {outcome}", flush=True)
        return outcome

    def _reference(self, cell: Cell) -> list[list[int]] | None:
        """Transformers' tokens: measured now, kept from an earlier run, or made for this."""
        w, lane = cell.workload, cell.lanes.get("transformers")
        name = f"{cell.shape.name}-{w.num_prompts}x{w.shortest}-{w.longest}+{w.max_tokens}.json"
        file = self.cache / "reference" / name
        tokens: list[list[int]] | None = None
        if lane and lane.finished:
            tokens = lane.finished[0].tokens
        elif file.exists():
            tokens = json.loads(file.read_text(encoding="utf-8"))
        elif self.make_reference:
            system = SYSTEMS["transformers"]
            outcome = self._run(cell, system, system.options(w, cell.shape)[0], 0, "reference")
            tokens = outcome.tokens if outcome.seconds is not None else None
        if tokens is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(tokens), encoding="utf-8")
        return tokens
