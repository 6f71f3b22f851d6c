"""What glibc's malloc does with memory that is freed, which a train step on a CPU asks for again at once."""

import ctypes


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> bool:
    """
    Let this process keep what it frees, for the next step.

    By itself glibc gives large blocks back to the system, which hands them out again page by page, each filled with
    zeros: a tenth of a train step's time and more, by luck. The process then stays as large as it ever was. Call it
    once, at the start.

    Returns:
        `bool`: False where there is no glibc, and nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    most = 2**31 - 1
    return mallopt(_TRIM_THRESHOLD, most) == mallopt(_MMAP_THRESHOLD, most) == 1
