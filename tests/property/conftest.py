"""Lets the tests of this folder import each other, and the model and the rig that the engine's unit tests share."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit")]
