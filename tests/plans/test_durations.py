"""Durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farshore.plans.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("5m", 300),
        ("8h", 28800),
        ("7d", 604800),
        ("2w", 1209600),
        ("250ms", 0.25),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1.5h", 5400),
        (" 5M ", 300),
        ("PT5M", 300),
        ("P1D", 86400),
        ("P1DT2H3M4.5S", 93784.5),
        ("P2W", 1209600),
        ("90", 90),
        (90, 90),
        (0.5, 0.5),
        (0, 0),
    ],
)
def test_people_write_durations_in_many_ways(text: object, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "5 parsecs",
        "1y",
        "P1Y",
        "P1M",
        "P",
        "PT",
        "1h-5m",
        "--5",
        "1e9",
        "inf",
        "nan",
        "5m!",
        None,
        True,
        [],
        {},
        float("inf"),
        float("nan"),
        10**400,
    ],
)
def test_what_is_no_duration_is_refused_with_examples_of_what_would_be(text: object):
    with pytest.raises(ValueError, match=r"is not a duration; write 30s"):
        parse_duration(text)


@pytest.mark.parametrize("text", [-1, -0.5, "-30"])
def test_a_duration_is_never_negative(text: object):
    with pytest.raises(ValueError, match="negative"):
        parse_duration(text)


@given(st.integers(0, 10**9))
def test_what_is_shown_can_be_read_again(seconds: int):
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.one_of(st.text(max_size=30), st.from_regex(r"P?T?[0-9.hmsdwPT -]{0,20}")))
def test_no_text_gives_anything_but_seconds_or_an_error(text: str):
    try:
        seconds = parse_duration(text)
    except ValueError as error:
        refusal = str(error)
    else:
        assert seconds >= 0
        return
    assert repr(text) in refusal
