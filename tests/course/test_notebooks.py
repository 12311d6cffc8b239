"""The machinery around chapters does what it promises: the guard fails where it should, colab/ is in step and runs.

That chapters run and print what is stored is checked by nbval, in the same pytest run (`go.py test`).
"""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from nbval.plugin import get_sanitize_patterns

import badges
import chapter_rules
import make_colab
import nb
from chapters import together
from go import NBVAL

PINS, SANITIZE = "tests/fakes/colab_pins.txt", "tests/nbval_sanitize.cfg"
COLAB_ENV = {"COLAB_RELEASE_TAG": "release-colab-fake", "COLAB_GPU": "1", "COLAB_BACKEND_VERSION": "next"}


@pytest.fixture
def chapter(tmp_path):
    """A copy of all chapters, with what their widgets held, in a folder of its own; the first one's path, to spoil."""
    shutil.copytree(badges.ROOT / "docs" / "widgets", tmp_path / "docs" / "widgets")
    folder = shutil.copytree(badges.ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    return badges.chapters(folder)[0]


def code_cell(book, n=2):
    """The nth code cell of a notebook, counted from 0."""
    return chapter_rules.code_cells(book)[n][1]


# ---------------------------------------------------------------- the guard


@pytest.mark.parametrize("path", badges.chapters(), ids=lambda path: path.stem)
def test_chapter_is_executed_and_clean(path):
    assert nb.problems(path) == []


def unexecuted(book):
    code_cell(book).execution_count = None


def out_of_order(book):
    code_cell(book).execution_count = 99


def stderr(book):
    code_cell(book).outputs.append(nbformat.v4.new_output("stream", name="stderr", text="UserWarning: careful"))


def stored_error(book):
    code_cell(book).outputs.append(nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[]))


def leaked_path(book):
    path = "/".join(["", "home", "ada", "x"])  # in pieces, or this file would leak
    code_cell(book).outputs.append(nbformat.v4.new_output("stream", text=f"saved in {path}"))


def leaked_address(book):
    code_cell(book).outputs.append(nbformat.v4.new_output("stream", text="<object at 0x7f12ab34cd56>"))


def leaked_token(book):
    book.cells[1].source += "\n\nhf_" + "a" * 30


def image_without_caption(book):
    data = {"image/png": "aGk=", "text/plain": "<Figure size 640x480 with 1 Axes>"}
    code_cell(book).outputs.append(nbformat.v4.new_output("display_data", data=data))


def open_drawing(book):
    figure = next(cell for _, cell in chapter_rules.code_cells(book) if chapter_rules.figures(cell))
    figure.metadata.tags.remove("figure")


def saved_widgets(book):
    book.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}


def other_kernel(book):
    book.metadata["kernelspec"]["name"] = "conda-env"


def lost_plan(book):
    del book.metadata["mixoff"]


def too_long(book):
    code_cell(book).source = "x = 1\n" * 36


def too_large(book):
    code_cell(book).outputs.append(nbformat.v4.new_output("stream", text="x" * 600_000))


def too_wordy(book):
    book.cells[1].source += "\n\n" + "word " * 2200


def few_outputs(book):
    for cell in book.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.outputs.clear()


def shell_line(book):
    code_cell(book).source = "!ls"


def semicolon(book):
    code_cell(book).source += ";"


def no_promise(book):
    book.cells[1].source = book.cells[1].source.splitlines()[0]


def no_setup(book):
    code_cell(book, 0).metadata.tags.remove("setup")


def loads_onto_a_card(book):
    setup = code_cell(book, 0)
    setup.source = setup.source.replace("gpu=False", "")


def no_solution(book):
    for i in chapter_rules.tagged(book, "solution"):
        book.cells[i].metadata.tags.remove("solution")


def solved_stub(book):
    book.cells[chapter_rules.tagged(book, "exercise")[0]].source = "def f(): return 1"


def failing_solution(book):
    cell = book.cells[chapter_rules.tagged(book, "solution")[0]]
    cell.outputs = [nbformat.v4.new_output("stream", text="[FAIL] case 2: 4, expected 10\n")]


def link_in_a_formula(book):
    book.cells[-1].source += "\n\n$$t_\\text{[split](../docs/glossary.md#split)} = 1$$"


def no_questions(book):
    for cell in book.cells:
        cell.source = cell.source.replace("## Five questions", "## Some questions")


def no_instructor(book):
    book.cells[chapter_rules.tagged(book, "instructor")[0]].metadata.tags.remove("instructor")


def old_badge(book):
    book.cells[0].source = book.cells[0].source.replace("/blob/", "/tree/")


