"""Runs transformers' own common tests on the models of this package and says what was skipped and why.

    python tests/upstream/run.py                      # every test, two processes
    python tests/upstream/run.py -n 1 -k sdpa -x      # any option of pytest

The tests come from the source distribution of the transformers that is installed; the first run downloads it.
"""

import os
import sys
from collections import Counter, defaultdict

import pytest
from fetch import ROOT, fetch


class Summary:
    """Counts the outcomes that the workers report, and groups the skips by their reason."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.skips: defaultdict[str, list[str]] = defaultdict(list)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skips[reason.removeprefix("Skipped: ")].append(report.nodeid.rpartition("::")[2])

    def render(self, release: str) -> str:
        lines = [f"transformers {release}: {self.outcomes['passed']} passed, {self.outcomes['failed']} failed, "
                 f"{self.outcomes['skipped']} skipped", ""]
        for reason, tests in sorted(self.skips.items(), key=lambda pair: (-len(pair[1]), pair[0])):
            names = sorted(set(tests))
            shown = ", ".join(names[:3]) + (f", and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"{len(tests):4d} skipped: {reason}\n     {shown}")
        return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        return 0
    try:
        folder = fetch()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    os.environ["HF_EFFICIENT_UPSTREAM"] = str(folder)
    os.chdir(ROOT)
    summary = Summary()
    options = ["tests/upstream/test_tupe_common.py", "-n", "2", "-q", "--no-header", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *arguments], plugins=[summary])
    print(summary.render(folder.name.removeprefix("transformers-")))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
