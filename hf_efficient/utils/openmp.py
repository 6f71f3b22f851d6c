"""Setting of how OpenMP's threads wait for work, for programs that import this module before torch.

By itself OpenMP lets a thread that has nothing to do spin for a while. On a machine of its own that saves a few
percent; where another program wants the processor, the spinning takes it from threads that have work, on all sides.
torch's OpenMP reads the settings once, when torch is loaded. Settings of the user's own stay, and where torch is loaded
already nothing is done. Programs that use the package as a library do not import this module.
"""

import os
import sys


# The second is of GNU's OpenMP, which comes with torch on Linux and would go on spinning for a while without it.
SETTINGS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"}

if "torch" not in sys.modules and not SETTINGS.keys() & os.environ.keys():
    os.environ.update(SETTINGS)
