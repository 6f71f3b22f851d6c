"""Makes the helper modules of this folder importable: tests are imported by path, not from `sys.path`."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parent))
