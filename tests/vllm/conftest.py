import sys
from pathlib import Path

# The tiny models and plain beam searches of the unit tests serve here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
