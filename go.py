#!/usr/bin/env python3
"""One file, standard library only: makes the environment on first use, then runs a job inside it.

    python3 go.py demo      a trained Mixture-of-Experts model writes text under a byte budget
    python3 go.py lab       JupyterLab, opened at the first chapter
    python3 go.py test      every test, every chapter            (test --all adds what is slow)
    python3 go.py e2e       chapters in a real browser; needs Chromium
    python3 go.py bench     tokens/s on this machine, next to its own roofline
    python3 go.py gpu       ten minutes on an NVIDIA card: tests, bandwidths, kernels and tokens, next to predictions
    python3 go.py site      the course as pages in build/site, which need no server and no network
    python3 go.py slides    a deck of slides of every chapter in build/slides
    python3 go.py schedule  the 90-minute, half-day, one-day and second-day workshop, from the chapters' metadata

What follows the job is passed on to it: `python3 go.py test -k cache -x`.
The environment is `.venv` next to this file. Nothing is installed twice: a stamp inside records what it
holds. Without an NVIDIA GPU, and with `uv` on the path, PyTorch comes without CUDA: about 3 GB less to download.

Variables:
    MIXOFF_TORCH           what pip installs for torch, before all else, such as torch==2.13.0 or the arguments that
                           pytorch.org names for a machine without a GPU
    MIXOFF_REQUIRE_ALL=1   `test` installs the extras for browser and Triton tests too, and a skipped test is a failure
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "mixoff.json"
OLDEST, TOO_NEW = (3, 10), (3, 15)  # numba follows a new Python late

JOBS = ("demo", "lab", "test", "e2e", "bench", "gpu", "site", "slides", "schedule")
EXTRAS = {
    "lab": {"lab"},
    "test": {"lab", "test", "serve", "reference"},
    "e2e": {"lab", "test", "serve", "e2e", "site"},
    "gpu": {"test", "triton"},
    "site": {"lab", "site"},
    "slides": {"lab", "site"},
    "schedule": {"lab", "site"},
}
ALL_EXTRAS = {"lab", "test", "serve", "reference", "e2e", "triton", "site"}

NBVAL = (
    "--nbval",
    "--nbval-current-env",
    "--nbval-cell-timeout=300",
    "--nbval-kernel-startup-timeout=120",
    "--nbval-sanitize-with=tests/nbval_sanitize.cfg",
)
# One worker per core, four at most (each holds torch); a file stays in one, since a chapter's cells share a kernel.
# Files are taken in the order of tests/conftest.py, longest first, rather than by their number of tests.
WORKERS = ("-n", "auto", "--maxprocesses=4", "--dist=loadfile", "--no-loadscope-reorder")
NO_VENV = """\
This Python cannot make virtual environments: its `venv` module is incomplete, and there is no `uv` on the path.
Install one of them, then run the same command again:
    Debian, Ubuntu    sudo apt install python3-venv
    anywhere          pip install uv"""


# ---------------------------------------------------------------- the environment


def python_in(venv: pathlib.Path) -> pathlib.Path:
    """The interpreter of an environment, on this system."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*command, **env) -> int:
    """Shows a command, runs it at the repository's root and returns its exit code."""
    words = [str(word) for word in command]
    print("+", shlex.join(words), flush=True)
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **env}).returncode


def must(*command, failed: str, **env) -> None:
    """Runs a command and stops with the sentence `failed` if it does not succeed."""
    if run(*command, **env):
        sys.exit(failed)


def required_extras(job: str) -> set[str]:
    """The extras of pyproject.toml that a job needs."""
    if job == "test" and os.environ.get("MIXOFF_REQUIRE_ALL") == "1":
        return ALL_EXTRAS
    return EXTRAS.get(job, set())


def dependency_key() -> str:
    """Changes when an installation would: dependencies, extras or entry points of pyproject.toml, or the folder."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10: any change of the file counts
        content = text
    else:
        project = tomllib.loads(text)["project"]
        names = ("requires-python", "dependencies", "optional-dependencies", "scripts")
        content = json.dumps([project.get(name) for name in names])
    return hashlib.sha256(f"{ROOT}\n{content}".encode()).hexdigest()


def read_stamp() -> dict:
    """What the environment holds, as written after the last installation; empty where nothing is known."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def make_venv() -> None:
    """Makes `.venv` with this Python, by venv where it is whole (Debian splits it), else by uv."""
    if not OLDEST <= sys.version_info[:2] < TOO_NEW:
        sys.exit(f"mixoff needs Python 3.10 to 3.14, this is {sys.version.split()[0]}: run go.py with another python3")
    if importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip"):
        command = (sys.executable, "-m", "venv", VENV)
    elif shutil.which("uv"):
        command = ("uv", "venv", "--seed", "--python", sys.executable, VENV)
    else:
        sys.exit(NO_VENV)
    must(*command, failed=f"could not make {VENV}")


