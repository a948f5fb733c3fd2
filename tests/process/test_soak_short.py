"""A few rounds of the soak on engines whose workers are broken at random."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests import soak


@pytest.mark.timeout(600)
def test_a_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PROMPTS", soak.PROMPTS[:150])
    with tempfile.TemporaryDirectory(prefix="fgs-") as folder:
        (Path(folder) / "r").mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{folder}/r")
        under_fire = soak.Soak(Path(folder), seed=5, shots=False)
        under_fire.engine_round(-1)
        for number in range(2):
            under_fire.round(number)
        assert under_fire.counts["rows compared"] == 3 * 150
        assert under_fire.counts["faults inside workers"] >= 3
