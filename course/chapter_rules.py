"""What a chapter must be: executed, clean, small, and in the form that every chapter has.

Each rule takes a notebook and yields sentences, one a problem, each naming the cell and the way out. They are applied
by `course/nb.py check`, by tests and by the pre-commit hook. Does not know how a notebook is run or written.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

MAX_FILE_NBYTES = 600_000
MAX_CELLS, MIN_CELLS_WITH_OUTPUT = 60, 8
MEDIAN_LINES, P90_LINES, MAX_LINES = 8, 20, 35
WORDS = (1000, 2200)
EXERCISES = (2, 4)
QUESTIONS = 5
SKIPPED = "nbval-skip"  # cells that a machine without a card cannot run: not executed, not compared
FOLDED_TAGS = {"solution", "figure", "hidden"}  # code cells that open folded
FIGURE, IMAGE = "<figure", re.compile(r'"data:image/png;base64,[^"]*"')  # as `show` displays them

LEAKS = {
    "a path of one machine": re.compile(
        r"(?<![\w.:/])(?:/(?:home|root|Users|tmp|work|mnt|opt|content)/|[A-Z]:\\)[\w.-]+"
    ),
    "a memory address": re.compile(r"\b0x[0-9a-fA-F]{6,}"),
    "an access token": re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9-]{20,})"),
}
UNWELCOME = {
    "a shell or pip line": re.compile(r"^\s*[!%]", re.M),
    "input()": re.compile(r"\binput\("),
    "ipywidgets.Output (fails under nbval)": re.compile(r"\bOutput\("),
    "interact (fails under nbval)": re.compile(r"\binteract\("),
}
HEADINGS = ("You will be able to", "What this leaves out", "Audit a claim", "Summary", "Five questions")
HEADINGS += ("Further reading",)
METADATA = {"teach_min": int, "exercise_min": int, "needs": list, "workshops": list}


# ---------------------------------------------------------------- looking at cells


def tags(cell) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", ()))


def code_cells(nb) -> list[tuple[int, dict]]:
    """Index and cell of every code cell that is meant to run everywhere."""
    return [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == "code" and SKIPPED not in tags(c)]


def tagged(nb, tag: str) -> list[int]:
    """Indices of the cells that carry a tag."""
    return [i for i, c in enumerate(nb.cells) if tag in tags(c)]


def written(nb) -> list[str]:
    """The Markdown that a person wrote."""
    return [c.source for c in nb.cells if c.cell_type == "markdown" and "generated" not in tags(c)]


def output_texts(cell) -> Iterator[str]:
    """Every piece of text in a cell's outputs, images left out."""
    for output in cell.get("outputs", ()):
        yield output.get("text", "")
        yield "\n".join(output.get("traceback", ()))
        for mime, content in output.get("data", {}).items():
            if not mime.startswith("image/") or mime == "image/svg+xml":
                yield IMAGE.sub('""', str(content))


def figures(cell) -> list:
    """The outputs of a cell that `show` displayed."""
    return [o for o in cell.get("outputs", ()) if o.get("data", {}).get("text/html", "").startswith(FIGURE)]


def count_words(markdown: str) -> int:
    """Words as a reader counts them: no HTML tags, no addresses of links, no rules of tables."""
    text = re.sub(r"<[^>]+>|\]\([^)]*\)|[|:-]{3,}", " ", markdown)
    return len(re.findall(r"[^\W_][\w'’.,/-]*", text))


# ---------------------------------------------------------------- executed and clean


def execution(nb) -> Iterator[str]:
    """Cells ran once, from top to bottom: strict nbval checks nothing on a cell that was never run."""
    for n, (i, cell) in enumerate(code_cells(nb), start=1):
        if not cell.source.strip():
            yield f"cell {i} is empty: delete it"
        if cell.execution_count != n:
            yield f"cell {i} has execution count {cell.execution_count}, expected {n}: run course/nb.py run"