SPOILERS = {
    unexecuted: "execution count None",
    out_of_order: "execution count 99",
    stderr: "wrote to stderr",
    stored_error: "stores the error ValueError",
    leaked_path: "a path of one machine",
    leaked_address: "a memory address",
    leaked_token: "an access token",
    image_without_caption: "without a caption",
    open_drawing: "so that its code opens folded",
    saved_widgets: "widget state is saved",
    other_kernel: "kernel is not python3",
    lost_plan: "lacks mixoff.teach_min",
    too_long: "longest 36 lines",
    too_large: "at most 600000",
    too_wordy: "words, wanted 1000 to 2200",
    few_outputs: "0 code cells have outputs",
    shell_line: "a shell or pip line",
    semicolon: "ends with ';'",
    no_promise: "the promise",
    no_setup: "tagged setup",
    loads_onto_a_card: "says setup(gpu=False)",
    no_solution: "no cell tagged solution",
    solved_stub: "is not a stub",
    failing_solution: "its check does not accept: '[FAIL] case 2",
    link_in_a_formula: "has a link inside a formula",
    no_questions: "'Five questions' is missing",
    no_instructor: "instructor notes are missing",
    old_badge: "generated first cell is out of date",
}


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_guard_fails_on(spoil, chapter):
    book = nb.read(chapter)
    spoil(book)
    nb.write(book, chapter)
    assert any(SPOILERS[spoil] in problem for problem in nb.problems(chapter)), nb.problems(chapter)


def test_copy_that_nobody_spoiled_passes(chapter):
    assert nb.problems(chapter) == []


def test_tidy_mends_what_it_may_and_changes_nothing_twice(chapter):
    book = nb.read(chapter)
    before = chapter.read_bytes()
    saved_widgets(book), other_kernel(book), old_badge(book)
    code_cell(book).metadata["ExecuteTime"] = "now"
    nb.write(book, chapter)
    for _ in range(2):
        book = nb.read(chapter)
        nb.tidy(book, chapter)
        nb.write(book, chapter)
        assert chapter.read_bytes() == before


def test_run_stores_outputs_of_a_fresh_kernel(tmp_path):
    path = tmp_path / "00_x.ipynb"
    book = nb.skeleton("X")
    book.cells = [nb.code("import os, sys", "print(1 + 1, 'MPLBACKEND' in os.environ)", tag="setup")]
    nb.write(book, path)
    nb.run(path)
    _, cell = nb.read(path).cells
    assert cell.execution_count == 1
    assert cell.outputs[0].text.startswith("2 ")


