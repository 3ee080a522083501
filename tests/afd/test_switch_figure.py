"""The laptop task's figure of prompt switches: chunks until the new prompt is seen."""

from __future__ import annotations

import torch

from afd.lab import switches
from afd.lab.simulator import PROMPTS, attribute_table, colour_table, render
from afd.lab.switches import HEADER, WATCHED, Row, first_shown, measure, switched_prompts, windowed

CHUNK = 3


def test_every_prompt_is_switched_in_one_attribute() -> None:
    for attribute, count in (("colour", 72), ("direction", 24)):
        before, after = switched_prompts(attribute)
        assert len(before) == len(after) == count
        assert {*before, *after} <= {*PROMPTS}
        changed = attribute_table(before) != attribute_table(after)
        assert changed.sum(1).eq(1).all()
        assert changed[:, switches.COLUMNS.index(attribute)].all()


def test_the_first_chunk_that_shows_it_is_found() -> None:
    """Of a ball that turns green in the second chunk, or red again, and one that turns round."""
    x = torch.tensor([4.0, 4, 5, 6, 7, 8, 9, 8, 7, 6])
    track = torch.stack([x, torch.full_like(x, 8.0)], -1)[None].repeat(2, 1, 1)
    red, green = (render(track, colour_table(torch.full((2,), c)))[:, 1:] for c in (0, 1))
    turning = torch.cat([red[:, :3], green[:, 3:6], red[:, 6:]], 1)
    last = render(track, colour_table(torch.zeros(2, dtype=torch.int64)))[:, :1]
    wanted = torch.tensor([1, 2])
    assert first_shown(turning, wanted, "colour", CHUNK, last).tolist() == [2, 4]
    assert first_shown(red, torch.tensor([2, 0]), "direction", CHUNK, last).tolist() == [1, 3]


def test_a_switch_changes_the_colour_and_its_absence_does_not() -> None:
    student = windowed("base", 3)
    assert (student.net.config.window, student.net.config.sink) == (switches.WINDOW, 3)
    found = {mode: measure(student, "colour", mode, [0]) for mode in (None, "recache")}
    assert (found[None] == WATCHED + 1).all()
    assert (found["recache"] == 1).float().mean() > 0.9
    cells = Row("colour", 3, None, found[None]).cells()
    assert len(cells) == len(HEADER)
    assert cells[4:] == ["–", "–", "0.00", "0.00", "1.00"]
