"""What is known of a model on a machine before it runs there: its description, and how fast its passes go."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from flexgen_lite import __version__
from flexgen_lite.cost.rates import Rates
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.need import Measured
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.codec import Codec, MessageError

FORMAT = 3


class CalibrationError(ValueError):
    """A file that holds no calibration that is of use."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """
    Attributes:
        processes: what they take at the start.
        machine: that this was measured on.
        tokenizer: the model's tokenizer.json, "": it has none.
        settings: keys of the configuration that decide what is measured.
    """

    opened: worker_messages.ModelOpened
    processes: Measured
    machine: Machine
    rates: Rates
    tokenizer: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON; the model's description is MessagePack within."""
        opened = Codec(worker_messages.FromCompute).encode(self.opened)
        return {
            "format": FORMAT,
            "version": __version__,
            "machine": asdict(self.machine),
            "processes": asdict(self.processes),
            "rates": self.rates.to_dict(),
            "tokenizer": self.tokenizer,
            "settings": dict(self.settings),
            "opened": base64.b64encode(opened).decode(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises CalibrationError."""
        try:
            if values["format"] != FORMAT or values["version"] != __version__:
                raise CalibrationError(f"it is of version {values['version']}, this is {__version__}: calibrate again")
            opened = Codec(worker_messages.FromCompute).decode(base64.b64decode(values["opened"]))
            if not isinstance(opened, worker_messages.ModelOpened):
                raise CalibrationError("it describes no model")
            machine = {**values["machine"], "cpus": tuple(values["machine"]["cpus"])}
            return cls(
                opened,
                Measured(**values["processes"]),
                Machine(**machine),
                Rates.from_dict(values["rates"]),
                str(values["tokenizer"]),
                dict(values["settings"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, MessageError) as error:
            if isinstance(error, CalibrationError):
                raise
            raise CalibrationError(f"it is no calibration of flexgen-lite ({error!r})") from error
