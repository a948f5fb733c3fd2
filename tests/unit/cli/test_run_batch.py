"""What `run-batch` does with settings that were found."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from flexgen_lite.cli import run_batch
from flexgen_lite.cli.console import Console
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.errors import EngineError


class Told(Console):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize(
    ("user_error", "sequences"),
    [(True, [384, None]), (False, [384])],
)
def test_settings_that_do_not_fit_after_all_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_error: bool, sequences: list[int | None]
) -> None:
    tried: list[int | None] = []

    def start(config: EngineConfig, predicted: object, **_: object) -> str:
        tried.append(config.max_sequences)
        assert (predicted is None) == (config.max_sequences is None)
        if config.max_sequences:
            raise EngineError("ram=1 GiB is too little", user_error=user_error)
        return "an engine"

    monkeypatch.setattr(run_batch, "EngineSupervisor", start)
    (tmp_path / "in.jsonl").write_text("")
    console = Told()
    found = SimpleNamespace(policy=SimpleNamespace(settings={"max_sequences": 384}), predicted="something")
    arguments = (EngineConfig(model=str(tmp_path)), found, tmp_path / "in.jsonl", console)
    if user_error:
        assert run_batch._engine(*arguments) == ("an engine", None)  # type: ignore[arg-type]
        (line,) = console.lines
        assert line.startswith("warning: ram=1 GiB is too little; once more without the settings")
    else:
        with pytest.raises(EngineError):
            run_batch._engine(*arguments)  # type: ignore[arg-type]
    assert tried == sequences
