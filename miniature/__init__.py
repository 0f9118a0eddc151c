"""The embedded model: its weights (`model/`) and the scenes that it draws (`scenes.py`)."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""The checkpoint, in diffusers' layout."""
