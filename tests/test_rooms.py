"""The package's rooms: what each may import, how large it is, and that no import runs up or round."""

import pytest

import rooms

LONGEST = 450  # lines of a file


@pytest.fixture(scope="module")
def arrows():
    return rooms.rooms(rooms.graph())


def test_contracts_hold(root, monkeypatch, capsys):
    """`[tool.importlinter]` in pyproject.toml: layers, and what each room must not know."""
    from importlinter.cli import lint_imports

    monkeypatch.chdir(root)
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


def test_there_is_no_circle(arrows):
    imports = rooms.graph()
    modules = {m: set(imports.find_modules_directly_imported_by(m)) for m in imports.modules}
    assert (rooms.circles(arrows), rooms.circles(modules)) == ([], [])


def test_there_are_twelve_floors(arrows):
    assert max(rooms.floors(arrows).values()) <= 12


def test_files_and_rooms_are_small(root):
    sizes = {room: sum(map(rooms.lines, files)) for room, files in rooms.sources().items()}
    assert {room for room, size in sizes.items() if size > 0.12 * sum(sizes.values())} == set()
    files = {str(p.relative_to(root)): rooms.lines(p) for files in rooms.sources().values() for p in files}
    assert {name: n for name, n in files.items() if n > LONGEST} == {}


def test_every_room_says_what_it_holds(root):
    for face in (root / "mixoff").rglob("__init__.py"):
        assert len(face.read_text(encoding="utf-8").split('"""')[1].strip()) > 30, f"{face} needs a docstring"


def test_circles_and_floors_of_a_small_house():
    house = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert rooms.circles(house) == [{"b", "c"}]
    assert rooms.floors(house) == {"a": 2, "b": 1, "c": 2, "d": 1}
