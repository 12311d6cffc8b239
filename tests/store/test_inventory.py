"""`mixoff list` and `mixoff rm`: what is there, how large it is, and that nothing else is ever deleted."""

import json
import sys

import filelock
import pytest

import mixoff
from mixoff import MixoffError, folders, models
from mixoff.commands.cli import main
from mixoff.store import inventory, kept
from mixoff.units import format_nbytes
from tiny import BUNDLED


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A cache folder with a kept store and an unfinished conversion, a Hub cache, and a folder with a store."""
    monkeypatch.setenv("MIXOFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    mixoff.convert(BUNDLED, tmp_path / "mine", scheme="none", progress=False)
    mixoff.convert(BUNDLED, kept.stores() / "tiny-0123", scheme="none", progress=False)
    (kept.stores() / "tiny-0123.lock").touch()
    unfinished = kept.stores() / "big-4567.partial"
    (unfinished / "store").mkdir(parents=True)
    (unfinished / "journal").write_text("{}\n")
    (unfinished / "store" / "experts-000.bin").write_bytes(bytes(1000))
    for name, config in (("moe", {"num_local_experts": 8}), ("dense", {})):
        cached(tmp_path / "hub", name, config)
    return tmp_path


def cached(hub, name, config):
    """A model as huggingface_hub caches it: files by hash, and links to them by commit."""
    repo, commit = hub / f"models--org--{name}", "0" * 39 + "1"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for file, raw in (("config.json", json.dumps(config).encode()), ("model.safetensors", bytes(5000))):
        (repo / "blobs" / file).write_bytes(raw)
        (repo / "snapshots" / commit / file).symlink_to(f"../../blobs/{file}")


def listed(capsys, *words):
    assert main(["list", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_that_takes_room_is_listed_with_its_size(machine, capsys):
    report = listed(capsys)
    found = {model["name"].rpartition("/")[2]: model for model in report["models"]}
    kinds = {name: model["kind"] for name, model in found.items()}
    assert kinds == {
        "tiny-mixtral": "bundled", "tiny-0123": "kept", "mine": "store", "big-4567.partial": "unfinished", "moe": "hub",
    }  # fmt: skip
    mine = sum(p.stat().st_size for p in (machine / "mine").iterdir())
    assert found["mine"]["nbytes"] == found["tiny-0123"]["nbytes"] == mine and found["mine"]["bits"] == 16
    assert found["big-4567.partial"]["nbytes"] == 1003 and found["moe"]["nbytes"] == 5000 + 24
    assert report["nbytes"] == sum(model["nbytes"] for model in report["models"])
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "Kept conversions" in out and f"{format_nbytes(mine):>9}  mine (experts in 16 bits)" in out


def test_names_in_the_list_are_models_to_other_commands(machine, capsys):
    names = [model["name"] for model in listed(capsys)["models"] if model["kind"] in ("kept", "store", "bundled")]
    for name in names:
        mixoff.load(name, "6MB").mixoff.close()


def test_removing_frees_what_was_named_and_nothing_else(machine, capsys):
    assert main(["rm", "tiny-0123", "mine", "org/moe", "big-4567.partial", "--yes", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["removed"]) == 4
    assert [model["kind"] for model in listed(capsys)["models"]] == ["bundled"]
    assert list(kept.stores().iterdir()) == [] and {p.name for p in machine.iterdir()} == {"cache", "hub"}
    assert (machine / "hub" / "models--org--dense").is_dir(), "a dense model is not ours"
    assert models.path().is_dir() and folders.cache_folder().is_dir()


def test_a_question_is_asked_first(machine, capsys, monkeypatch):
    assert main(["rm", "mine"]) == 2, "nobody can answer"
    assert "pass --yes" in capsys.readouterr().err and (machine / "mine").is_dir()

    class Person:
        def isatty(self):
            return True

        def readline(self):
            return self.answer

    for answer, stays in (("\n", True), ("no\n", True), ("y\n", False)):
        monkeypatch.setattr(sys, "stdin", Person())
        sys.stdin.answer = answer
        assert main(["rm", "mine"]) == 0 and (machine / "mine").is_dir() is stays
    assert f"delete {'mine'} (" in capsys.readouterr().err


def test_files_of_a_person_are_never_deleted(machine):
    (machine / "mine" / "thesis.docx").touch()
    (machine / "checkpoint").mkdir()
    (machine / "checkpoint" / "config.json").write_text("{}")
    for name, words in (
        ("mine", "holds thesis.docx, which mixoff did not write"),
        ("checkpoint", "is not a store of mixoff, so it stays"),
        ("tiny-mixtral", "is part of mixoff and stays"),
        ("tiny-012", "did you mean"),
        ("org/dense", "no model here is called org/dense"),
    ):
        with pytest.raises(MixoffError, match=words):
            inventory.remove(inventory.find(name, inventory.entries()))
    (machine / "link").symlink_to(machine / "mine")
    assert [entry.path.name for entry in inventory.entries() if entry.kind == "store"] == ["mine"]


def test_a_conversion_at_work_is_not_removed(machine):
    unfinished = next(entry for entry in inventory.entries() if entry.kind == "unfinished")
    with filelock.FileLock(unfinished.path / "lock"), pytest.raises(MixoffError, match="being written by another"):
        inventory.remove(unfinished)
    assert (unfinished.path / "store" / "experts-000.bin").exists()
    inventory.remove(unfinished)
    assert not unfinished.path.exists()


def test_what_was_made_of_a_gguf_s_metadata_is_listed_and_removed(machine, capsys):
    folder = folders.cache_folder() / "gguf" / "tiny-Q4_K_M-0123"
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    (folder.parent / "tmp9f").mkdir()  # one in the making
    (made,) = [model for model in listed(capsys)["models"] if model["kind"] == "gguf"]
    assert made["nbytes"] == 8 and made["name"] == str(folder)
    assert main(["list"]) == 0 and "Configuration and tokenizer of GGUF files" in capsys.readouterr().out
    (folder / "mine.bin").write_text("")
    assert main(["rm", folder.name, "--yes"]) == 2 and folder.exists()
    (folder / "mine.bin").unlink()
    assert main(["rm", folder.name, "--yes"]) == 0 and not folder.exists()
