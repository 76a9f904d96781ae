"""Figures show what they are given."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from experiments.common import pictures

SVG = "{http://www.w3.org/2000/svg}"


def parts(picture: str, tag: str) -> list:
    return list(ET.fromstring(picture).iter(SVG + tag))


def labels(picture: str) -> list[str]:
    return [element.text for element in parts(picture, "text")]


def test_the_interval_is_students():
    """Five runs of mean 3 and deviation √2.5: half a width of 2.776 · √(2.5/5), from a table."""
    mean, low, high = pictures.confidence_interval(np.arange(1.0, 6.0)[:, None])
    assert mean == 3
    np.testing.assert_allclose([low[0], high[0]], [3 - 1.96290, 3 + 1.96290], atol=1e-3)
    assert [x[0] for x in pictures.confidence_interval([[7.0]])] == [7, 7, 7]


def test_a_curve_runs_from_left_to_right_at_its_height():
    picture = pictures.learning_curves("a < b", [0, 50, 100], {"up": np.array([[0.0, 5, 10], [0, 5, 10]])})
    lines = [line.get("points").split() for line in parts(picture, "polyline")]
    assert len(lines) == 3  # two seeds and their mean
    corners = [tuple(map(float, point.split(","))) for point in lines[-1]]
    assert corners == [(60, 290), (320, 160), (580, 30)]
    assert {"a < b", "up", "100", "10", "5"} <= set(labels(picture))


def test_a_maze_shows_values_best_actions_visits_and_ends():
    q = np.zeros((6, 4))
    q[0] = [1.0, 0.0, 0.0, 2.5]  # right is best
    q[3] = [3.0, 0.0, 0.0, 3.0]  # up and right are
    visits = np.zeros((6, 4))
    visits[0] = 10
    walls = np.zeros((2, 3), bool)
    walls[0, 1] = True
    terminal = np.zeros((2, 3), bool)
    terminal[:, 2] = True
    rewards = np.array([[0, 0, 10], [0, 0, -10]])
    picture = pictures.draw_maze("maze", walls, terminal, rewards, q, visits)
    assert {"+10", "-10", "2.50", "3.00", "40 visits"} <= set(labels(picture))
    arrows = [re.search(r"M(\S+) (\S+)l(\S+) (\S+)", path.get("d")).groups() for path in parts(picture, "path")]
    directions = {}
    for x, y, dx, dy in arrows:
        directions.setdefault((int(float(y) - 30) // 90, int(float(x)) // 90), set()).add((float(dx), float(dy)))
    assert directions[0, 0] == {(20, 0)}
    assert directions[1, 0] == {(0, -20), (20, 0)}
    assert len(directions[1, 1]) == 4
    assert (0, 1) not in directions
    opacity = [float(rect.get("fill-opacity")) for rect in parts(picture, "rect")[1:]]
    assert opacity == [0.6, 1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(("angle", "side"), [(0.2, 1), (-0.2, -1)])
def test_a_pole_leans_to_its_side(angle, side):
    picture = pictures.draw_cartpole("frames", [[0.0, 0.0, angle, 0.0], [1.2, 0.0, 0.0, 0.0]], [0, 7])
    poles = [path.get("d") for path in parts(picture, "path") if "L" in path.get("d")]
    (foot, tip), (second, top) = ([float(point.split()[0]) for point in pole[1:].split("L")] for pole in poles)
    assert (tip - foot) * side > 5
    assert second == top
    assert second > 110 + 55  # to the right of the second frame's middle
    assert {"t = 0", "t = 7"} <= set(labels(picture))
