"""Machines: every named figure has a source, limits of control groups count, and a probe is made once."""

import dataclasses
import json

import pytest
import torch

from mixoff import MixoffError, folders
from mixoff.planning import hardware, probe

KINDS = ("measured", "reported", "assumed", "not known", "none")


@pytest.mark.parametrize("name", hardware.NAMED)
def test_every_figure_of_a_named_machine_has_a_source_and_its_kind(name):
    machine = probe.named(name)
    figures = {f.name for f in dataclasses.fields(machine) if f.name.endswith(("_bytes", "_Bps", "_nbytes"))}
    known = {key for key in figures if getattr(machine, key) is not None} | {"disk_bytes"}
    assert known <= set(machine.sources)
    assert [s for s in machine.sources.values() if not s.startswith(KINDS)] == []
    assert json.loads(json.dumps(machine.to_dict()))["name"] == name
    assert machine.name in str(machine) and "GB/s" in str(machine)


def test_the_t4_is_the_one_that_was_reported():
    t4 = probe.named("t4")
    assert (t4.fast_bytes, t4.fast_Bps, t4.link_Bps) == (int(14.75 * 2**30), 320e9, 12e9)
    assert t4.compute_dtype == "float16"  # a T4 only emulates bf16


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(MixoffError, match=r"unknown hardware 't5': choose one of t4, rtx-3060.*'here'"):
        probe.named("t5")


def test_bandwidth_of_memory_counts_the_bytes_it_read(monkeypatch):
    """With a clock that says every round took 2 s, the bandwidth is half the bytes."""
    monkeypatch.setattr(probe, "_seconds", lambda work: (work(), 2.0)[1])
    assert probe.read_bandwidth(threads=2, nbytes=1 << 20, rounds=2) == (1 << 20) / 2


def test_the_loop_reads_every_byte():
    import numpy as np

    values = np.arange(100_003)
    assert probe._summation()(values) == values.sum()


@pytest.mark.parametrize("bad", [{"threads": 0}, {"rounds": 0}, {"nbytes": 4}])
def test_bandwidth_of_nothing_is_refused(bad):
    with pytest.raises(MixoffError, match="cannot measure"):
        probe.read_bandwidth(**{"threads": 1, "nbytes": 1 << 16, "rounds": 1} | bad)


@pytest.mark.parametrize("depth", [1, 8])
@pytest.mark.parametrize("direct", [True, False])
def test_bandwidth_of_a_disk_reads_every_byte_once(tmp_path, monkeypatch, depth, direct):
    import os

    read, true_read = [], os.preadv
    monkeypatch.setattr(probe, "_seconds", lambda work: (work(), 0.5)[1])
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: (read.append((at, true_read(fd, b, at))), read[-1][1])[1])
    if not direct:
        monkeypatch.setattr(probe, "direct_io", lambda folder: False)
    request, nbytes = 1 << 16, 1 << 20
    assert probe.disk_bandwidth(tmp_path, request, depth, nbytes) == nbytes / 0.5
    assert sorted(read) == [(at, request) for at in range(0, nbytes, request)]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(MixoffError, match="cannot measure the disk in .*nowhere"):
        probe.disk_bandwidth(tmp_path / "nowhere", 4096)
    with pytest.raises(MixoffError, match="use a multiple of 4096"):
        probe.disk_bandwidth(tmp_path, 1000)


# ---------------------------------------------------------------- memory


