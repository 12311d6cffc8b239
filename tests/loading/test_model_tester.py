"""transformers' own tests of a model pass or fail alike with and without offloading: they come with its sources."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).parents[2]
STAND_INS = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}


def pip(*arguments):
    """Whether pip could do it."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-deps", "--disable-pip-version-check"]
    return subprocess.run(command, capture_output=True, timeout=300).returncode == 0


def fetch(at):
    """Make `at`/common of the tests in transformers' source distribution; returns whether there is one to be had."""
    name = f"transformers-{transformers.__version__}"
    sources = ("download", "--no-binary=:all:", "--no-build-isolation", f"--dest={at}", name.replace("-", "=="))
    if not pip(*sources) or not pip("install", f"--target={at}", "parameterized"):
        return False
    common = at / "common"
    for file, mixin in STAND_INS.items():
        (common / file).parent.mkdir(parents=True)
        (common / file).write_text(f"class {mixin}:\n    pass\n")
    with tarfile.open(next(at.glob("transformers-*.tar.gz"))) as archive:
        tests = archive.extractfile(f"{name}/tests/test_modeling_common.py").read()
    (common / "test_modeling_common.py").write_bytes(tests)
    shutil.copy(ROOT / "tests/support/model_tester.py", at / "test_families.py")
    return True


def start(at, offload):
    """The process that runs them all."""
    env = {
        **os.environ,
        "MIXOFF_OFFLOAD": offload,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests/support", at))),
    }
    options = ("-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={at}")
    command = [sys.executable, "-m", "pytest", *options, "test_families.py"]
    return subprocess.Popen(command, cwd=at, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def outcome(process):
    """Names of the tests that failed, and how many tests and subtests passed."""
    out, _ = process.communicate(timeout=3600)
    failed = re.findall(r"^(?:\w*FAILED|ERROR).*? (\S+::\S+)", out, re.M)
    return set(failed), [int(n) for n in re.findall(r"(\d+) (?:subtests )?passed", out)]


@pytest.mark.slow
def test_the_tests_of_transformers_fail_alike_with_and_without_offloading(tmp_path):
    """ModelTesterMixin over eight families, whose experts `eval` moves behind 40 kB of fast tier."""
    if not fetch(tmp_path):
        pytest.skip("pip cannot fetch the sources of transformers here")
    resident, offloaded = map(outcome, [start(tmp_path, "0"), start(tmp_path, "1")])  # both at once
    print(f"failed: {sorted(resident[0])}; passed, with subtests: {resident[1]} resident, {offloaded[1]} offloaded")
    assert offloaded == resident
    assert resident[1][0] >= 8 * 100