def outputs(nb) -> Iterator[str]:
    """No error that was not meant, nothing on stderr, a caption in words for every image."""
    for i, cell in code_cells(nb):
        for output in cell.outputs:
            data = output.get("data", {})
            if output.output_type == "error" and "raises-exception" not in tags(cell):
                yield f"cell {i} stores the error {output.ename}: mend it, or tag it raises-exception"
            if output.get("name") == "stderr":
                yield f"cell {i} wrote to stderr: {output.text.strip()[:60]!r}"
            if "image/png" in data:
                yield f"cell {i} shows an image without a caption: use show(fig, caption, alt=...)"


def drawing(nb) -> Iterator[str]:
    """Code that draws a figure opens folded: what it computes belongs into a cell above it."""
    for i, cell in code_cells(nb):
        if figures(cell) and not FOLDED_TAGS & tags(cell):
            yield f"cell {i} draws a figure: tag it figure, so that its code opens folded"


def leaks(nb) -> Iterator[str]:
    """Nothing that tells whose machine this was."""
    for i, cell in enumerate(nb.cells):
        for text in (cell.source, *output_texts(cell)):
            for what, pattern in LEAKS.items():
                if found := pattern.search(text):
                    yield f"cell {i} shows {what}: {found.group()!r}"


def sources(nb) -> Iterator[str]:
    """Code that runs alike in JupyterLab, in Colab and under nbval."""
    for i, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        for what, pattern in UNWELCOME.items():
            if pattern.search(cell.source):
                yield f"cell {i} uses {what}: chapters must run unattended everywhere"
        if cell.source.rstrip().endswith(";"):
            yield f"cell {i} ends with ';': that hides nothing under nbval, assign the value instead"


def metadata(nb) -> Iterator[str]:
    """The standard kernel, no saved widgets, and what a teacher plans with."""
    if nb.metadata.get("widgets"):
        yield "widget state is saved, which breaks GitHub's viewer: run course/nb.py run"
    if nb.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3: run course/nb.py tidy"
    plan = nb.metadata.get("mixoff", {})
    for name, kind in METADATA.items():
        if not isinstance(plan.get(name), kind):
            yield f"notebook metadata lacks mixoff.{name} ({kind.__name__}): see course/nb.py new"


# ---------------------------------------------------------------- size


def budgets(nb) -> Iterator[str]:
    """Small enough to read in one sitting, with enough to look at."""
    shown = sum(bool(cell.outputs) for _, cell in code_cells(nb))
    if shown < MIN_CELLS_WITH_OUTPUT:
        yield f"{shown} code cells have outputs, at least {MIN_CELLS_WITH_OUTPUT} are wanted"
    if len(nb.cells) > MAX_CELLS:
        yield f"{len(nb.cells)} cells, at most {MAX_CELLS}"
    words = sum(map(count_words, written(nb)))
    if not WORDS[0] <= words <= WORDS[1]:
        yield f"{words} words, wanted {WORDS[0]} to {WORDS[1]}"


def lengths(nb) -> Iterator[str]:
    """Code cells of a few lines; what draws a figure or prepares something is folded and not counted."""
    read = [c for c in nb.cells if c.cell_type == "code" and not {"figure", "hidden"} & tags(c)]
    lines = sorted(len([line for line in c.source.splitlines() if line.strip()]) for c in read)
    if not lines:
        return
    p90 = lines[int(0.9 * (len(lines) - 1))]
    found = ("median", statistics.median(lines), MEDIAN_LINES), ("90th percentile", p90, P90_LINES)
    for name, have, limit in (*found, ("longest", lines[-1], MAX_LINES)):
        if have > limit:
            yield f"code cells are too long: {name} {have:g} lines, at most {limit}"


# ---------------------------------------------------------------- the form of a chapter


