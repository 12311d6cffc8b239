"""What teachers plan with: schedules whose minutes add up, and a glossary that leads to chapters."""

import re

import pytest

import badges
import schedule
from schedule import WORKSHOPS, Chapter, Workshop

# shared/style: the words that the project uses for one thing each
FIXED = ("expert", "fast tier", "slow tier", "slot", "fetch", "evict", "hit", "miss", "prefetch", "resident", "trace")
FIXED += ("budget", "link")


def chapter(root, number, teach=30, exercise=20, needs=(), workshops=("half-day",)):
    """A chapter with a plan and nothing else."""
    return Chapter(root / "notebooks" / f"{number}_x.ipynb", f"Title {number}", teach, exercise, needs, workshops)


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("workshop", WORKSHOPS, ids=lambda workshop: workshop.name)
def test_minutes_add_up_and_lessons_are_whole(workshop):
    course = schedule.chapters()
    items = schedule.plan(workshop, course)
    assert sum(item.minutes for item in items) == workshop.minutes
    taught = [item for item in items if item.chapter]
    assert [item.chapter for item in taught] == schedule.chosen(workshop, course) and len(taught) >= 2
    for item in taught:
        assert item.minutes - item.exercise == item.chapter.teach and 0 <= item.exercise <= item.chapter.exercise
    pauses = [(minutes, title) for _, minutes, title in workshop.breaks]
    assert [(item.minutes, item.title) for item in items if (item.minutes, item.title) in pauses] == pauses


@pytest.mark.parametrize("workshop", WORKSHOPS, ids=lambda workshop: workshop.name)
def test_nobody_sits_for_long_without_a_break(workshop):
    since = longest = 0
    for item in schedule.plan(workshop, schedule.chapters()):
        since = 0 if (item.minutes, item.title) in [(m, t) for _, m, t in workshop.breaks] else since + item.minutes
        longest = max(longest, since)
    assert longest <= 110