def group(folder, **files):
    """Write the files of one control group."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_tightest_control_group_counts_version_2(tmp_path):
    stat = {"memory__stat": "anon 5\ninactive_file 400"}
    group(tmp_path / "a", memory__max=3000, memory__current=1000, **stat)
    group(tmp_path / "a/b", memory__max="max", memory__current=900, **stat)
    (tmp_path / "own").write_text("0::/a/b\n")
    assert probe.cgroup_limit(tmp_path, tmp_path / "own") == (3000, 600)


def test_the_tightest_control_group_counts_version_1(tmp_path):
    names = {"memory__usage_in_bytes": 70, "memory__stat": "cache 9\ntotal_inactive_file 20"}
    group(tmp_path / "memory", memory__limit_in_bytes=2**62, **names)
    group(tmp_path / "memory/job", memory__limit_in_bytes=100, **names)
    (tmp_path / "own").write_text("4:cpu,memory:/job\n0::/\n")
    assert probe.cgroup_limit(tmp_path, tmp_path / "own") == (100, 50)


def test_without_control_groups_the_machine_counts(tmp_path, monkeypatch):
    assert probe.cgroup_limit(tmp_path, tmp_path / "missing") is None
    monkeypatch.setattr(probe, "cgroup_limit", lambda: None)
    total, free = probe.memory_nbytes()
    assert 0 < free <= total
    monkeypatch.setattr(probe, "cgroup_limit", lambda: (1000, 400))
    assert probe.memory_nbytes() == (1000, 600)


# ---------------------------------------------------------------- the probe


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """A cache folder of its own, and measurements that count themselves instead of taking seconds."""
    monkeypatch.setenv("MIXOFF_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    calls = []
    known = {"ram_Bps": 17e9, "device_Bps": None, "link_Bps": None, "disk_Bps": 1.5e9, "direct": True}
    monkeypatch.setattr(probe, "_measure", lambda folder: calls.append(folder) or known)
    return calls


def test_a_probe_is_made_once_and_anew_on_request(figures):
    first = probe.probe()
    assert (first.device, first.fast_Bps, first.link_Bps, first.disk_Bps) == ("cpu", 17e9, None, 1.5e9)
    assert probe.named("here").fast_Bps == 17e9 and len(figures) == 1
    probe.probe(cached=False)
    assert len(figures) == 2


def test_another_machine_or_a_damaged_cache_is_measured_again(figures, monkeypatch):
    probe.probe()
    monkeypatch.setattr(probe, "threads_here", lambda: 128)
    probe.probe()
    (folders.cache_folder() / "hardware.json").write_text("{")
    probe.probe()
    assert len(figures) == 3


def test_the_probe_measures_what_it_names(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXOFF_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "read_bandwidth", lambda: 20e9)
    monkeypatch.setattr(probe, "disk_bandwidth", lambda folder: 2e9)
    here = probe.probe()
    assert (here.fast_Bps, here.disk_Bps) == (20e9, 2e9)
    assert all(s.startswith(KINDS) for s in here.sources.values())


# ---------------------------------------------------------------- doctor


def test_the_doctor_says_what_works_and_why(figures, capsys):
    from mixoff.commands import cli

    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["versions"]) >= {"python", "mixoff", "torch", "transformers", "numba"}
    assert report["machine"]["disk_Bps"] == 1.5e9 and len(figures) == 1
    said = {f["what"]: f for f in report["findings"]}
    assert said["experts backend of transformers"]["works"] and all(f["why"] for f in report["findings"])
    assert said["Mixtral-8x7B as `mixed`"]["why"]
    assert cli.main(["doctor", "--refresh"]) == 0
    text = capsys.readouterr().out
    assert "17.0 GB/s (measured)" in text and "1.50 GB/s (measured" in text and len(figures) == 2


def test_a_cache_that_cannot_be_written_only_costs_the_next_probe(tmp_path, monkeypatch, figures, capsys):
    from mixoff.commands import cli

    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("MIXOFF_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(probe.tempfile, "tempdir", str(tmp_path / "tmp"))
    assert cli.main(["doctor"]) == 0 and cli.main(["plan", "tiny-mixtral", "--hardware", "here"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "machine      here: cpu" in out and set(figures) == {tmp_path / "tmp"}
    left = {path.name for path in (tmp_path / "tmp").iterdir()}
    assert not {name for name in left if not name.startswith("torchinductor_")}  # PyTorch's own, where hqq loads it


@pytest.mark.parametrize("change", [{"disk_Bps": "fast"}, {"ram_Bps": None}, {"direct": 3}, {"link_Bps": [1]}])
def test_figures_of_another_kind_are_measured_again(figures, change):
    probe.probe()
    path = folders.cache_folder() / "hardware.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"figures": kept["figures"] | change}))
    assert probe.probe().disk_Bps == 1.5e9 and len(figures) == 2


@pytest.mark.parametrize("name", ["rtx4090", "RTX 4090", "Rtx_4090"])
def test_names_of_machines_are_read_in_any_spelling(name):
    assert probe.named(name).name == "rtx-4090"


def test_short_work_on_a_card_is_not_timed_at_the_pace_of_the_host(monkeypatch):
    """The card spins while every launch is queued between two events; the time is that of one launch."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, end):
            return 30.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("spin"))
    assert probe.device_seconds(lambda: calls.append("work"), launches=3) == pytest.approx(0.01)
    assert calls == ["spin", "record", "work", "work", "work", "record", "synchronize"]
