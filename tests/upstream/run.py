"""Runs transformers' own common tests on the models of this package and says what was skipped and why.

    python -m tests.upstream.run                      # every test, two processes
    python -m tests.upstream.run -n 1 -k sdpa -x      # any option of pytest

The tests come from the source distribution of the transformers that is installed; the first run downloads it.
"""

import os
import re
import sys
from collections import Counter, defaultdict

import pytest

import hf_efficient
from tests.upstream.fetch import ROOT, fetch


_CLASS_NAMES = re.compile(rf"(<class '[\w.]+\.)?\b({'|'.join(hf_efficient.__all__)})\b('>)?( class)?")


class Summary:
    """Counts tests by outcome from the reports of the workers, and groups what was skipped by its reason.

    A test may report many subtests, one for each model class: one that fails fails the test, and a test all of whose
    subtests were skipped counts as skipped.
    """

    def __init__(self) -> None:
        self.whole: defaultdict[str, set[str]] = defaultdict(set)
        self.parts: defaultdict[str, set[str]] = defaultdict(set)
        self.skips: defaultdict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report):
        is_subtest = hasattr(report, "context")
        if is_subtest or report.when == "call" or not report.passed:
            (self.parts if is_subtest else self.whole)[report.nodeid].add(report.outcome)
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = _CLASS_NAMES.sub("the model", reason.removeprefix("Skipped: "))
            self.skips[reason].add(report.nodeid.rpartition("::")[2])

    def outcome(self, test: str) -> str:
        whole, parts = self.whole[test], self.parts[test]
        if "failed" in whole | parts:
            return "failed"
        return "skipped" if "skipped" in whole or parts == {"skipped"} else "passed"

    def render(self, release: str) -> str:
        outcomes = Counter(self.outcome(test) for test in {*self.whole, *self.parts})
        counts = ", ".join(f"{outcomes[name]} {name}" for name in ("passed", "failed", "skipped"))
        lines = [f"\ntransformers {release}: {counts}", "Not run, by reason:"]
        for reason, tests in sorted(self.skips.items(), key=lambda pair: (-len(pair[1]), pair[0])):
            lines.append(f"  {reason}")
            lines.extend(f"      {test}" for test in sorted(tests))
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
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests/upstream").glob("test_*_common.py"))]
    options = [*files, "-n", "2", "-q", "--no-header", "-p", "no:cacheprovider"]
    options += ["-o", "verbosity_subtests=0"]  # there are thousands
    code = pytest.main([*options, *arguments], plugins=[summary])
    print(summary.render(folder.name.removeprefix("transformers-")))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
