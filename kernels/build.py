"""Build the compiled kernels that this machine can build, check that they run, and say what it lacks for the others.

The package works without any of them, in plain torch; kernels make it faster. Run it with the Python that has torch:

    python kernels/build.py              build what is missing or changed
    python kernels/build.py --check      say how things stand; nothing is compiled
    python kernels/build.py --runnable   leave out what cannot run here, as `make demo` and `make test` do
    python kernels/build.py sru-recurrence --publish FOLDER
                                         write a copy of a kernel that needs nothing around it, for kernel-builder
"""

import argparse
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NoReturn

from _build import variant
from _build.build_config import BACKENDS, BuildConfig, BuildConfigError, read_build_config
from _build.compilation import CompileError, build_library, cores
from _build.publication import publish
from _build.toolchain import MissingDependencyError, Toolchain, find_toolchain, has_nvidia_gpu


ROOT = Path(__file__).resolve().parent
# How this is called: `hf-efficient kernels build` runs it too.
COMMAND = os.environ.get("HF_EFFICIENT_BUILD_COMMAND", "python kernels/build.py")
OK, FAILED, USAGE, LACKING = range(4)
EXIT_CODES = """exit codes:
  0  all that was asked for is built and current
  1  a build failed or, with --check, something is not current
  2  the command or a build.toml is wrong
  3  this machine lacks what a build needs, such as a compiler or a folder that can be written to; everything still
     works in plain torch

Each kernel is a folder with a build.toml. Results are in kernels/<name>/build/<variant>/: the library, its Python
files, metadata.json, build_record.json (what it was made from) and compiler.log (what the compilers said)."""


class Parser(argparse.ArgumentParser):
    """Parser that tells a fault of a command line on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"Error: {message}. --help shows the options.\n")


class CheckError(Exception):
    """A library was built and does not load or gives wrong results."""


def say(text: str) -> None:
    print(text, flush=True)


def check_in_fresh_process(folder: Path, config: BuildConfig, backend: str) -> str:
    """Check a finished variant where libraries of this process cannot disturb it; return how far the check went."""
    example = config.folder / "example.py"
    command = [sys.executable, "-m", "_build.check_variant", str(folder), backend]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [*command, *([str(example)] if example.is_file() else [])]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=ROOT)
    if result.returncode != 0:
        raise CheckError(f"The library was built, but the check of it failed:\n{result.stdout}{result.stderr}")
    return result.stdout.splitlines()[-1]


def build(config: BuildConfig, tools: Toolchain, label: str, options: argparse.Namespace) -> None:
    """Build one variant beside the old one, check it, and only then put it in the old one's place."""
    with variant.locked(config, say) as folder:
        state = variant.find_state(config, tools.backend, tools)
        if state.status == "current" and not options.force:
            say(f"{label}: current ({state.checked})")
            return
        why = f" ({state.reason})" if state.status == "stale" else ""
        name = variant.variant_name(config, tools)
        staging = folder / f"{variant.STAGING}{name}"
        (staging / "objects").mkdir(parents=True)
        new = staging / name
        new.mkdir()
        try:
            content = variant.fingerprint(config, tools.backend, tools)
            old = None if options.force else variant.reusable_library(state, content)
            library = new / f"{variant.ops_name(config, tools.backend, content)}.abi3.so"
            if old is None:
                say(f"{label}: building{why} with {tools.versions}")
                step = partial(say_step, label)
                scratch = staging / "objects"
                log = build_library(config, tools, library, scratch, step, options.jobs, options.verbose)
                (new / variant.COMPILER_LOG).write_text(log)
            else:
                say(f"{label}: renewing its Python files")
                for path in (old, old.with_name(variant.COMPILER_LOG)):
                    shutil.copyfile(path, new / path.name)
            variant.write_package(config, tools, library.name.removesuffix(".abi3.so"), new)
            checked = check_in_fresh_process(new, config, tools.backend)
            variant.write_record(content, library.name, checked, new)
            variant.install(new, config, tools)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        say(f"{label}: {checked}; it is in {os.path.relpath(folder / name)}")


def say_step(label: str, text: str) -> None:
    say(f"{label}: {text}")


