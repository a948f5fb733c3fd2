"""How a worker is started: what it is given, and the fresh interpreter that is given it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexgen_lite.wire.zygote_messages import with_descriptors


@dataclass(frozen=True, slots=True)
class Launch:
    """`options` with their descriptors, which the process inherits: (option, what stands before the number, number).
    `output` becomes its standard output and error."""

    kind: str
    arguments: tuple[str, ...]
    options: tuple[tuple[str, str, int], ...]
    output: int

    @property
    def names(self) -> tuple[tuple[str, str], ...]:
        return tuple((option, name) for option, name, _ in self.options)

    @property
    def descriptors(self) -> list[int]:
        return [number for *_, number in self.options]


class FreshProcess(subprocess.Popen[bytes]):
    """`zygote`: where one that the process leaves behind takes orders."""

    def __init__(self, launch: Launch, environment: Mapping[str, str], zygote: int | None = None) -> None:
        if zygote is not None:
            launch = replace(launch, options=(*launch.options, ("--zygote", "", zygote)))
        super().__init__(
            [
                *(sys.executable, "-m", "flexgen_lite.workers", launch.kind),
                *with_descriptors(launch.arguments, launch.names, launch.descriptors),
            ],
            stdin=subprocess.DEVNULL,
            stdout=launch.output,
            stderr=launch.output,
            pass_fds=launch.descriptors,
            env={**os.environ, **environment},
        )
        self.pidfd = os.pidfd_open(self.pid)
