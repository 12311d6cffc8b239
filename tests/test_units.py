import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixoff import BudgetError
from mixoff.units import format_nbytes, parse_nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GiB", 6 * 2**30), ("500MB", 500_000_000), ("6 mb", 6_000_000), ("0.5KiB", 512), ("7", 7), ("3B", 3), (12, 12)],
)
def test_sizes_as_people_write_them(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "-1",
        "-6MB",
        "6 parsecs",
        "GiB",
        "1e9",
        "nan",
        "inf",
        "6MB6",
        -1,
        float("inf"),
        float("nan"),
        True,
        None,
        [6],
    ],
)
def test_other_sizes_are_refused_with_an_example(bad):
    with pytest.raises(BudgetError, match="6GiB"):
        parse_nbytes(bad)


@pytest.mark.parametrize("bad", ["9" * 400 + "GB", "10000000TB", 10**400, 2**63])
def test_sizes_of_nothing_that_exists_are_refused(bad):
    with pytest.raises(BudgetError, match="as a size"):
        parse_nbytes(bad)


def test_a_bare_letter_is_binary():
    assert (parse_nbytes("6G"), parse_nbytes("1.5m"), parse_nbytes("2 K")) == (6 * 2**30, 3 * 2**19, 2048)


@given(st.integers(0, 2**60))
def test_printed_sizes_read_back_within_rounding(n):
    assert parse_nbytes(format_nbytes(n)) == pytest.approx(n, rel=0.006, abs=0.5)