def opening(nb) -> Iterator[str]:
    """Generated cell, title, promise, the practical line, and a setup cell before all other code."""
    if not nb.cells or "generated" not in tags(nb.cells[0]):
        yield "the generated first cell is missing: run course/nb.py tidy"
        return
    lines = [line for line in nb.cells[1].source.splitlines() if line.strip()] if len(nb.cells) > 1 else []
    if not lines or not lines[0].startswith("# "):
        yield "the second cell must open with a '# ' title"
    if len(lines) < 3 or not lines[1].startswith("**") or not lines[1].endswith("**"):
        yield "below the title stands one sentence in bold, the promise, then the practical line"
    elif not all(word in lines[2] for word in ("min", "Prerequisites", "Hardware")):
        yield "the practical line names minutes, Prerequisites and Hardware"
    code = code_cells(nb)
    if len(tagged(nb, "setup")) != 1 or not code or "setup" not in tags(code[0][1]):
        yield "exactly one cell is tagged setup, and it is the first code cell"
    loads = any("mixoff.load(" in cell.source for _, cell in code)
    if loads and "no GPU" in "".join(lines[2:3]) and "setup(gpu=False" not in code[0][1].source:
        yield "a chapter that needs no GPU says setup(gpu=False): on Colab, models would be loaded onto the card"


def headings(nb) -> Iterator[str]:
    """The parts that each chapter has, and five questions with folded answers."""
    text = "\n".join(written(nb))
    for heading in HEADINGS:
        if not re.search(rf"^#+ {heading}", text, re.M):
            yield f"the heading {heading!r} is missing"
    questions = re.search(r"^#+ Five questions(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    if questions and questions.group(1).count("<details>") != QUESTIONS:
        yield f"{questions.group(1).count('<details>')} folded answers below 'Five questions', expected {QUESTIONS}"
    notes = [nb.cells[i] for i in tagged(nb, "instructor")]
    if not notes or not all("<details>" in cell.source for cell in notes):
        yield "instructor notes are missing: a folded cell tagged instructor"


def exercises(nb) -> Iterator[str]:
    """Contract with a folded hint, a stub, a check, then a folded solution under another name with its own check."""
    stubs = tagged(nb, "exercise")
    if not EXERCISES[0] <= len(stubs) <= EXERCISES[1]:
        yield f"{len(stubs)} exercises, wanted {EXERCISES[0]} to {EXERCISES[1]}"
    for stub, following in zip(stubs, [*stubs[1:], len(nb.cells)], strict=True):
        yield from exercise(nb, stub, following)


def exercise(nb, stub: int, following: int) -> Iterator[str]:
    """The parts of the one exercise whose stub is cell `stub`."""
    contract = nb.cells[stub - 1].source
    if not all(word in contract for word in ("Difficulty", "Importance", "min", "<details>")):
        yield f"the cell above exercise {stub} names Difficulty, Importance and minutes, and folds a hint"
    if "NotImplementedError" not in nb.cells[stub].source:
        yield f"exercise {stub} is not a stub: it raises NotImplementedError"
    solutions = [i for i in tagged(nb, "solution") if stub < i < following]
    checks = [i for i in tagged(nb, "check") if stub <= i < (solutions or [following])[0]]
    for tag, cells in {"check": checks, "solution": solutions}.items():
        if not cells:
            yield f"exercise {stub} has no cell tagged {tag}"
    for i in solutions:
        source = nb.cells[i].source
        if not re.search(r"^def \w+_solution\(", source, re.M) or "check." not in source:
            yield f"cell {i} defines NAME_solution and checks it, so that Run all keeps the learner's attempt"
        verdicts = "".join(output_texts(nb.cells[i]))
        if "[ ok ]" not in verdicts or "[FAIL]" in verdicts:
            yield f"cell {i} stores a solution that its check does not accept: {verdicts.strip()[:60]!r}"


def formulas(nb) -> Iterator[str]:
    """No link inside a formula, which would be shown as an error."""
    for i, cell in enumerate(nb.cells):
        found = re.findall(r"\$\$[^$]+\$\$|\$[^$\n]+\$", cell.source) if cell.cell_type == "markdown" else ()
        if any("](" in formula for formula in found):
            yield f"cell {i} has a link inside a formula: put it into the sentence before"


RULES = (
    execution,
    outputs,
    drawing,
    leaks,
    sources,
    metadata,
    budgets,
    lengths,
    opening,
    headings,
    formulas,
    exercises,
)


def problems(nb) -> list[str]:
    """Every sentence of every rule."""
    return [problem for rule in RULES for problem in rule(nb)]
