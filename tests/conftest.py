"""Runs every test alike: one thread, no network, slow tests on request, and skips that count as failures where asked.

    --run-slow              also what is marked slow (`go.py test --all`)
    MIXOFF_REQUIRE_ALL=1    a skip is a failure: .ci/run sets it after installing everything

Every skip that can happen stands in QUARANTINE.md; test_quarantine.py holds that list to the code.
"""

import functools
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest

# before anything imports torch or numpy: sums run in the same order, and two test runs do not fight for cores
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", NUMBA_NUM_THREADS="1", HF_HUB_OFFLINE="1")

ROOT = pathlib.Path(__file__).resolve().parents[1]
REQUIRE_ALL = os.environ.get("MIXOFF_REQUIRE_ALL") == "1"


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run what is marked slow")


def pytest_configure(config):
    """A cache folder of these tests alone; what is known of this machine's bandwidths is not measured again."""
    from mixoff import folders

    known, config.mixoff_cache = folders.cache_folder() / "hardware.json", tempfile.mkdtemp(prefix="mixoff-tests-")
    if known.is_file():
        shutil.copy(known, config.mixoff_cache)
    os.environ["MIXOFF_CACHE"] = config.mixoff_cache


def pytest_unconfigure(config):
    shutil.rmtree(config.mixoff_cache, ignore_errors=True)


# Files of a minute or more, longest first. The workers of pytest-xdist take file by file in this order (`go.py`), then
# chapters, then all else, so that none is left alone with a long one at the end.
LONGEST = (
    *("test_kernels", "test_emulated", "test_chapters_in_browser", "test_families", "test_quantize", "test_offload"),
    *("test_cli", "test_notebooks", "test_schemes", "test_conversion", "test_cuda", "test_calibrated", "test_triton"),
    *("test_model_files", "test_plan", "test_hub", "test_other_systems", "test_kept", "test_site", "test_quarantine"),
)


def rank(path):
    """The place of a test file or chapter in the order in which workers take them."""
    place = dict(zip(LONGEST, range(len(LONGEST)), strict=True))
    return place.get(path.stem, len(LONGEST) + (path.suffix != ".ipynb"))


def has_gpu():
    """Whether torch sees a GPU; importing it takes seconds, so only a run with such tests asks."""
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(config, items):
    here = {"slow": lambda: config.getoption("--run-slow"), "gpu": functools.cache(has_gpu)}
    unfit = [item for item in items if any(item.get_closest_marker(mark) and not here[mark]() for mark in here)]
    if unfit:
        config.hook.pytest_deselected(items=unfit)
        items[:] = [item for item in items if item not in unfit]
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: rank(item.path))


def forbid_skip(report):
    """Turns a skip into a failure that names its reason; expected failures stay what they are."""
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason}\nMIXOFF_REQUIRE_ALL=1 makes a skip a failure: install what is missing"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    forbid_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    forbid_skip(report)
    return report


@pytest.fixture(autouse=True)
def environment_as_before():
    """Commands that ran in this process set variables, which chapters run by the same worker would inherit."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="session")
def root():
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def project_files():
    """Every file that is or would be committed; of an unpacked source distribution, every file."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = [p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if ".venv" not in p.parts]
    return [name for name in sorted(listed) if (ROOT / name).is_file()]
