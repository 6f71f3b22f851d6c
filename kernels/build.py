"""Build the compiled kernels that this machine can build, check that they run, and say what it lacks for the others.

The package works without any of them, in plain torch; kernels make it faster. Run it with the Python that has torch:

    python kernels/build.py              build what is missing or changed
    python kernels/build.py --check      say how things stand; nothing is compiled
    python kernels/build.py --runnable   leave out what cannot run here, as `make demo` and `make test` do
"""

import argparse
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from _build import variant
from _build.compilation import CompileError, build_library, cores
from _build.recipe import BACKENDS, Recipe, RecipeError, read_recipe
from _build.toolchain import Lack, Toolchain, find_toolchain, has_nvidia_gpu


ROOT = Path(__file__).resolve().parent
OK, FAILED, USAGE, LACKING = range(4)
EXIT_CODES = """exit codes:
  0  all that was asked for is built and current
  1  a build failed or, with --check, something is not current
  2  the command or a build.toml is wrong
  3  this machine lacks what a build needs, such as a compiler or a folder that can be written to; everything still
     works in plain torch

Each kernel is a folder with a build.toml. Results are in kernels/<name>/build/<variant>/: the library, its Python
files, metadata.json, build_record.json (what it was made from) and compiler.log (what the compilers said)."""


class CheckError(Exception):
    """A library was built and does not load or gives wrong results."""


def say(text: str) -> None:
    print(text, flush=True)


def check_in_fresh_process(folder: Path, recipe: Recipe, backend: str) -> str:
    """How far the check of a finished variant went; the libraries of this process cannot disturb it."""
    example = recipe.folder / "example.py"
    command = [sys.executable, str(ROOT / "_build" / "check_variant.py"), str(folder), backend]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [*command, *([str(example)] if example.is_file() else [])]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        raise CheckError(f"The library was built, but the check of it failed:\n{result.stdout}{result.stderr}")
    return result.stdout.splitlines()[-1]


def build(recipe: Recipe, tools: Toolchain, label: str, options: argparse.Namespace) -> None:
    """Build one variant beside the old one, check it, and only then put it in the old one's place."""
    with variant.locked(recipe, say) as folder:
        state = variant.find_state(recipe, tools.backend, tools)
        if state.status == "current" and not options.force:
            say(f"{label}: current ({state.checked})")
            return
        why = f" ({state.reason})" if state.status == "stale" else ""
        name = variant.variant_name(recipe, tools)
        staging = folder / f"{variant.STAGING}{name}"
        (staging / "objects").mkdir(parents=True)
        new = staging / name
        new.mkdir()
        try:
            content = variant.fingerprint(recipe, tools.backend, tools)
            old = None if options.force else variant.reusable_library(state, content)
            library = new / f"{variant.ops_name(recipe, tools.backend, content)}.abi3.so"
            if old is None:
                say(f"{label}: building{why} with {tools.versions}")
                step = partial(say_step, label)
                scratch = staging / "objects"
                log = build_library(recipe, tools, library, scratch, step, options.jobs, options.verbose)
                (new / variant.COMPILER_LOG).write_text(log)
            else:
                say(f"{label}: renewing its Python files")
                for path in (old, old.with_name(variant.COMPILER_LOG)):
                    shutil.copyfile(path, new / path.name)
            variant.write_package(recipe, tools, library.name.removesuffix(".abi3.so"), new)
            checked = check_in_fresh_process(new, recipe, tools.backend)
            variant.write_record(content, library.name, checked, new)
            variant.install(new, recipe, tools)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        say(f"{label}: {checked}; it is in {os.path.relpath(folder / name)}")


def say_step(label: str, text: str) -> None:
    say(f"{label}: {text}")


def report(state: variant.State, lack: Lack | None, label: str) -> int:
    """Say how a variant stands, and what this machine lacks to build it; the exit code that goes with it."""
    lacking = f" This machine cannot build it: {lack}." if lack else ""
    if state.status == "current":
        say(f"{label}: current ({state.checked}).{lacking}")
        return OK
    changed = f" ({state.reason})" if state.reason else ""
    say(f"{label}: {state.status}{changed}.{lacking or ' `python kernels/build.py` builds it.'}")
    return LACKING if lack else FAILED


def warn_of_unlisted(recipe: Recipe, backend: str, label: str) -> None:
    """Headers that build.toml should name: a local build finds them, kernel-builder copies only what is named."""
    recipe.inputs(backend)  # names files that are not there
    for header in recipe.unlisted(backend):
        say(f"{label}: build.toml should list {header.relative_to(recipe.folder)} in a `src`")


def process(recipe: Recipe, backend: str, options: argparse.Namespace) -> int:
    """Build or report one kernel for one backend."""
    label = f"{recipe.name} {backend}"
    lack = tools = None
    try:
        warn_of_unlisted(recipe, backend, label)
        try:
            tools = find_toolchain(backend, recipe.stable_abi[backend])
            if not options.check:
                build(recipe, tools, label, options)
                return OK
        except Lack as error:
            lack = error
        code = report(variant.find_state(recipe, backend, tools), lack, label)
        return LACKING if lack and options.force else code
    except RecipeError as error:
        say(f"{label}: {error}")
        return USAGE
    except (CompileError, CheckError, OSError) as error:
        say(f"{label}: NOT built. {error}")
        return FAILED


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python kernels/build.py [names ...] [--backend cpu cuda] [--runnable] [--check] [--force] [--verbose] "
        "[--jobs N]",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="kernels to build, by the names of their folders (default: all)")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=BACKENDS,
        help="what to build for (default: cpu, and cuda where nvcc is found; named here, its lack is an error)",
    )
    parser.add_argument(
        "--check", action="store_true", help="say what is current, stale, missing or not buildable here"
    )
    parser.add_argument(
        "--runnable", action="store_true", help="only what this machine can run: cuda only with an NVIDIA GPU"
    )
    parser.add_argument("--force", action="store_true", help="build again what is current, too")
    parser.add_argument("--verbose", action="store_true", help="show the compilers' commands")
    parser.add_argument(
        "--jobs", type=int, default=cores(), help="how many sources to compile at once (default: cores)"
    )
    return parser.parse_args()


def find_recipes(names: list[str]) -> list[Path]:
    """
    The `build.toml` of each kernel that is named, or of all.

    Raises:
        RecipeError: if there is none of a name.
    """
    found = {path.parent.name: path for path in sorted(ROOT.glob("*/build.toml"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise RecipeError(f"there is no kernel {', '.join(unknown)}; there are: {', '.join(found) or 'none'}")
    return [found[name] for name in names or found]


def main() -> int:
    options, codes = parse_arguments(), set()
    try:
        recipes = [read_recipe(path) for path in find_recipes(options.names)]
    except RecipeError as error:
        say(f"kernels/build.py: {error}")
        return USAGE
    for recipe in recipes:
        for backend in options.backend or recipe.backends:
            if backend not in recipe.backends:
                say(f"{recipe.name} {backend}: the kernel has no such backend")
                continue
            if backend == "cuda" and options.runnable and not has_nvidia_gpu():
                say(f"{recipe.name} cuda: left out, since there is no NVIDIA GPU here. Without --runnable it is built.")
                continue
            code = process(recipe, backend, options)
            codes.add(OK if code == LACKING and backend == "cuda" and not options.backend else code)
    return next((code for code in (FAILED, USAGE, LACKING) if code in codes), OK)


if __name__ == "__main__":
    sys.exit(main())