def test_what_is_printed_begins_and_ends_on_time(capsys):
    assert schedule.main(["half-day", "--start", "13:30"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "half-day: 210 min, 13:30 to 17:00"
    rows = [re.match(r" *(\d+):(\d\d) +(\d+) min", line) for line in lines[1:]]
    times = [(int(r[1]) * 60 + int(r[2]), int(r[3])) for r in rows if r]
    for (begin, minutes), (following, _) in zip(times, times[1:], strict=False):
        assert begin + minutes == following
    assert sum(times[-1]) == 17 * 60


def test_the_page_has_every_workshop_and_links_its_chapters():
    page = schedule.page()
    for workshop in WORKSHOPS:
        assert f"## The {workshop.name} workshop: {workshop.minutes} minutes" in page
    assert "(../notebooks/00_start_here.ipynb)" in page
    home = [c.number for c in schedule.chapters() if not c.workshops]
    assert all(f"{number} " in page.partition("In no workshop, for home:")[2] for number in home)


def test_the_capstone_is_in_a_schedule_and_each_chapter_has_time_for_its_exercises():
    """The second day may take the first as known."""
    course = schedule.chapters()
    assert course[-1].workshops
    for workshop in WORKSHOPS:
        items = schedule.plan(workshop, course)
        assert all(item.exercise >= 10 for item in items if item.chapter)
    assert [note for note in schedule.notes(items, schedule.known(workshop, course)) if "leans on" in note] == []


def test_too_much_for_a_workshop_is_refused_with_figures(root):
    course = [chapter(root, f"0{i}", teach=60) for i in range(4)]
    with pytest.raises(ValueError, match="half-day: lessons take 240 min, there are 180: take a chapter out"):
        schedule.plan(WORKSHOPS[1], course)


def test_an_unknown_workshop_is_named(root):
    course = [chapter(root, "00", workshops=("90-minutes",))]
    with pytest.raises(ValueError, match="00_x.ipynb names the workshop '90-minutes'"):
        schedule.plan(WORKSHOPS[0], course)


def test_what_a_chapter_leans_on_is_said(root):
    course = [chapter(root, "01"), chapter(root, "02", needs=("01", "00"))]
    items = schedule.plan(Workshop("half-day", 210), course)
    assert schedule.missing(items) == {"02": ["00"]}
    assert "02 leans on 00: read the summary before." in schedule.notes(items)


def test_a_second_day_knows_the_first(root):
    first, second = Workshop("one-day", 210), Workshop("second-day", 210, after="one-day")
    course = [
        chapter(root, "01", workshops=("one-day",)),
        chapter(root, "02", needs=("01",), workshops=("second-day",)),
    ]
    assert schedule.known(first, course) == [] and schedule.known(second, course) == course[:1]
    items = schedule.plan(second, course)
    assert schedule.missing(items) == {"02": ["01"]} and schedule.missing(items, course[:1]) == {}
    assert not any("leans on" in note for note in schedule.notes(items, schedule.known(second, course)))


def test_minutes_left_over_are_for_exercises(root):
    items = schedule.plan(Workshop("half-day", 100), [chapter(root, "01")])
    assert [item.minutes for item in items] == [5, 50, 40, 5] and items[2].title == schedule.EXERCISES


@pytest.mark.parametrize(
    ("total", "wanted"), [(45, [20, 20, 25]), (0, [20]), (100, [20, 25]), (33, [20, 20]), (5, [5, 5])]
)
def test_shares_never_exceed_what_there_is_or_is_wanted(total, wanted):
    given = schedule.shares(total, wanted)
    assert sum(given) <= total and all(0 <= have <= want for have, want in zip(given, wanted, strict=True))
    assert min(total, sum(wanted)) - sum(given) < schedule.STEP_MIN


# ---------------------------------------------------------------- the glossary


def entries(root):
    """Words of the glossary with what is said of each."""
    parts = re.split(r"^### (.+)$", (root / "docs" / "glossary.md").read_text(encoding="utf-8"), flags=re.M)
    return {word: re.split(r"^#+ ", text, flags=re.M)[0].strip() for word, text in zip(parts[1::2], parts[2::2])}  # noqa: B905


def test_glossary_has_every_fixed_word_once(root):
    words = [word for entry in entries(root) for word in re.split(r" and |, ", entry)]
    assert len(words) == len(set(words))
    assert [word for word in FIXED if word not in words] == []


def test_each_word_is_explained_in_two_sentences_and_led_to_a_chapter(root):
    """A chapter that is still to come is named without a link, and gets one as soon as it is there."""
    there = {path.name[:2]: path.name for path in badges.chapters()}
    for word, text in entries(root).items():
        said, number = re.fullmatch(r"(.+) \[?Chapter (\d\d)\b.*", text, re.S).groups()
        place = f"[Chapter {number}](../notebooks/{there[number]})" if number in there else f"Chapter {number}"
        assert text == f"{said} {place}.", word
        assert 1 <= len(re.findall(r"\.(?= [A-Z\"]|$)", said)) <= 2, word


def test_each_word_is_linked_from_its_chapter_and_no_link_is_dead(root):
    """At its first use in the chapter that the glossary names; anchors are those of GitHub and of the site."""
    anchors = {re.sub(r"[^\w\- ]", "", word.lower()).replace(" ", "-"): word for word in entries(root)}
    linked = {}
    for path in badges.chapters():
        text = path.read_text(encoding="utf-8")
        for anchor in re.findall(r"\(\.\./docs/glossary\.md#([^)]+)\)", text):
            linked.setdefault(anchor, set()).add(path.name[:2])
    assert linked.keys() == anchors.keys()
    for anchor, chapters in linked.items():
        number = re.search(r"Chapter (\d\d)", entries(root)[anchors[anchor]])[1]
        assert number in chapters, f"{anchors[anchor]}: chapter {number} does not link it"
