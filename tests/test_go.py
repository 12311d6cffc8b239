"""go.py decides what to install and what to run; here nothing is installed, commands are only noted."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import go

OK = 0


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A repository's root without an environment, and a list of the commands that would have run."""
    commands = []

    def note(command, cwd, env):
        commands.append((command, env))
        if "venv" in command:
            go.python_in(go.VENV).parent.mkdir(parents=True)
            go.python_in(go.VENV).touch()
        return subprocess.CompletedProcess(command, OK)

    shutil.copy(go.ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(go, "ROOT", tmp_path)
    monkeypatch.setattr(go, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(go, "STAMP", tmp_path / ".venv" / "mixoff.json")
    for name in ("MIXOFF_TORCH", "MIXOFF_REQUIRE_ALL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(go.subprocess, "run", note)
    monkeypatch.setattr(go, "sees_gpu", lambda: True)
    return commands


def installs(world):
    """What each pip command so far was asked to install."""
    mark = "--disable-pip-version-check"
    return [command[command.index(mark) + 1 :] for command, _ in world if mark in command]


def edit_pyproject(old, new):
    """Replaces text in the copy of pyproject.toml."""
    path = go.ROOT / "pyproject.toml"
    before = path.read_text(encoding="utf-8")
    assert old in before
    path.write_text(before.replace(old, new), encoding="utf-8")


def test_first_use_makes_an_environment_and_installs_once(world):
    go.ensure("demo")
    assert world[0][0][1:3] == ["-m", "venv"]
    assert installs(world) == [["--editable", "."]]
    go.ensure("demo")
    assert len(world) == 2, "the second call installs nothing"


def test_extras_accumulate_and_are_never_lost(world):
    go.ensure("lab")
    go.ensure("test")
    go.ensure("demo")
    assert installs(world) == [["--editable", package] for package in (".[lab]", ".[lab,serve,test]", ".[reference]")]
    assert json.loads(go.STAMP.read_text())["extras"] == ["lab", "reference", "serve", "test"]


def test_changed_dependencies_install_again(world):
    go.ensure("demo")
    edit_pyproject('"rich>=13.0"', '"rich>=14.0"')
    go.ensure("demo")
    assert len(installs(world)) == 2


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no tomllib: go.py compares the whole file")
def test_other_changes_of_pyproject_install_nothing(world):
    go.ensure("demo")
    edit_pyproject("line-length = 120", "line-length = 100")
    go.ensure("demo")
    assert len(installs(world)) == 1


def test_chosen_torch_comes_before_everything_else(world, monkeypatch):
    monkeypatch.setenv("MIXOFF_TORCH", "torch==2.13.0 --index-url https://example.org/cpu")
    go.ensure("demo")
    first, second = installs(world)
    assert first == ["torch==2.13.0", "--index-url", "https://example.org/cpu"]
    assert second == ["--editable", "."]
    go.ensure("demo")
    assert len(installs(world)) == 2
    monkeypatch.setenv("MIXOFF_TORCH", "torch==2.12.0")
    go.ensure("demo")
    assert installs(world)[2] == ["torch==2.12.0"]
    monkeypatch.delenv("MIXOFF_TORCH")
    go.ensure("demo")
    assert len(installs(world)) == 4, "without the variable what stands there is kept"


@pytest.mark.parametrize(
    ("uv", "gpu", "system", "small"),
    [
        ("uv", False, "linux", True),
        (None, False, "linux", False),
        ("uv", True, "linux", False),
        ("uv", False, "darwin", False),
    ],
)
def test_without_a_gpu_torch_comes_without_cuda(world, monkeypatch, capsys, uv, gpu, system, small):
    monkeypatch.setattr(go.shutil, "which", lambda name: uv)
    monkeypatch.setattr(go, "sees_gpu", lambda: gpu)
    monkeypatch.setattr(go.sys, "platform", system)
    go.ensure("demo")
    by_uv = [command for command, _ in world if command[:3] == ["uv", "pip", "install"]]
    assert [command[-3:] for command in by_uv] == ([["--torch-backend", "cpu", "torch>=2.9"]] if small else [])
    assert ("about 3 GB" in capsys.readouterr().out) == (uv is None)
    assert installs(world) == [["--editable", "."]]
    go.ensure("lab")
    assert len([command for command, _ in world if command[0] == "uv"]) == small, "torch is chosen once"


def test_where_uv_fails_pip_goes_on(world, monkeypatch, capsys):
    note = go.subprocess.run

    def fail_on_uv(command, **kw):
        note(command, **kw)
        return subprocess.CompletedProcess(command, int(command[0] == "uv"))

    monkeypatch.setattr(go.subprocess, "run", fail_on_uv)
    monkeypatch.setattr(go.shutil, "which", lambda name: name)
    monkeypatch.setattr(go, "sees_gpu", lambda: False)
    monkeypatch.setattr(go.sys, "platform", "linux")
    go.ensure("demo")
    assert "about 3 GB" in capsys.readouterr().out and installs(world) == [["--editable", "."]]


def test_hqq_never_builds_kernels(world):
    go.ensure("test")
    assert world[-1][1]["DISABLE_CUDA"] == "1"


def test_without_hqq_everything_else_is_installed(world, monkeypatch, capsys):
    note = go.subprocess.run

    def fail_on_hqq(command, **kw):
        note(command, **kw)
        return subprocess.CompletedProcess(command, int(command[-1] == ".[reference]"))

    monkeypatch.setattr(go.subprocess, "run", fail_on_hqq)
    go.ensure("test")
    assert "hqq could not be installed" in capsys.readouterr().out
    go.ensure("test")
    assert len(installs(world)) == 2, "it is tried once"


def test_require_all_installs_every_extra_for_test_alone(world, monkeypatch):
    monkeypatch.setenv("MIXOFF_REQUIRE_ALL", "1")
    go.ensure("demo")
    go.ensure("test")
    wanted = [".", ".[e2e,lab,serve,site,test,triton]", ".[reference]"]
    assert installs(world) == [["--editable", package] for package in wanted]


def test_a_damaged_stamp_counts_as_none(world):
    go.ensure("demo")
    go.STAMP.write_text("{")
    go.ensure("demo")
    assert len(installs(world)) == 2


def test_failed_installation_leaves_no_stamp(world, monkeypatch):
    note = go.subprocess.run

    def fail_on_mixoff(command, **kw):
        note(command, **kw)
        return subprocess.CompletedProcess(command, int("--editable" in command))

    monkeypatch.setattr(go.subprocess, "run", fail_on_mixoff)
    with pytest.raises(SystemExit, match="pip could not install mixoff"):
        go.ensure("demo")
    assert not go.STAMP.exists()


# ---------------------------------------------------------------- no venv, no uv


@pytest.fixture
def without_venv(monkeypatch):
    """A Python whose venv module is incomplete, as Debian ships it."""
    find_spec = go.importlib.util.find_spec
    monkeypatch.setattr(go.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else find_spec(name))


def test_uv_stands_in_for_venv(world, without_venv, monkeypatch):
    monkeypatch.setattr(go.shutil, "which", lambda name: name)
    go.ensure("demo")
    assert world[0][0][:3] == ["uv", "venv", "--seed"]


def test_without_venv_and_uv_the_way_out_is_named(world, without_venv, monkeypatch):
    monkeypatch.setattr(go.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        go.ensure("demo")
    assert "python3-venv" in str(stop.value) and "uv" in str(stop.value)
    assert world == []


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 15, 0)])
def test_other_pythons_are_refused_by_name(world, monkeypatch, version):
    monkeypatch.setattr(go.sys, "version_info", version)
    with pytest.raises(SystemExit, match="needs Python 3.10 to 3.14"):
        go.ensure("demo")


# ---------------------------------------------------------------- jobs


def test_python_of_windows(monkeypatch):
    monkeypatch.setattr(go.os, "name", "nt")
    assert go.python_in(pathlib.PurePosixPath("v")) == pathlib.PurePosixPath("v/Scripts/python.exe")


def test_test_runs_both_guards_then_one_pytest(world):
    assert go.main(["test", "--all", "-k", "cache"]) == OK
    jobs = [command[1:] for command, _ in world if "pip" not in command and "venv" not in command]
    assert jobs[:2] == [["course/nb.py", "check"], ["course/make_colab.py", "--check"]]
    assert jobs[2][:2] == ["-m", "pytest"] and "--nbval" in jobs[2]
    assert jobs[2][-5:] == ["tests", "notebooks", "--run-slow", "-k", "cache"]
    assert len(jobs) == 3


@pytest.mark.parametrize("job", go.JOBS)
def test_every_job_passes_its_arguments_on(job):
    assert go.commands(job, ["--flag"])[-1][-1] == "--flag"


def test_first_failure_ends_the_job(world, monkeypatch):
    go.ensure("test")
    world.clear()
    note = go.subprocess.run
    monkeypatch.setattr(go.subprocess, "run", lambda *a, **kw: note(*a, **kw) and subprocess.CompletedProcess(a, 3))
    assert go.main(["test"]) == 3
    assert len(world) == 1


def test_unknown_job_names_the_jobs(world, capsys):
    assert go.main(["tset"]) == 2
    assert "demo, lab, test, e2e, bench" in capsys.readouterr().out
    assert world == []


def test_only_the_standard_library_is_needed(root):
    """`-S` leaves site-packages out: what a machine with a bare Python has."""
    done = subprocess.run([sys.executable, "-S", root / "go.py", "help"], capture_output=True, text=True)
    assert done.returncode == OK and "go.py demo" in done.stdout
