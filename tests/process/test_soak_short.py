"""A few rounds of the soak on engines whose workers are broken at random."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests import soak


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "count", "seed"), [("opt", 150, 5), ("zamba2", 80, 56)])
def test_a_few_rounds(family: str, count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PROMPTS", soak.PROMPTS[:count])
    with tempfile.TemporaryDirectory(prefix="fgs-") as folder:
        (Path(folder) / "r").mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{folder}/r")
        under_fire = soak.Soak(Path(folder), seed=seed, shots=False, family=family)
        under_fire.engine_round(-1)
        for number in range(2):
            under_fire.round(number)
        assert under_fire.counts["rows compared"] == 3 * count
        assert under_fire.counts["faults inside workers"] >= 3