def report(state: variant.State, missing: MissingDependencyError | None, label: str) -> int:
    """Say how a variant stands, and what this machine lacks to build it; the exit code that goes with it."""
    cannot_build = f" This machine cannot build it: {missing}." if missing else ""
    if state.status == "current":
        say(f"{label}: current ({state.checked}).{cannot_build}")
        return OK
    changed = f" ({state.reason})" if state.reason else ""
    say(f"{label}: {state.status}{changed}.{cannot_build or f' `{COMMAND}` builds it.'}")
    return LACKING if missing else FAILED


def warn_of_unlisted(config: BuildConfig, backend: str, label: str) -> None:
    """Headers that build.toml should name: a local build finds them, kernel-builder copies only what is named."""
    config.inputs(backend)  # names files that are not there
    for header in config.unlisted(backend):
        say(f"{label}: build.toml should list {header.relative_to(config.folder)} in a `src`")


def process(config: BuildConfig, backend: str, options: argparse.Namespace) -> int:
    """Build or report one kernel for one backend."""
    label = f"{config.name} {backend}"
    missing = tools = None
    try:
        warn_of_unlisted(config, backend, label)
        try:
            tools = find_toolchain(backend, config.stable_abi[backend])
            if not options.check:
                build(config, tools, label, options)
                return OK
        except MissingDependencyError as error:
            missing = error
        code = report(variant.find_state(config, backend, tools), missing, label)
        return LACKING if missing and options.force else code
    except BuildConfigError as error:
        say(f"{label}: {error}")
        return USAGE
    except (CompileError, CheckError, OSError) as error:
        say(f"{label}: NOT built. {error}")
        return FAILED


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        usage=f"{COMMAND} [names ...] [--backend cpu cuda] [--runnable] [--check] [--force] [--verbose] "
        "[--jobs N] [--publish FOLDER]",
        description=(__doc__ or "").replace("python kernels/build.py", COMMAND),
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="kernels to build, by the names of their folders (default: all)")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=BACKENDS,
        help="what to build for (default: cpu, and cuda where nvcc is found; named here, lacking it is an error)",
    )
    parser.add_argument(
        "--check", action="store_true", help="say what is current, stale, missing or not buildable here"
    )
    parser.add_argument(
        "--runnable", action="store_true", help="only what this machine can run: cuda only with an NVIDIA GPU"
    )
    parser.add_argument("--force", action="store_true", help="build again what is current, too")
    parser.add_argument("--verbose", action="store_true", help="show the compilers' commands")
    parser.add_argument("--jobs", type=int, default=cores(), help="how many things to compile at once (default: cores)")
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="FOLDER",
        help="build nothing; write the one kernel that is named into a new folder, with what it shares with others",
    )
    return parser.parse_args()


def find_build_configs(names: list[str]) -> list[Path]:
    """
    The `build.toml` of each kernel that is named, or of all.

    Raises:
        BuildConfigError: if there is none of a name.
    """
    found = {path.parent.name: path for path in sorted(ROOT.glob("*/build.toml"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise BuildConfigError(f"there is no kernel {', '.join(unknown)}; there are: {', '.join(found) or 'none'}")
    return [found[name] for name in names or found]


def write_publication(configs: list[BuildConfig], folder: Path) -> int:
    if len(configs) != 1:
        say(f"{COMMAND}: name one kernel to publish")
        return USAGE
    try:
        publish(configs[0], folder.absolute())
    except (BuildConfigError, OSError) as error:
        say(f"{configs[0].name}: not written. {error}")
        return FAILED
    say(f"{configs[0].name}: written to {os.path.relpath(folder)}")
    return OK


def main() -> int:
    options, codes = parse_arguments(), set()
    try:
        configs = [read_build_config(path) for path in find_build_configs(options.names)]
    except BuildConfigError as error:
        say(f"{COMMAND}: {error}")
        return USAGE
    if options.publish is not None:
        return write_publication(configs, options.publish)
    for config in configs:
        for backend in options.backend or config.backends:
            if backend not in config.backends:
                say(f"{config.name} {backend}: the kernel has no such backend")
                continue
            if backend == "cuda" and options.runnable and not has_nvidia_gpu():
                say(f"{config.name} cuda: left out, since there is no NVIDIA GPU here. Without --runnable it is built.")
                continue
            code = process(config, backend, options)
            codes.add(OK if code == LACKING and backend == "cuda" and not options.backend else code)
    return next((code for code in (FAILED, USAGE, LACKING) if code in codes), OK)


if __name__ == "__main__":
    sys.exit(main())
