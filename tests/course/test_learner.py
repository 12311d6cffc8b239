"""Chapters for a learner who solves every exercise: figures then use the learner's functions, behind their wrapper."""

import ast

import pytest

import badges
import chapter_rules
import nb


def solve(book):
    """Put each solution's function into its stub, under the learner's name; returns those names."""
    names = []
    stubs, solutions = (chapter_rules.tagged(book, tag) for tag in ("exercise", "solution"))
    for stub, solution in zip(stubs, solutions, strict=True):
        given, written = (ast.parse(book.cells[i].source).body for i in (stub, solution))
        kept = [node for node in given if not isinstance(node, ast.FunctionDef)]
        kept += [node for node in written if isinstance(node, ast.FunctionDef)]
        for node in kept:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_solution"):
                node.name = node.name.removesuffix("_solution")
                names.append(node.name)
        book.cells[stub].source = ast.unparse(ast.Module(kept, []))
    return names


@pytest.mark.slow
@pytest.mark.parametrize("path", badges.chapters(), ids=lambda path: path.stem)
def test_a_chapter_runs_with_the_learners_own_functions(path):
    book = nb.read(path)
    names = solve(book)
    with nb.this_python():
        nb.execute(book, path.parent)
    said = "\n".join(t for _, cell in chapter_rules.code_cells(book) for t in chapter_rules.output_texts(cell))
    assert [name for name in names if f"from here on your {name} is used" not in said] == []
