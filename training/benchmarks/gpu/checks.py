"""Parts of the GPU agenda that ask whether the compiled kernels are right: examples, tests, parity, capture, memory.

`python -m training.benchmarks.gpu.checks PROGRAM` runs what compute-sanitizer and ncu look at.
"""

import argparse
import csv
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_efficient
from hf_efficient.ops import sru
from hf_efficient.ops.backend import last_backend, use_backend
from hf_efficient.ops.kernel_loader import find_variant, load_kernel
from hf_efficient.ops.sru import sru_recurrence
from training.benchmarks.environment import ROOT, cuda_kernels
from training.benchmarks.gpu import sparse_ff
from training.benchmarks.gpu import sru_recurrence_parity as parity
from training.benchmarks.gpu.context import MissingPrerequisiteError, PartContext, find_tool, load_from_kernels
from training.benchmarks.gpu.speed import Call


sanitizer = load_from_kernels("kernel_testing/sanitizer.py")

TOOLS = ("nvcc", "ncu", "compute-sanitizer", "cuobjdump")
PACKAGES = ("torch", "triton", "transformers", "pytest", "hypothesis", "scipy", "scikit-learn", "peft", "kernels")
# What compute-sanitizer and ncu say where the machine lets neither near the device.
REFUSALS = ("Device not supported", "Failed to initialize the profiler", "ERR_NVGPUCTRPERM", "LibraryNotLoaded")
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy")
METRICS = (
    "Duration", "DRAM Throughput", "Memory Throughput", "Compute (SM) Throughput", "Registers Per Thread",
    "Achieved Occupancy", "Theoretical Occupancy", "Local Memory Spilling Requests", "Grid Size", "Block Size",
)  # fmt: skip


def run_logged(context: PartContext, command: list[str], name: str) -> tuple[int, str]:
    """Run a program from the repository's root; its exit code and output, which goes to the log as well."""
    path = context.scratch / f"{name}.txt"
    with path.open("w") as file:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    output = path.read_text(errors="replace")
    print(output, file=sys.stderr, flush=True)
    return code, output


def load_kernels(context: PartContext) -> dict[str, Any]:
    """Load every kernel for GPUs, built here if it was not carried along and there is nvcc, and run its example."""
    found = {
        "tools": {name: find_tool(name) for name in TOOLS},
        "versions": {name: _version(name) for name in PACKAGES},
        "public_names": len([getattr(hf_efficient, name) for name in hf_efficient.__all__]),
    }
    if smi := find_tool("nvidia-smi"):
        query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        found["card"] = run_logged(context, [smi, query, "--format=csv"], "card")[1].splitlines()
    context.save(found)
    backend, loaded = context.device.type, {}
    for name in cuda_kernels():
        if find_variant(name, backend) is None and not context.rehearsal:
            _build(context, name)
        variant = find_variant(name, backend)
        if variant is None:
            raise MissingPrerequisiteError(f"{name} is not built for {backend}, and cannot be built here")
        kernel = load_kernel(name, backend)
        runpy.run_path(str(ROOT / "kernels" / name / "example.py"))["run"](kernel, context.device)
        loaded[name] = variant.name
        context.say(f"{name}: its example ran on {context.device}")
        if changed := changed_sources(variant):
            raise RuntimeError(f"{name}: its example is right, but it was built before {', '.join(changed)} changed")
    return {"line": f"{', '.join(loaded)}: loaded, example right", "variants": loaded, **found}


def changed_sources(variant: Path) -> list[str]:
    """Sources that differ from those that a variant was built from: what it shows would be shown of other code."""
    recorded = json.loads((variant / "build_record.json").read_text())["library"]["files"]
    places = (variant.parents[1], ROOT / "kernels" / "include")

    def digest(name: str) -> str | None:
        found = (place / name for place in places if (place / name).is_file())
        return next((hashlib.sha1(path.read_bytes()).hexdigest() for path in found), None)

    return [name for name, old in recorded.items() if digest(name) != old]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _build(context: PartContext, name: str) -> None:
    if find_tool("nvcc") is None:
        raise MissingPrerequisiteError(f"{name} was not carried along, and there is no nvcc to build it")
    context.say(f"{name}: not carried along; nvcc compiles it")
    command = [sys.executable, "kernels/build.py", name, "--backend", "cuda", "--jobs", str(os.cpu_count())]
    code, output = run_logged(context, command, "build")
    if code != 0:
        raise RuntimeError(f"kernels/build.py ended with exit code {code}: {output[-500:]}")


