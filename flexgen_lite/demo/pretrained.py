"""The model of the demonstration, as it comes along."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
