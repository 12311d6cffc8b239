"""What the repository says of itself is said once, and says the truth: dependencies, address, rooms, light import."""

import re
import subprocess
import sys
import tarfile
import zipfile

from packaging.requirements import Requirement

import badges

PROJECT = badges.project()

# What Colab's runtime of August 2026 has (googlecolab/backend-info); for the last five a version it surely exceeds
COLAB = {
    "torch": "2.11.0",
    "transformers": "5.15.0",
    "accelerate": "1.14.0",
    "huggingface_hub": "1.27.0",
    "numpy": "2.1.3",
    "matplotlib": "3.10.0",
    "ipywidgets": "7.7.1",
    "anywidget": "0.9.21",
    "numba": "0.60.0",
    "psutil": "5.9.5",
    "rich": "13.9.4",
    "safetensors": "0.5.0",
    "filelock": "3.15.0",
    "tqdm": "4.66.0",
    "prompt_toolkit": "3.0.53",
}
HEAVY = ("torch", "transformers", "numba", "ipywidgets", "anywidget", "matplotlib", "hqq", "triton", "rich", "numpy")


def parsed(lines):
    """Requirements by normalized name, comments left out."""
    found = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    return {re.sub(r"[-_.]+", "-", r.name).lower(): (str(r.specifier), str(r.marker or "")) for r in found}


def test_requirements_txt_equals_pyproject(root):
    extras = PROJECT["optional-dependencies"]
    want = parsed(PROJECT["dependencies"] + extras["lab"] + extras["test"] + extras["serve"] + extras["reference"])
    assert parsed((root / "requirements.txt").read_text(encoding="utf-8").splitlines()) == want


def test_environment_yml_defers_to_requirements_txt(root):
    conda, pip = (root / "environment.yml").read_text(encoding="utf-8").split("- pip:")
    assert re.findall(r"^\s+- (.+)$", pip, re.M) == ["-r requirements.txt", "-e ."]
    versions = Requirement(f"python{PROJECT['requires-python']}").specifier
    assert versions.contains(re.search(r"- python=([\d.]+)", conda)[1])


def test_floors_admit_colab():
    """A floor above what Colab has would replace a package that it has imported, and ask for a restart."""
    core = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
    assert set(core) == set(COLAB), "state here which version of each dependency Colab has"
    assert {n: str(core[n].specifier) for n in core if not core[n].specifier.contains(COLAB[n])} == {}


def test_version_is_stated_once_for_people_and_once_for_pip():
    import mixoff

    assert mixoff.__version__ == PROJECT["version"]


def test_changelog_knows_the_version(root):
    assert f"\n## {PROJECT['version']}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the address


ADDRESS = re.compile(r"github(?:\.com)?/([\w.-]+/mixoff)\b")


def addresses(path):
    """Every `owner/name` of a repository called mixoff that a file names, with its host."""
    try:
        return ADDRESS.findall(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        return []


def generated(name):
    """Files that repeat the address: made by course/, or held to it by a test here."""
    return name in ("README.md", "CITATION.cff") or re.fullmatch(r"(colab|notebooks)/[^/]+\.ipynb", name)


def test_the_address_stands_once(root, project_files):
    found = {name: addresses(root / name) for name in project_files if not generated(name)}
    assert {name: owners for name, owners in found.items() if owners} == {"pyproject.toml": [badges.slug()]}


def test_generated_files_name_no_other_address(root, project_files):
    found = {name: set(addresses(root / name)) - {badges.slug()} for name in project_files if generated(name)}
    assert {name: others for name, others in found.items() if others} == {}


def test_what_a_person_wrote_in_a_chapter_has_no_address():
    for path in badges.chapters():
        _, *cells = badges.nbformat.read(path, as_version=4).cells
        assert not [cell.source for cell in cells if ADDRESS.search(cell.source)], path.name


def test_readme_carries_the_generated_chapters(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    for block in (badges.readme_first(), badges.readme_block()):
        assert block in readme, "run course/nb.py tidy"
    assert badges.with_badges(readme) == readme


def test_the_first_page_is_short(root):
    """What mixoff is, does and does not do comes before the course, in at most 120 lines."""
    before, heading, _ = (root / "README.md").read_text(encoding="utf-8").partition("\n## The course\n")
    assert heading and len(before.splitlines()) <= 120


def test_citation_names_this_version_and_address(root):
    text = (root / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", text, re.M)[1] == PROJECT["version"]
    assert re.search(r"^repository-code: (.+)$", text, re.M)[1] == badges.repository()
    assert re.search(r"^license: (.+)$", text, re.M)[1] == PROJECT["license"]


# ---------------------------------------------------------------- the rooms


def test_readme_lists_the_rooms(root, project_files):
    """Below `## The rooms`: every folder of the package, one a line, each with what it holds."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## The rooms\n.*?^```text\n(.*?)^```", readme, re.M | re.S)
    assert block, "README.md needs a heading '## The rooms' followed by a ```text block"
    rows = [line.split("#", 1) for line in block[1].splitlines() if line.strip()]
    assert [row for row in rows if len(row) != 2 or not row[1].strip()] == [], "each line is `folder  # what it holds`"
    listed = {row[0].strip().rstrip("/").removeprefix("mixoff/") for row in rows}
    rooms = {name.split("/")[1] for name in project_files if re.fullmatch(r"mixoff/\w+/__init__\.py", name)}
    unlisted, missing = sorted(rooms - listed), sorted(listed - rooms) if "runtime" in rooms else []
    assert (unlisted, missing) == ([], [])


# ---------------------------------------------------------------- the package


def modules_after(statement):
    """Names in sys.modules after a statement ran in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_is_light():
    """Structure rather than time: none of the packages that take seconds is loaded."""
    loaded = modules_after("import mixoff")
    assert "mixoff" in loaded
    assert loaded & {*HEAVY, "mixoff.classroom"} == set()


def test_classroom_is_never_loaded_by_the_rest():
    loaded = modules_after("import mixoff.loading.load, mixoff.store.source, mixoff.commands.cli")
    assert {name for name in loaded if name.startswith("mixoff.classroom")} == set()


def test_wheel_and_sdist_hold_what_they_should(root, tmp_path):
    code = "import hatchling.build as b, sys; print(b.build_wheel(sys.argv[1]), b.build_sdist(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=True)
    wheel, sdist = (archive_names(tmp_path / name) for name in done.stdout.split()[-2:])
    assert {"mixoff/__init__.py", "mixoff/classroom/checks/ch00.py", "mixoff/models/tiny-mixtral/config.json"} <= wheel
    assert [name for name in wheel if not name.startswith(("mixoff/", "mixoff-"))] == []
    inside = {name.split("/", 1)[1] for name in sdist if "/" in name}
    assert {"go.py", "tests/conftest.py", "course/nb.py", "notebooks/00_start_here.ipynb", "LICENSE"} <= inside


def archive_names(path):
    """Members of a wheel or a source distribution."""
    if path.suffix == ".whl":
        return set(zipfile.ZipFile(path).namelist())
    with tarfile.open(path) as archive:
        return set(archive.getnames())
