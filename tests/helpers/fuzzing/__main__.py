"""
Fuzz all models:

    python -m tests.helpers.fuzzing --cases 20000 --seed 0 --jobs 2
    python -m tests.helpers.fuzzing --head TupeModel --only 1234     # one case, by the seed that a test names

prints the number of cases by verdict and by head, and of each kind of failure one call that shows it. The exit code is
1 where there are failures.
"""

import argparse
import collections
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from .run import BAD, GOOD, check
from .snippets import as_code


class Finding(NamedTuple):
    """A verdict in a form that goes from process to process."""

    seed: int
    head: str
    verdict: str
    kind: tuple[str, str]
    detail: str
    changes: str
    code: str


def find(seeds: range, head: str | None = None) -> list[Finding]:
    """Judge the cases of some seeds, of one head or of all."""
    torch.set_num_threads(1)
    found = []
    for seed in seeds:
        verdict = check(seed, head)
        code = as_code(verdict.case) if verdict.name in BAD else ""
        case = verdict.case
        changes = ", ".join([case.mode, *case.changes])
        found.append(Finding(seed, case.subject.key.head, verdict.name, verdict.kind, verdict.detail, changes, code))
    return found


def find_all(seeds: range, jobs: int, head: str | None = None) -> list[Finding]:
    """Judge the cases of all seeds in several processes; one that dies is a crash of the first of its seeds."""
    if jobs == 1:
        return find(seeds, head)
    size = max(1, min(500, len(seeds) // jobs))
    chunks = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    found = []
    with ProcessPoolExecutor(jobs) as pool:
        waiting = {pool.submit(find, chunk, head): chunk for chunk in chunks}
        for future in as_completed(waiting):
            chunk = waiting[future]
            try:
                found += future.result()
            except BrokenProcessPool:
                name = f"seeds {chunk.start} to {chunk.stop - 1}"
                found.append(Finding(chunk.start, "?", "crash", ("crash", name), "the process died", "", ""))
    return found


def report(findings: list[Finding]) -> str:
    """Counts by verdict and by head, and one example of each kind of failure."""
    verdicts = [name for name in (*GOOD, *BAD) if any(finding.verdict == name for finding in findings)]
    counts = collections.Counter((finding.head, finding.verdict) for finding in findings)
    width = max(len(finding.head) for finding in findings)
    lines = [f"{'':{width}}  " + "  ".join(verdicts)]
    for head in [*sorted({finding.head for finding in findings}), "all"]:
        row = [counts[head, name] if head != "all" else sum(f.verdict == name for f in findings) for name in verdicts]
        lines.append(f"{head:{width}}  " + "  ".join(f"{n:{len(name)}}" for n, name in zip(row, verdicts, strict=True)))
    kinds = collections.defaultdict(list)
    for finding in findings:
        if finding.verdict in BAD:
            kinds[finding.kind].append(finding)
    lines.append(f"\n{len(kinds)} kinds of failure")
    for (verdict, kind), group in sorted(kinds.items(), key=lambda item: (BAD.index(item[0][0]), -len(item[1]))):
        shortest = min(group, key=lambda finding: (len(finding.code), finding.seed))
        heads = ", ".join(sorted({finding.head for finding in group}))
        lines += [f"\n## {verdict} ({len(group)} cases; {heads}): {kind}", f"seed {shortest.seed}: {shortest.changes}"]
        lines += [shortest.detail.splitlines()[0] if shortest.detail else "went through", shortest.code]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="number of calls")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first call; each has its own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument("--head", help="name of the one model class to fuzz; all by default")
    parser.add_argument("--only", type=int, metavar="SEED", help="judge the call of this seed alone")
    options = parser.parse_args()
    first, cases = (options.seed, options.cases) if options.only is None else (options.only, 1)
    findings = find_all(range(first, first + cases), options.jobs if cases > 1 else 1, options.head)
    print(report(findings))
    return int(any(finding.verdict in BAD for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
