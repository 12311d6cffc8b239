#!/usr/bin/env python3
"""Prints schedules of the 90-minute, half-day, one-day and second-day workshop from the metadata of the chapters.

    schedule.py [--start 9:00] [90-minute | half-day | one-day | second-day]

A chapter says in its metadata (`mixoff`) how long it takes to teach, how long its exercises take, what it needs, and
the workshops it belongs to. Lessons are given whole; the minutes that remain are for exercises, shared among chapters
in proportion to what theirs take; the rest of an exercise is for home. Does not know what a chapter is about.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import badges

STEP_MIN = 5  # exercises end on five minutes, as clocks are read
OPENING = "Welcome; everybody opens the first chapter and runs its setup cell"
CLOSING = "Questions, and where to go on"
EXERCISES = "Exercises left over, in any order"


@dataclass(frozen=True)
class Workshop:
    """minutes: from the first word to the last, breaks included. breaks: when each is due, how long, what for.

    after: workshop of the day before, whose chapters everybody knows
    """

    name: str
    minutes: int
    opening: int = 5
    closing: int = 5
    breaks: tuple[tuple[int, int, str], ...] = ()
    after: str = ""


DAY = ((90, 15, "Break"), (185, 60, "Lunch"), (330, 15, "Break"), (410, 10, "Break"))
SECOND_DAY = ((90, 15, "Break"), (165, 60, "Lunch"), (280, 15, "Break"), (360, 10, "Break"), (415, 5, "Break"))
WORKSHOPS = (
    Workshop("90-minute", 90),
    Workshop("half-day", 210, breaks=((100, 20, "Break"),)),
    Workshop("one-day", 480, 10, 10, DAY),
    Workshop("second-day", 480, 10, 10, SECOND_DAY, after="one-day"),
)


@dataclass(frozen=True)
class Chapter:
    """What a chapter's metadata says; minutes."""

    path: pathlib.Path
    title: str
    teach: int
    exercise: int
    needs: tuple[str, ...]
    workshops: tuple[str, ...]

    @property
    def number(self) -> str:
        """Two digits."""
        return self.path.name[:2]


@dataclass(frozen=True)
class Item:
    """Something that takes `minutes`, `exercise` of them spent by the learners alone."""

    title: str
    minutes: int
    exercise: int = 0
    chapter: Chapter | None = None


def chapters() -> list[Chapter]:
    """All chapters in order."""
    plans = [(path, json.loads(path.read_text(encoding="utf-8"))["metadata"]["mixoff"]) for path in badges.chapters()]
    return [
        Chapter(path, badges.title(path), p["teach_min"], p["exercise_min"], tuple(p["needs"]), tuple(p["workshops"]))
        for path, p in plans
    ]


def chosen(workshop: Workshop, course: Sequence[Chapter]) -> list[Chapter]:
    """The chapters of a workshop; a name that no workshop has is an error, since its chapter would be lost."""
    names = {known.name for known in WORKSHOPS}
    for chapter in course:
        if unknown := set(chapter.workshops) - names:
            raise ValueError(f"{chapter.path.name} names the workshop {unknown.pop()!r}: {', '.join(sorted(names))}")
    return [chapter for chapter in course if workshop.name in chapter.workshops]


# ---------------------------------------------------------------- planning