def sees_gpu() -> bool:
    """Whether an NVIDIA driver is installed."""
    return shutil.which("nvidia-smi") is not None or pathlib.Path("/proc/driver/nvidia/version").exists()


def install_small_torch() -> None:
    """PyTorch without CUDA, by uv, which knows where such builds are; pip alone would fetch the CUDA build on Linux."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requirement = re.search(r'"(torch>=[^"]+)"', text)[1]
    command = ("uv", "pip", "install", "--quiet", "--python", python_in(VENV), "--torch-backend", "cpu", requirement)
    if shutil.which("uv") is None or run(*command):
        print(
            "no GPU is seen, but pip fetches PyTorch with CUDA, about 3 GB: `pip install uv` or MIXOFF_TORCH avoids it"
        )


def install(extras: set[str], torch: str, fresh: bool = False) -> None:
    """Installs torch as chosen, then mixoff from this folder, editable, with its extras."""
    # Python compiles what it imports; pip would compile all of it, one file after the other
    pip = (python_in(VENV), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check")
    if torch:
        words = shlex.split(torch, posix=os.name != "nt")
        must(*pip, *words, failed=f"pip could not install {torch!r}, the value of MIXOFF_TORCH")
    elif fresh and sys.platform == "linux" and not sees_gpu():
        install_small_torch()
    needed = ",".join(sorted(extras - {"reference"}))
    package = f".[{needed}]" if needed else "."
    must(*pip, "--editable", package, failed="pip could not install mixoff: see its message above")
    # hqq's setup would look for nvcc and build kernels that nothing here uses
    if "reference" in extras and run(*pip, "--editable", ".[reference]", DISABLE_CUDA="1"):
        print("hqq could not be installed: the tests that compare with it will be skipped, all else works")


def ensure(job: str) -> None:
    """Brings the environment to what a job needs; does nothing where it is so already."""
    stamp, key, torch = read_stamp(), dependency_key(), os.environ.get("MIXOFF_TORCH", "")
    have, want = set(stamp.get("extras", ())), required_extras(job)
    fresh = not python_in(VENV).exists()
    if not fresh and stamp.get("key") == key and want <= have and torch in ("", stamp.get("torch")):
        return
    if fresh:
        print(
            "making .venv: 1 to 3 GB on the disk with a CPU build of PyTorch, several more with CUDA; some minutes",
            flush=True,
        )
        make_venv()
        have = set()
    install(have | want, torch, fresh)
    stamp = {"key": key, "extras": sorted(have | want), "torch": torch or stamp.get("torch", "")}
    STAMP.write_text(json.dumps(stamp) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- the jobs


def test_commands(arguments: list[str]) -> list[list[str]]:
    """Two guards, then one pytest run over tests and chapters."""
    arguments = ["--run-slow" if a == "--all" else a for a in arguments]
    return [
        ["course/nb.py", "check"],
        ["course/make_colab.py", "--check"],
        ["-m", "pytest", *WORKERS, *NBVAL, "tests", "notebooks", *arguments],
    ]


def commands(job: str, arguments: list[str]) -> list[list[str]]:
    """What the environment's Python is called with for a job, in order."""
    if job == "test":
        return test_commands(arguments)
    single = {
        "demo": ["-m", "mixoff", "demo"],
        "lab": ["-m", "jupyterlab", "notebooks/00_start_here.ipynb"],
        "e2e": ["-m", "pytest", "-m", "e2e", "tests/e2e"],
        "bench": ["-m", "mixoff", "bench"],
        "gpu": ["benchmarks/gpu_check.py"],
        "site": ["course/make_site.py"],
        "slides": ["course/slides.py"],
        "schedule": ["course/schedule.py"],
    }
    return [single[job] + arguments]


def main(argv: list[str]) -> int:
    """Runs the job named first; returns the exit code of the first command that fails, else 0."""
    if not argv or argv[0] not in JOBS:
        asked_for_help = argv[:1] in (["-h"], ["--help"], ["help"])
        print(__doc__ if asked_for_help or not argv else f"no job named {argv[0]!r}, there are: {', '.join(JOBS)}")
        return 0 if asked_for_help else 2
    job, *arguments = argv
    ensure(job)
    for command in commands(job, arguments):
        code = run(python_in(VENV), *command)
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
