"""The measure of tests/ordered.py on laws of which the answer is known: it can fail, and it can hold."""
import helpers  # noqa: F401  (first: it sets what torch and vLLM read when they are imported)

import numpy as np
import pytest

import ordered


@pytest.fixture(scope="module")
def found():
    return {name.removeprefix("control: "): ordered.measure(r) for name, r in ordered.controls(60, 512).items()}


def test_in_the_gamble_the_order_is_against_the_means_and_no_law_is_the_higher_one(found):
    m = found["the gamble"]
    assert m["clear"] == m["both sides"] == 60 and m["agree"] == 0 and m["against"] > 30
    assert m["step"] < -0.8 and m["ceiling"] > 0.9


def test_of_laws_at_random_some_are_not_ordered_and_of_the_same_in_order_none(found):
    assert 10 < found["laws at random"]["both sides"] < 50 and found["the same, ordered"]["both sides"] == 0
    m = found["the same, ordered"]
    assert m["agree"] == m["clear"] > 10 and m["step"] > 0.8


def test_order_and_both_statistics_by_counting():
    r = np.array([[[0, 0.5, 1, 1], [0.5, 0.5, 0.5, 0]]])
    p, q, _ = ordered.order(r)
    more = sum(a > b for a in r[0, 0] for b in r[0, 1]) / 16
    less = sum(a < b for a in r[0, 0] for b in r[0, 1]) / 16
    assert (p[0], q[0]) == (more, less)
    assert ordered.one_sided(r).tolist() == [[0.5], [0.0]]  # F' = 1/4, 1, 1 and F = 1/4, 1/2, 1 at 0, 1/2, 1
