"""The README's film of the race: small, and of the race that chapter 00 stored."""

import pytest
from PIL import Image

import race_gif
import widget_states


@pytest.fixture(scope="module")
def state():
    """What the race held when the chapter was last executed."""
    (state,) = [it["state"] for it in widget_states.kept(race_gif.CHAPTER).values() if it["class"].endswith(".Race")]
    return state


@pytest.fixture(scope="module")
def last_ms(state):
    """When the slowest pane has typed its last word, as the slider ends."""
    end = max(1000 * sum(lane["waiting_s"] + lane["computing_s"]) for lane in state["panes"])
    return int(-(-end // 50) * 50)


def test_frames_cover_the_race_in_order_and_say_how_fast(last_ms):
    frames = race_gif.times_ms(last_ms)
    times = [ms for ms, _, _ in frames]
    assert times == sorted(set(times)) and (times[0], times[-1]) == (0, last_ms)
    for (ms, _, shown), (following, speed, _) in zip(frames, frames[1:-1], strict=False):
        assert following - ms == speed * shown or following == race_gif.REAL_MS


def test_the_stored_film_is_of_the_stored_race(root, last_ms):
    path = root / "docs" / "race.gif"
    assert path.stat().st_size < 1_500_000
    frames = race_gif.times_ms(last_ms)
    with Image.open(path) as film:
        assert film.n_frames == len(frames), "run python course/race_gif.py again"
        film.seek(film.n_frames - 1)
        assert film.info["duration"] == race_gif.END_MS


def test_the_readme_tells_the_film_to_those_who_cannot_see_it(root, state):
    alt = (root / "README.md").read_text(encoding="utf-8").partition("](docs/race.gif)")[0].rpartition("![")[2]
    ends = [f"{sum(lane['waiting_s'] + lane['computing_s']):.1f}" for lane in state["panes"]]
    assert [word.rstrip(",") for word in alt.split() if word[0].isdigit()] == ends