def run_pytest(context: PartContext, *arguments: str) -> dict[str, Any]:
    """
    Run pytest.

    Raises:
        RuntimeError: if a test fails, or there is none; names those that do.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]
    code, output = run_logged(context, command, "pytest")
    lines = output.strip().splitlines() or [""]
    if code != 0:
        wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise RuntimeError("; ".join([f"pytest ended with exit code {code}: {lines[-1]}", *wrong[:20]]))
    return {"line": lines[-1]}


def run_kernel_tests(context: PartContext) -> dict[str, Any]:
    """The short suites in the kernels' own folders, each alone; in a rehearsal a few tests of each."""
    few = context.choose((), ("-k", "equals_a_plain_loop or last_state or not_read"))
    found = {}
    for name in cuda_kernels():
        found[name] = run_pytest(context, f"kernels/{name}/tests", *few)["line"]
        context.say(f"{name}: {found[name]}")
    return {"line": "; ".join(f"{name}: {line}" for name, line in found.items()), "suites": found}


def run_gpu_tests(context: PartContext) -> dict[str, Any]:
    """The tests that are marked `gpu`. Only files that have some are read: others need packages that may be missing."""
    paths = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    files = [str(path.relative_to(ROOT)) for path in paths]
    context.needs_gpu("the tests themselves, which are only collected")
    found = run_pytest(context, *context.choose([], ["--collect-only"]), "-m", "gpu", *files)
    return {**found, "files": files}


def compare_all(context: PartContext, cases: Iterable[parity.Case], size: int = 200) -> dict[str, Any]:
    """
    Compare cases with plain torch on the same device, and keep what was found after every `size`.

    Raises:
        parity.ParityError: if some differ; names the first few and says how many.
    """
    compared, worst, failures = 0, dict[str, float](), list[str]()
    rest = iter(cases)
    while batch := list(itertools.islice(rest, size)):
        found = parity.check_parity(batch, context.device)
        compared, failures = compared + found["compared"], failures + found["failures"]
        for key, error in found["largest_error_of_the_allowed"].items():
            worst[key] = max(worst.get(key, 0.0), error)
        line = f"{compared} cases, {len(failures)} wrong; largest error {max(worst.values(), default=0):.2f} of allowed"
        result = {"line": line, "compared": compared, "largest_error_of_the_allowed": worst, "failures": failures[:50]}
        context.save(result)
        context.say(line)
    if failures:
        shown = "\n".join(failures[:20])
        raise parity.ParityError(f"{len(failures)} of {compared} cases failed:\n{shown}")
    return result


def check_smoke(context: PartContext) -> dict[str, Any]:
    """The shortest run that says whether all is well: no flags, vectors of 1 to 8 units, and the last state alone."""
    return compare_all(context, parity.smoke_cases(context.device))


def full_cases(context: PartContext) -> Iterator[parity.Case]:
    """Every kernel, odd and large shapes; in a rehearsal one of every hundred, and odd shapes alone."""
    yield from itertools.islice(parity.kernel_cases(context.device), 0, None, context.choose(1, 101))
    yield from parity.shape_cases(context.choose([*parity.ODD_SHAPES, *parity.LARGE_SHAPES], parity.ODD_SHAPES[:2]))


def check_full(context: PartContext) -> dict[str, Any]:
    """Parity of every kernel that a call can reach, and the same bits each time."""
    found = compare_all(context, full_cases(context))
    runs = check_repeated(context.device)
    return {**found, "line": f"{found['line']}; same bits in {runs} runs", "repeated": runs}


