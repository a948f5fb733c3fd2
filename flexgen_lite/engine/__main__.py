"""`python -m flexgen_lite.engine`: the coordinator's process.

Started by EngineProcess: one JSON line on standard input (`config`, `run_dir`, `expected`, ...), then the pipe is held
open and its end is this process's end. What happens is told on standard output (events.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.config.problems import ConfigError
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.engine.calibrator import Calibrator
from flexgen_lite.engine.coordinator import Coordinator, Stopping
from flexgen_lite.engine.events import emit, read_order
from flexgen_lite.engine.worker_process import WorkerDied
from flexgen_lite.engine.worker_supervisor import FINAL
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.plan.workload import Workload
from flexgen_lite.wire.access import KeyFileError
from flexgen_lite.wire.engine_share import EngineShare

PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    if sys.platform == "linux":  # a zygote whose parent is lost stays in this process's tree
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    order = read_order(sys.stdin.fileno())
    run_dir = Path(order["run_dir"])
    try:
        share = None if order.get("share") is None else EngineShare.from_dict(order["share"])
        if share is not None and share.cpus:
            os.sched_setaffinity(0, share.cpus)  # before anything is started, which inherits it
        config = EngineConfig.from_json(json.dumps(order["config"]))
        if order.get("calibrate"):
            with Calibrator(config, run_dir) as calibrator:
                emit("calibrated", **calibrator.run().to_dict())
            return 0
        expected = Workload.from_dict(order.get("expected"))
        predicted = Prediction.from_dict(order.get("predicted"))
        with Coordinator(config, run_dir, expected, predicted, share) as coordinator:
            coordinator.run()
    except Stopping:
        return 0
    except (ConfigError, KeyFileError, PlanError) as error:
        emit("failed", message=str(error), user_error=True, details="")
        return 2
    except WorkerDied as error:
        comes_again = error.kind in FINAL
        emit("failed", message=str(error), user_error=error.user_error, details=error.details, comes_again=comes_again)
        return 2 if error.user_error else 1
    except Exception as error:  # the one crash boundary: report, then end
        details = "".join(traceback.format_exception(error))
        emit("failed", message=f"the coordinator failed: {error!r}", user_error=False, details=details)
        return 1
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)  # its owner may be gone
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
