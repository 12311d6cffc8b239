"""Exercises of notebooks/15_mixtral_on_a_t4.ipynb."""

from mixoff.classroom.checks.machinery import Check


def fill_all_of_it(vram: int, ram: int, expert: int, layers: int, experts: int) -> tuple[int, int, int]:
    """As many experts in VRAM as there are bytes for, whichever layer they belong to."""
    fast = min(vram // expert, layers * experts)
    near = min(ram // expert, layers * experts - fast)
    return fast, near, layers * experts - fast - near


# (bytes of VRAM, of RAM, of an expert, layers, experts per layer) -> experts in VRAM, in RAM, on disk
tiers = Check(
    (
        ((13_112_374_272, 10_194_693_632, 66_404_420, 32, 8), (192, 64, 0)),
        ((100, 45, 10, 4, 4), (8, 4, 4)),
        ((39, 1000, 10, 4, 4), (0, 16, 0)),
        ((1000, 1000, 10, 4, 4), (16, 0, 0)),
        ((85, 0, 10, 4, 4), (8, 0, 8)),
    ),
    slips={"Each layer gets equally many slots, so some bytes of VRAM stay unused.": fill_all_of_it},
)

# (tokens of each turn, question first; room) -> number of latest turns that are sent
recent = Check(
    (
        (([5], 10), 1),
        (([5, 20, 5], 30), 3),
        (([5, 20, 5], 29), 1),
        (([3, 9, 3, 4, 3], 12), 3),
        (([3, 2, 3, 2, 30], 12), 1),
    ),
    slips={
        "What is sent must begin with a question.": lambda lengths, room: max(
            [n for n in range(1, len(lengths) + 1) if sum(lengths[-n:]) <= room], default=1
        ),
        "The last question is sent in any case.": lambda lengths, room: max(
            [n for n in range(1, len(lengths) + 1, 2) if sum(lengths[-n:]) <= room], default=0
        ),
    },
)


def slowest(six: tuple[float, ...], each: int, s: int) -> tuple[str, float]:
    """Name and time of the slowest clock, at `each` operations per parameter and `s` units of time per second."""
    n, touched, moved, flops, memory, link = six
    times = {"compute": each * n / flops, "memory": touched / memory, "link": moved / link}
    name = max(times, key=lambda clock: times[clock])
    return name, s * times[name]


# (active parameters, bytes touched, bytes moved, operations/s, bytes/s of memory, of the link) -> limit, ms per token
what_binds = Check(
    (
        ((12.9e9, 5.2e9, 0.78e9, 8.1e12, 320e9, 12e9), ("link", 65.0)),
        ((12.9e9, 4.2e9, 0.0, 8.1e12, 320e9, 12e9), ("memory", 13.125)),
        ((10e9, 1e9, 0.0, 1e12, 320e9, 12e9), ("compute", 20.0)),
    ),
    slips={
        "These are seconds: the answer is in milliseconds.": lambda *six: slowest(six, 2, 1),
        "Each parameter is two operations, a multiplication and an addition.": lambda *six: slowest(six, 1, 1000),
    },
)