def test_new_chapter_has_every_part_but_its_content(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(nb, "ROOT", tmp_path)
    assert nb.new("01_next", "Next") == 0
    assert nb.new("01_next", "Next") == 1, "an existing chapter is never overwritten"
    book = nb.read(tmp_path / "notebooks" / "01_next.ipynb")
    form = [p for rule in (chapter_rules.opening, chapter_rules.headings, chapter_rules.metadata) for p in rule(book)]
    assert form == []


def test_chapters_link_to_their_neighbours(tmp_path):
    for name, title in (("00_a", "First"), ("01_b", "Second"), ("02_c", "Third")):
        nb.write(nbformat.v4.new_notebook(cells=[nb.text(f"# {title}")]), tmp_path / f"{name}.ipynb")
    second = badges.header(tmp_path / "01_b.ipynb")
    assert "[← First](00_a.ipynb)" in second and "[Third →](02_c.ipynb)" in second
    assert "←" not in badges.header(tmp_path / "00_a.ipynb") and "→" not in badges.header(tmp_path / "02_c.ipynb")
    assert badges.colab_link("02_c.ipynb") in badges.colab_header(tmp_path / "01_b.ipynb")


@pytest.mark.slow
@pytest.mark.parametrize("path", badges.chapters(), ids=lambda path: path.stem)
def test_every_cell_may_run_twice(path):
    """As learners do: a cell that spoils what it needs itself would end in an error."""
    book = nb.read(path)
    twice = [copy.deepcopy(cell) for _, cell in chapter_rules.code_cells(book) for _ in range(2)]
    for i, cell in enumerate(twice):
        cell.id = f"cell-{i}"
    with nb.this_python():
        nb.execute(nbformat.v4.new_notebook(cells=twice), path.parent)


# ---------------------------------------------------------------- nbval


def test_nbval_forgives_measured_numbers_and_pixels_alone(root):
    patterns = get_sanitize_patterns((root / SANITIZE).read_text(encoding="utf-8"))
    assert len(patterns) == 2

    def clean(text):
        return functools.reduce(lambda text, pattern: re.sub(*pattern, text), patterns, text)

    assert clean("18.2 tokens/s measured") == clean("1,207 tokens/s measured")
    assert clean("0.3 s measured") == clean("12 s measured")
    assert clean('<img src="data:image/png;base64,ab+/" alt="A">') == clean(
        '<img src="data:image/png;base64,c=" alt="A">'
    )
    assert clean('<img src="data:image/png;base64,ab" alt="A">') != clean(
        '<img src="data:image/png;base64,ab" alt="B">'
    )
    for a, b in (("3 hits", "4 hits"), ("3 hits, 12 s measured", "4 hits, 12 s measured"), ("3 of 8 x", "3 of 9 x")):
        assert clean(a) != clean(b)


@pytest.mark.parametrize(("stored", "code"), [("2 misses, 0.7 s measured", 0), ("3 misses, 0.7 s measured", 1)])
def test_nbval_compares_captions(stored, code, root, tmp_path):
    """A figure whose caption no longer says what is stored fails; a measured time may differ."""
    path = tmp_path / "00_x.ipynb"
    caption = "display({'image/png': 'aGk=', 'text/plain': '2 misses, 1.5 s measured'}, raw=True)"
    book = nbformat.v4.new_notebook(cells=[nb.code(caption, tag="setup")])
    with nb.this_python():
        nb.execute(book, tmp_path)
    book.cells[0].outputs[0].data["text/plain"] = stored
    nb.write(book, path)
    flags = [flag.replace(SANITIZE, str(root / SANITIZE)) for flag in NBVAL]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *flags, path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout


# ---------------------------------------------------------------- Colab


def test_colab_is_in_step_with_chapters():
    assert make_colab.drift() == {}, "run course/make_colab.py"


def test_drift_is_seen_and_mended(chapter):
    folder = chapter.parents[1]
    stale = folder / "colab" / "99_gone.ipynb"
    stale.parent.mkdir()
    stale.write_text("{}")
    changes = make_colab.drift(folder)
    assert changes[stale] is None and folder / "colab" / chapter.name in changes
    make_colab.apply(changes)
    assert make_colab.drift(folder) == {} and not stale.exists()


def install_source():
    """Code of the install cell that every generated notebook has."""
    return make_colab.install_cell().source


def test_install_cell_keeps_what_colab_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append((command, check)))
    monkeypatch.setenv("MIXOFF_SOURCE", "mixoff-1-py3-none-any.whl")
    exec(install_source(), {})
    command, check = calls[0]
    assert check and command[1:4] == ["-m", "pip", "install"] and command[-1] == "mixoff-1-py3-none-any.whl"
    import torch

    held = (tmp_path / command[command.index("-c") + 1]).read_text().split()
    assert f"torch=={torch.__version__}" in held
    assert {line.split("==")[0] for line in held} <= set(make_colab.HELD)


def test_install_cell_never_installs_from_an_address_that_is_not_ours(tmp_path, monkeypatch):
    """Until pyproject.toml says that the address is the project's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda *a, **kw: pytest.fail("nothing is to be installed"))
    monkeypatch.delenv("MIXOFF_SOURCE", raising=False)
    monkeypatch.setattr(badges, "settings", lambda: {"tool": {"mixoff": {"published": False}}})
    assert "git+https://github" not in install_source()
    with pytest.raises(SystemExit, match=r"no public address yet[\s\S]*MIXOFF_SOURCE"):
        exec(install_source(), {})


def test_install_cell_names_the_address_once_it_is_published(monkeypatch):
    published = badges.settings() | {"tool": {"mixoff": {"published": True}}}
    monkeypatch.setattr(badges, "settings", lambda: published)
    assert f"mixoff @ git+{badges.repository()}@main" in install_source()


def test_colab_asks_for_a_card_only_where_a_chapter_uses_it(root):
    asked = {
        p.name[:2]: json.loads(p.read_text("utf-8"))["metadata"].get("accelerator") for p in (root / "colab").iterdir()
    }
    assert {number for number, kind in asked.items() if kind} == {"15"}


def test_links_of_generated_chapters_are_whole_addresses(root):
    for path in (root / "colab").glob("*.ipynb"):
        assert "](../" not in path.read_text("utf-8") and "Save a copy in Drive" in path.read_text("utf-8")


def test_install_cell_does_nothing_where_mixoff_is_there(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **kw: pytest.fail("nothing is to be installed"))
    exec(install_source(), {})


RUN_AS_COLAB = """
import pathlib, sys
import nbformat
import chapter_rules, nb
profile, *paths = map(pathlib.Path, sys.argv[1:])
startup = profile / "profile_default" / "startup"
startup.mkdir(parents=True)
(startup / "00-colab.py").write_text("import google.colab.output\\n")
chapters = [[cell for _, cell in chapter_rules.code_cells(nb.read(path))] for path in paths]
book = nbformat.v4.new_notebook(cells=[cell for chapter in chapters for cell in chapter])
with nb.this_python(str(profile)):
    nb.execute(book, profile)