def shares(total: int, wanted: Sequence[int]) -> list[int]:
    """`total` minutes shared in proportion to `wanted`, none above its own, in steps of STEP_MIN, largest rest first.

    >>> shares(45, [20, 20, 25])
    [15, 15, 15]
    >>> shares(90, [20, 25])
    [20, 25]
    """
    if total >= sum(wanted):
        return list(wanted)
    exact = [total * want / sum(wanted) for want in wanted]
    given = [int(part // STEP_MIN) * STEP_MIN for part in exact]
    for i in sorted(range(len(wanted)), key=lambda i: given[i] - exact[i]):
        if total - sum(given) >= STEP_MIN and given[i] + STEP_MIN <= wanted[i]:
            given[i] += STEP_MIN
    return given


def plan(workshop: Workshop, course: Sequence[Chapter]) -> list[Item]:
    """What happens one after the other; the minutes add up to the workshop's."""
    taken = chosen(workshop, course)
    pauses = sum(minutes for _, minutes, _ in workshop.breaks)
    left = workshop.minutes - workshop.opening - workshop.closing - pauses
    lessons = sum(chapter.teach for chapter in taken)
    if lessons > left:
        raise ValueError(f"{workshop.name}: lessons take {lessons} min, there are {left}: take a chapter out")
    exercise = shares(left - lessons, [chapter.exercise for chapter in taken])
    items = [Item(c.title, c.teach + own, own, c) for c, own in zip(taken, exercise, strict=True)]
    over = left - sum(item.minutes for item in items)
    ending = [Item(EXERCISES, over, over)] if over else []
    return [Item(OPENING, workshop.opening), *paused(workshop, items), *ending, Item(CLOSING, workshop.closing)]


def paused(workshop: Workshop, items: Sequence[Item]) -> Iterator[Item]:
    """`items` with each break at the end of a chapter, as near to when it is due as can be."""
    now, due = workshop.opening, list(workshop.breaks)
    for item in items:
        while due and due[0][0] - now <= now + item.minutes - due[0][0]:
            _, minutes, title = due.pop(0)
            yield Item(title, minutes)
            now += minutes
        yield item
        now += item.minutes
    yield from (Item(title, minutes) for _, minutes, title in due)


def missing(items: Sequence[Item], known: Sequence[Chapter] = ()) -> dict[str, list[str]]:
    """Chapters that a chapter needs and that do not come before it, by the number of the one that needs them.

    known: chapters of the day before
    """
    taken = [item.chapter for item in items if item.chapter]
    before = {c.number: {earlier.number for earlier in (*known, *taken[:i])} for i, c in enumerate(taken)}
    absent = {c.number: [need for need in c.needs if need not in before[c.number]] for c in taken}
    return {number: needs for number, needs in absent.items() if needs}


# ---------------------------------------------------------------- printing


def clock(minutes: int) -> str:
    """Hours and minutes.

    >>> clock(545)
    '9:05'
    """
    return f"{minutes // 60}:{minutes % 60:02}"


def rows(items: Sequence[Item], start: int, linked: bool = False) -> Iterator[tuple[str, int, str, int]]:
    """When, how long, what, and minutes of exercises in it."""
    for item in items:
        what = f"[{item.title}](../notebooks/{item.chapter.path.name})" if linked and item.chapter else item.title
        yield clock(start), item.minutes, f"{item.chapter.number} {what}" if item.chapter else what, item.exercise
        start += item.minutes


def known(workshop: Workshop, course: Sequence[Chapter]) -> list[Chapter]:
    """The chapters of the day before; none for a workshop that stands alone."""
    return [chapter for chapter in course if workshop.after and workshop.after in chapter.workshops]


def notes(items: Sequence[Item], before: Sequence[Chapter] = ()) -> list[str]:
    """What the schedule leaves out, a sentence each. before: chapters of the day before."""
    home = sum(item.chapter.exercise - item.exercise for item in items if item.chapter)
    lacking = missing(items, before).items()
    leans = [f"{at} leans on {', '.join(needs)}: read the summary before." for at, needs in lacking]
    return [f"{home} min of exercises are left for home."] * (home > 0) + leans


def text(workshop: Workshop, course: Sequence[Chapter], start: int) -> str:
    """A schedule for the terminal."""
    items = plan(workshop, course)
    lines = [f"{workshop.name}: {workshop.minutes} min, {clock(start)} to {clock(start + workshop.minutes)}"]
    for at, minutes, what, exercise in rows(items, start):
        lines.append(f"{at:>5}  {minutes:>3} min  {what}" + (f" ({exercise} min of exercises)" if exercise else ""))
    return "\n".join(lines + notes(items, known(workshop, course)))


def section(workshop: Workshop, course: Sequence[Chapter]) -> str:
    """A schedule as a section of the page, with links."""
    items = plan(workshop, course)
    lines = [f"## The {workshop.name} workshop: {workshop.minutes} minutes", ""]
    lines += ["| from | min | what | of it exercises, min |", "|---|---|---|---|"]
    for at, minutes, what, exercise in rows(items, 0, linked=True):
        lines.append(f"| {at} | {minutes} | {what} | {exercise or ''} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(items, known(workshop, course)))])


def for_home(course: Sequence[Chapter]) -> list[str]:
    """A sentence that names the chapters of no workshop, where there are any."""
    named = [f"{chapter.number} {chapter.title.split(':')[0]}" for chapter in course if not chapter.workshops]
    return [f"In no workshop, for home: {', '.join(named)}."] if named else []


def page() -> str:
    """The page of the site, in Markdown."""
    course = chapters()
    opening = "# Schedules\n\nMade by `python3 go.py schedule` from the metadata of the chapters; times from the start."
    return "\n\n".join([opening, *(section(workshop, course) for workshop in WORKSHOPS), *for_home(course)]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Prints one schedule or all; 2 where one cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workshop", nargs="?", choices=[known.name for known in WORKSHOPS], help="all if left out")
    parser.add_argument("--start", default="9:00", metavar="9:00", help="when it begins")
    asked = parser.parse_args(argv)
    hours, _, minutes = asked.start.partition(":")
    try:
        course, start = chapters(), 60 * int(hours) + int(minutes)
        parts = [text(w, course, start) for w in WORKSHOPS if asked.workshop in (None, w.name)]
        print("\n\n".join(parts + for_home(course)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
