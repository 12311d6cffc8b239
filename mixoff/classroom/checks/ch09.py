"""Exercises of notebooks/09_live_cache.ipynb."""

from mixoff.classroom.checks.machinery import Check

# kinds of events -> hits over requests
hit_rate = Check(
    (
        ((["hit", "miss"],), 0.5),
        ((["miss", "evict", "miss", "prefetch", "hit", "hit"],), 0.5),
        ((["hit"],), 1.0),
        ((["miss", "evict", "miss"],), 0.0),
        (([],), None),
        ((["evict", "prefetch"],), None),
    ),
    slips={"Only hits and misses are requests.": lambda kinds: kinds.count("hit") / len(kinds) if kinds else None},
)


def without_guesses(events: list) -> set:
    """Residents, if only misses brought any."""
    here: set = set()
    for kind, expert in events:
        here = here | {expert} if kind == "miss" else here - {expert} if kind == "evict" else here
    return here


# (kind, expert) of one layer -> residents at the end
residents = Check(
    (
        (([],), set()),
        (([("miss", 1), ("miss", 2), ("hit", 1)],), {1, 2}),
        (([("miss", 1), ("miss", 2), ("evict", 1), ("miss", 3)],), {2, 3}),
        (([("miss", 1), ("prefetch", 4), ("evict", 1), ("miss", 1)],), {1, 4}),
    ),
    slips={"A prefetch brings an expert in as well.": without_guesses},
)


def since_last_use(events: list) -> list:
    """Tokens from the last use of each evicted expert: not what is asked."""
    used: dict = {}
    stays: list = []
    for token, kind, expert in events:
        if kind == "evict":
            stays.append(token - used.pop(expert))
        else:
            used[expert] = token
    return stays


# (token, kind, expert) of one layer -> number of tokens that each evicted expert was resident
stays = Check(
    (
        (([(1, "miss", 0), (2, "hit", 0)],), []),
        (([(1, "miss", 0), (4, "evict", 0), (4, "miss", 2)],), [3]),
        (
            ([(1, "miss", 0), (1, "miss", 1), (2, "evict", 1), (5, "miss", 1), (9, "evict", 0), (9, "evict", 1)],),
            [1, 8, 4],
        ),
        (([(1, "miss", 0), (3, "hit", 0), (7, "evict", 0)],), [6]),
    ),
    slips={"A hit does not renew the arrival.": since_last_use},
)
