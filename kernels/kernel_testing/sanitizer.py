"""Runs of a program under NVIDIA's compute-sanitizer."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass


# memcheck finds accesses outside of allocations, initcheck reads of what was never written. racecheck is left out: it
# looks at shared memory alone, which no kernel here uses.
PROGRAMS = ("memcheck", "initcheck")
ERROR_CODE = 9
# An error as compute-sanitizer says it: a line, and indented ones that say where.
REPORT = re.compile(r"^=+ \S.*(?:\n=+ {2,}.*)+", re.MULTILINE)


@dataclass(frozen=True)
class SanitizerResult:
    """Outcome of one run: "clean", "errors", "failed" (the program ended otherwise) or "missing" (no such tool)."""

    status: str
    said: str


def find_sanitizer() -> str | None:
    """compute-sanitizer of PATH, else of CUDA_HOME, else of /usr/local/cuda."""
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    candidates = ["compute-sanitizer", *(f"{place}/bin/compute-sanitizer" for place in places if place)]
    return next((found for candidate in candidates if (found := shutil.which(candidate))), None)


def run_sanitizer(program: str, command: list[str], timeout: float | None = None) -> SanitizerResult:
    """
    Run `command` under one of compute-sanitizer's programs; every tensor in it has memory of its own.

    Args:
        program (`str`): such as `"memcheck"`.
        command (`list[str]`): what to run.
        timeout (`float`, *optional*): seconds after which the run is ended and counts as failed.
    """
    tool = find_sanitizer()
    if tool is None:
        return SanitizerResult("missing", "compute-sanitizer is not installed")
    whole = [tool, "--tool", program, "--error-exitcode", str(ERROR_CODE), *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            whole, env=environment, timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except subprocess.TimeoutExpired:
        return SanitizerResult("failed", f"{program} did not end within {timeout:.0f} seconds")
    return judge(program, done.returncode, done.stdout)


def judge(program: str, code: int, output: str) -> SanitizerResult:
    """Judge a run by its exit code and output."""
    summary = [line for line in output.splitlines() if "SUMMARY" in line]
    errors, allowed = REPORT.findall(output), {0}
    if program == "initcheck":
        # CUB, which torch uses, reads such memory on purpose; what we leave unwritten others of torch's kernels read.
        errors = [error for error in errors if not re.search(r"\b(cub|thrust)::", error)]
        allowed.add(ERROR_CODE)
    if errors:
        return SanitizerResult("errors", "\n".join(errors[:10]))
    if code not in allowed or not summary:
        return SanitizerResult("failed", f"{program} ended with exit code {code}:\n{output[-6000:]}")
    return SanitizerResult("clean", summary[-1].strip("= "))