def check_repeated(device: torch.device, repeats: int = 3) -> int:
    """
    Gradients of one call, several times.

    Raises:
        parity.ParityError: if they are not the same to the bit.
    """
    inputs: dict[str, Any] = parity.random_inputs(parity.Case("float32", (64, 40, 512)), device)
    leaves = [values for values in inputs.values() if values.requires_grad]
    with use_backend(device.type):
        runs = [torch.autograd.grad(sru_recurrence(**inputs)[0].sum(), leaves) for _ in range(repeats)]
    for again in runs[1:]:
        if not all(torch.equal(one, other) for one, other in zip(runs[0], again, strict=True)):
            raise parity.ParityError("gradients differ from run to run")
    return repeats


class Step:
    """Forward and backward of the public op on fixed tensors, which a graph can replay."""

    def __init__(self, device: torch.device, shape: tuple[int, int, int] = (4, 33, 96)):
        case = parity.Case("float32", shape)
        self.inputs: dict[str, Any] = parity.random_inputs(case, device)
        # What a mask hides is NaN, and stands in the sums of other results.
        self.leaves = [values for values in self.inputs.values() if values.requires_grad]
        self.grad_h = torch.randn(shape, device=device)

    def __call__(self, op: Callable[..., tuple[Tensor, Tensor]] = sru_recurrence) -> list[Tensor]:
        h, state = op(**self.inputs)
        return [h.detach(), state.detach(), *torch.autograd.grad((h, state.sum()), self.leaves, (self.grad_h, None))]


def same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    if not all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)):
        raise parity.ParityError(f"{what}: results differ from those of a plain call")


def _check_graph(context: PartContext, step: Step) -> None:
    """Capture both passes; replay them on other values in the same tensors."""
    if context.rehearsal:
        context.needs_gpu("capture into a CUDA graph")
        same(step(), step(), "a second call")
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        step.inputs["u"].mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    same(captured, step(), "a replayed CUDA graph")


def _check_stream(context: PartContext, step: Step) -> None:
    """Inputs that another stream makes, and results that it reads, without a synchronisation between."""
    if context.rehearsal:
        context.needs_gpu("a side stream")
        return
    expected = step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(2e7))  # some 10 ms: whatever does not wait for this stream reads NaN
        kept = step.inputs["u"].detach().clone()
        with torch.no_grad():
            step.inputs["u"].fill_(float("nan"))
            torch.cuda._sleep(int(2e7))
            step.inputs["u"].copy_(kept)
        found = [tensor.clone() for tensor in step()]
    stream.synchronize()
    same(found, expected, "a side stream")


def _check_compiled(context: PartContext, step: Step) -> None:
    """One graph, by the compiler that models are trained with; in a rehearsal without its code generation."""
    context.needs_gpu("inductor")
    compiled = torch.compile(sru_recurrence, fullgraph=True, backend=context.choose("inductor", "aot_eager"))
    same(step(compiled), step(), "torch.compile")


def _check_op(context: PartContext, step: Step) -> None:
    """torch's own checks of a custom op: schema, fake tensors, autograd, tracing."""
    arguments = [*(step.inputs.get(name) for name in parity.NAMES), 0.8, "tanh", False]
    torch.library.opcheck(torch.ops.hf_efficient.sru_recurrence.default, tuple(arguments))


def check_capture(context: PartContext) -> dict[str, Any]:
    """CUDA graph of both passes, a side stream, torch.compile and opcheck."""
    checks = {"graph": _check_graph, "stream": _check_stream, "compile": _check_compiled, "opcheck": _check_op}
    wrong, done = {}, []
    with use_backend(context.device.type):
        for name, check in checks.items():
            try:
                check(context, Step(context.device))
                done.append(name)
            except Exception as error:  # whatever it is, the others can still be checked
                wrong[name] = f"{type(error).__name__}: {error}"
            context.save({"line": f"right: {', '.join(done)}", "wrong": wrong})
            context.say(f"{name}: {wrong.get(name, 'right')}")
    ran = {last_backend(name) for name in (sru.OP_NAME, sru.BACKWARD_NAME)}
    if wrong or ran != {context.device.type}:
        raise parity.ParityError(f"by {ran}: {wrong}")
    return {"line": f"right: {', '.join(done)}"}


