"""`python -m flexgen_lite.dispatch`: the process in front of several engines.

Started by EngineProcess as a coordinator is, with the same order and the same events: see flexgen_lite/engine.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.config.problems import ConfigError
from flexgen_lite.dispatch.dispatcher import Dispatcher, Stopping
from flexgen_lite.engine.events import emit, read_order
from flexgen_lite.errors import EngineError
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.plan.workload import Workload
from flexgen_lite.wire.access import KeyFileError


def main() -> int:
    order = read_order(sys.stdin.fileno())
    run_dir = Path(order["run_dir"])
    try:
        config = EngineConfig.from_json(json.dumps(order["config"]))
        with Dispatcher(config, run_dir, Workload.from_dict(order.get("expected"))) as dispatcher:
            dispatcher.run()
    except Stopping:
        return 0
    except (ConfigError, KeyFileError, PlanError) as error:
        emit("failed", message=str(error), user_error=True, details="")
        return 2
    except EngineError as error:
        again = error.comes_again
        emit("failed", message=str(error), user_error=error.user_error, details=error.details, comes_again=again)
        return 2 if error.user_error else 1
    except Exception as error:  # the one crash boundary: report, then end
        details = "".join(traceback.format_exception(error))
        emit("failed", message=f"the dispatcher failed: {error!r}", user_error=False, details=details)
        return 1
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)  # its owner may be gone
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