assert [cell.execution_count for cell in book.cells] == list(range(1, len(book.cells) + 1))
outputs = iter([bool(cell.outputs) for cell in book.cells])
print(*(sum(next(outputs) for _ in chapter) for chapter in chapters))
"""


def run_as_colab(python, paths, root, folder, source=None):
    """Runs generated notebooks with Colab's package imported and its variables set, all in one kernel, because starting
    one takes as long as a chapter. Returns the finished process, which prints how many cells of each have outputs.

    source: what the install cell is to install; where mixoff is there already, it installs nothing.
    """
    places = [root / "course", root / "tests" / "fakes"]
    colab = {"PYTHONPATH": os.pathsep.join(map(str, places)), "MIXOFF_SOURCE": str(source or root)}
    command = [python, "-c", RUN_AS_COLAB, folder / "ipython", *(root / "colab" / path.name for path in paths)]
    return subprocess.run(command, env=os.environ | COLAB_ENV | colab, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("paths", together(badges.chapters()))
def test_generated_chapters_run_as_on_colab(paths, root, tmp_path):
    done = run_as_colab(sys.executable, paths, root, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = list(map(int, done.stdout.split()))
    assert len(counts) == len(paths) and min(counts) >= chapter_rules.MIN_CELLS_WITH_OUTPUT


# ---------------------------------------------------------------- Colab's versions
# An environment of its own needs a package index and some forty packages, and with it every chapter and the tests of
# the core run once more: as long as all of CI. So these tests are slow ones; in CI the chapters of `together` run under
# the emulation above, with the versions of this environment.

VERSIONS = """
import importlib.metadata as m, importlib.util as u, json
spec = u.find_spec("mixoff")
names = "ipython", "ipywidgets", "numpy", "transformers", "huggingface_hub", "traitlets", "pillow", "torch"
print(json.dumps([{name: m.version(name) for name in names}, spec and spec.origin]))
"""


def versions(python, folder):
    """What Colab's environment has of the packages that chapters meet, and where it finds mixoff."""
    said = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True, cwd=folder).stdout
    return json.loads(said)


@pytest.fixture(scope="session")
def colab_python(tmp_path_factory):
    """An environment over this one in which Colab's versions come first, and in which mixoff is not installed."""
    overlay = tmp_path_factory.mktemp("colab") / "venv"
    subprocess.run([sys.executable, "-m", "venv", overlay], check=True)
    scripts, python = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    python = overlay / scripts / python
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    below = subprocess.run([sys.executable, "-c", purelib], capture_output=True, text=True, check=True).stdout.strip()
    own = subprocess.run([python, "-c", purelib], capture_output=True, text=True, check=True).stdout.strip()
    install = [python, "-m", "pip", "install", "-q", "-r", badges.ROOT / PINS]
    if subprocess.run(install, capture_output=True, text=True).returncode:
        pytest.skip("pip cannot fetch Colab's versions here")
    with open(os.path.join(own, "below.pth"), "w") as link:
        link.write(f"{below}\n")  # the folder alone: what it links to itself, as this checkout, stays out
    return python


@pytest.fixture(scope="session")
def wheel(root, tmp_path_factory):
    """The wheel under test."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, root]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_install_cell_installs_the_wheel_and_leaves_colabs_versions(root, tmp_path, colab_python, wheel):
    before, where = versions(colab_python, tmp_path)
    pins = dict(line.split("==") for line in (root / PINS).read_text().split() if "==" in line)
    assert where is None and before.items() >= {name: pins[name] for name in before.keys() & pins.keys()}.items()
    assert {"transformers", "huggingface_hub", "numpy", "ipywidgets", "ipython"} <= pins.keys()
    done = run_as_colab(colab_python, badges.chapters()[:1], root, tmp_path, wheel)
    assert done.returncode == 0, done.stderr[-3000:]
    after, where = versions(colab_python, tmp_path)
    assert after == before and str(colab_python.parents[1]) in where


@pytest.mark.slow
@pytest.mark.parametrize("path", badges.chapters()[1:], ids=lambda path: path.stem)
def test_generated_chapter_runs_with_colabs_versions(path, root, tmp_path, colab_python, wheel):
    done = run_as_colab(colab_python, [path], root, tmp_path, wheel)
    assert done.returncode == 0, done.stderr[-3000:]


CORE = ("test_offload", "test_store", "test_hub", "test_published", "test_families", "test_chat")


@pytest.mark.slow
@pytest.mark.parametrize("name", CORE)
def test_core_holds_with_colabs_versions(name, root, colab_python):
    """Families that the older transformers lacks are left out by name; every class of experts that it has is served."""
    choice = ["-k", "decorated or classes or kind or flag or mixtral or olmoe"] if name == "test_families" else []
    file = next((root / "tests").rglob(f"{name}.py"))
    command = [colab_python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run([*command, *choice], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