def program(name: str, context: PartContext) -> list[str]:
    """The command that runs one of `PROGRAMS` in a process of its own."""
    return [sys.executable, "-m", "training.benchmarks.gpu.checks", name, "--device", context.device.type]


def check_memory(context: PartContext) -> dict[str, Any]:
    """
    At most 20 cases of parity, with wide vectors among them, under compute-sanitizer's memcheck.

    Raises:
        RuntimeError: if it finds an error; with what it says of it.
    """
    if context.rehearsal:
        context.needs_gpu("compute-sanitizer")
        code, output = run_logged(context, program("cases", context), "cases")
        if code != 0:
            raise RuntimeError(f"the cases ended with exit code {code}: {output[-500:]}")
        return {"line": output.strip().splitlines()[-1]}
    result = sanitizer.run_sanitizer("memcheck", program("cases", context), context.seconds_left() - 5)
    print(result.said, file=sys.stderr)
    if any(refusal in result.said for refusal in REFUSALS):
        raise MissingPrerequisiteError(f"compute-sanitizer refuses this machine's GPU: {result.said[-300:]}")
    if result.status == "missing":
        raise MissingPrerequisiteError(result.said)
    if result.status != "clean":
        raise RuntimeError(f"memcheck: {result.status}: {result.said}")
    return {"line": f"memcheck: {result.said}"}


def profile_kernels(context: PartContext) -> dict[str, Any]:
    """ncu's counters of one forward and one backward kernel in float16."""
    if context.rehearsal:
        context.needs_gpu("ncu")
        code, output = run_logged(context, program("two-kernels", context), "two-kernels")
        if code != 0:
            raise RuntimeError(f"the kernels' calls ended with exit code {code}: {output[-500:]}")
        return {"line": "both passes ran"}
    options = ["--target-processes", "all", "--clock-control", "none", "--csv", "--page", "details"]
    options += ["--kernel-name", "regex:forward_kernel|backward_kernel", "--launch-count", "2"]
    options += [word for section in SECTIONS for word in ("--section", section)]
    code, output = run_logged(context, [find_tool("ncu") or "ncu", *options, *program("two-kernels", context)], "ncu")
    counters = parse_counters(output)
    if not counters and any(refusal in output for refusal in REFUSALS):
        raise MissingPrerequisiteError(f"ncu refuses this machine's GPU: {output[-300:]}")
    if code != 0 or len(counters) < 2:
        raise RuntimeError(f"ncu ended with exit code {code} and counters of {len(counters)} kernels: {output[-500:]}")
    shown = (f"{kernel}: DRAM {values.get('DRAM Throughput', 'unknown')}" for kernel, values in counters.items())
    return {"line": "; ".join(shown), "counters": counters}


def parse_counters(output: str) -> dict[str, dict[str, str]]:
    """The counters of `METRICS`, by kernel, of ncu's CSV, which stands between lines of other kinds."""
    lines = output.splitlines()
    start = next((index for index, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        if row["Metric Name"] in METRICS:
            kernel = next(iter(re.findall(r"\w+_kernel", row["Kernel Name"])), row["Kernel Name"])
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            found.setdefault(kernel, {})[row["Metric Name"]] = value
    return found


def run_cases(device: torch.device) -> None:
    """The cases of memcheck: our kernels alone, since each launch of plain torch costs milliseconds there."""
    cases = list(parity.sanitizer_cases(device))
    for case in cases:
        parity.our_results(parity.random_inputs(case, device), parity.options_of(case))
    sparse_ff.run_for_sanitizer(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{len(cases) + len(sparse_ff.SANITIZED)} cases ran")


def run_two_kernels(device: torch.device) -> None:
    """One forward and one backward pass."""
    call = Call(16, torch.float16, *((512, 3072) if device.type == "cuda" else (7, 48)), device=device)
    call.forward()
    call.backward()


PROGRAMS = {"cases": run_cases, "two-kernels": run_two_kernels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=list(PROGRAMS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(%(default)s)")
    args = parser.parse_args()
    PROGRAMS[args.program](torch.device(args.device))


if __name__ == "__main__":
    main()
