"""The house in figures: lines per room, floors and circles from the imports, functions, and journeys of three calls.

    python benchmarks/rooms.py              # rooms, floors, circles, functions
    python benchmarks/rooms.py --journeys   # and how often `load`, `plan` and `convert` change rooms

A room is a folder of the package, or a module next to them. A room's floor is one more than the highest floor that it
imports. A journey is what a call on the bundled model enters, as Python's profiler sees it; returns are not counted.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
import tempfile
from functools import cache
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mixoff"


def room_of(module: str) -> str:
    """The room that a module belongs to; the package's face is a room of its own."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def sources() -> dict[str, list[Path]]:
    """Files of each room: Python, and what the widgets and models keep next to it as code."""
    files: dict[str, list[Path]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*")):
        if path.suffix in (".py", ".js", ".css") and "__pycache__" not in path.parts:
            parts = path.relative_to(ROOT).with_suffix("").parts
            files.setdefault(parts[1] if parts[1] != "__init__" else PACKAGE, []).append(path)
    return files


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def graph(type_checking: bool = False) -> grimp.ImportGraph:
    """The package's imports, those inside functions included, those for type checkers on request."""
    sys.path.insert(0, str(ROOT))
    return grimp.build_graph(PACKAGE, exclude_type_checking_imports=not type_checking, cache_dir=None)


def rooms(imports: grimp.ImportGraph) -> dict[str, set[str]]:
    """Each room's imports of other rooms."""
    found: dict[str, set[str]] = {room_of(module): set() for module in imports.modules}
    for module in imports.modules:
        found[room_of(module)] |= {room_of(m) for m in imports.find_modules_directly_imported_by(module)}
    return {room: others - {room} for room, others in found.items()}


def circles(arrows: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes that reach each other."""

    @cache
    def reached(node: str) -> frozenset[str]:
        seen, queue = set(), [node]
        while queue:
            for other in arrows.get(queue.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        return frozenset(seen)

    found = {frozenset({b for b in reached(a) if a in reached(b)} | {a}) for a in arrows if a in reached(a)}
    return [set(circle) for circle in found]


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room. Rooms in a circle share the floor that they have without the circle's arrows."""
    tied = {room: circle for circle in circles(arrows) for room in circle}

    @cache
    def floor(room: str) -> int:
        return 1 + max((floor(other) for other in arrows[room] - tied.get(room, set())), default=0)

    return {room: floor(room) for room in arrows}


def functions() -> list[int]:
    """Lines of every function and method of the package."""
    trees = (
        ast.parse(p.read_text(encoding="utf-8")) for files in sources().values() for p in files if p.suffix == ".py"
    )
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return sorted(n.end_lineno - n.lineno + 1 for tree in trees for n in ast.walk(tree) if isinstance(n, kinds))


def journey(call) -> tuple[int, int, int]:
    """Modules and rooms that `call()` enters, and how often it goes from one room to another."""
    modules, steps = set(), 0

    def watch(frame, event, _):
        nonlocal steps
        if event != "call" or frame.f_code.co_name == "<module>":
            return
        here, caller = frame.f_globals.get("__name__", ""), frame.f_back and frame.f_back.f_globals.get("__name__", "")
        if here.startswith(f"{PACKAGE}."):
            modules.add(here)
            steps += bool(caller) and caller.startswith(f"{PACKAGE}.") and room_of(caller) != room_of(here)

    call()  # once unseen: what is imported and kept on the way is there then
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return len(modules), len(set(map(room_of, modules))), steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--journeys", action="store_true", help="also run load, plan and convert on the bundled model")
    args = parser.parse_args()
    imports = graph()
    arrows = rooms(imports)
    floor_of = floors(arrows)
    sizes = {room: sum(map(lines, files)) for room, files in sources().items()}
    total = sum(sizes.values())
    print("| room | floor | lines | share |\n|---|---|---|---|")
    for room in sorted(sizes, key=lambda room: (-floor_of.get(room, 0), room)):
        print(f"| {room} | {floor_of.get(room, '-')} | {sizes[room]:,} | {100 * sizes[room] / total:.1f} % |")
    modules = {m: set(imports.find_modules_directly_imported_by(m)) for m in imports.modules}
    longest = max((p for files in sources().values() for p in files), key=lines)
    lengths = functions()
    tenth = statistics.quantiles(lengths, n=10)[-1]
    print(
        f"\n{total:,} lines, {len(modules)} modules, {max(floor_of.values())} floors, {len(circles(arrows))} circles of"
    )
    print(
        f"rooms, {len(circles(modules))} of modules; longest file {longest.relative_to(ROOT)} ({lines(longest)} lines);"
    )
    middle = statistics.median(lengths)
    print(f"{len(lengths):,} functions of {middle:.0f} lines in the median, {tenth:.0f} at the 90th percentile")
    if args.journeys:
        import mixoff

        folder = mixoff.models.path()
        print("\n| journey | modules | rooms | steps between rooms |\n|---|---|---|---|")

        def convert():
            with tempfile.TemporaryDirectory() as place:
                mixoff.convert(folder, Path(place) / "store", "none", jobs=1, progress=False)

        calls = {
            "load": lambda: mixoff.load(folder).mixoff.close(),
            "plan": lambda: mixoff.plan(folder),
            "convert": convert,
        }
        for name, call in calls.items():
            print("| {} | {} | {} | {} |".format(name, *journey(call)))


if __name__ == "__main__":
    main()
