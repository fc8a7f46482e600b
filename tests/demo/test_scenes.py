"""The scenes: every caption true of exactly one picture, neighbours as hard as promised."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edje.demo import scenes


def some_scenes(seed: int, count: int) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.random_scene(rng) for _ in range(count)]


@given(seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_things_stand_apart_on_the_grid_where_the_relations_say(seed: int) -> None:
    (scene,) = some_scenes(seed, 1)
    assert len(set(scene.cells)) == len(scene.things) in (2, 3)
    assert all(0 <= row <= 2 and 0 <= column <= 2 for row, column in scene.cells)
    steps = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
    neighbours = zip(scene.relations, scene.cells, scene.cells[1:], strict=False)
    for relation, (row, column), (next_row, next_column) in neighbours:
        assert (next_row - row, next_column - column) == steps[relation]


def test_groups_hold_eight_scenes_and_no_meaning_twice() -> None:
    groups = list(itertools.islice(scenes.groups(3), 40))
    every = [scene for group in groups for scene in group]
    assert {len(group) for group in groups} == {scenes.GROUP}
    assert len({scene.meaning for scene in every}) == len(every)
    assert len({scene.caption for scene in every}) == len(every)


def test_neighbours_have_the_same_words_and_single_swaps_are_among_them() -> None:
    rng = np.random.default_rng(0)
    for base, *twins in itertools.islice(scenes.groups(4), 40):
        for twin in twins:
            assert sorted(t.color for t in twin.things) == sorted(t.color for t in base.things)
            assert sorted(t.size for t in twin.things) == sorted(t.size for t in base.things)
            assert [t.shape for t in twin.things] == [t.shape for t in base.things]
            assert twin.background == base.background
        relation = scenes.swap_relation(base, rng)
        swapped = (scenes.swap_colors(base), scenes.swap_sizes(base), relation)
        assert {scene.meaning for scene in swapped} <= {twin.meaning for twin in twins}


def test_a_caption_read_from_the_other_end_means_the_same() -> None:
    for scene in some_scenes(6, 50):
        turned = scenes.Scene(
            scene.things[::-1],
            tuple(scenes.OPPOSITE[relation] for relation in reversed(scene.relations)),
            scene.cells[-1],
            scene.background,
        )
        assert turned.meaning == scene.meaning
        assert turned.caption != scene.caption
        assert sorted(turned.cells) == sorted(scene.cells)


def test_seeds_make_the_same_pictures_again_and_others_apart() -> None:
    first, again, other = (next(scenes.groups(seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert scenes.render(first[0]).tobytes() == scenes.render(again[0]).tobytes()


def test_one_word_changes_change_one_word() -> None:
    rng = np.random.default_rng(9)
    for scene in some_scenes(9, 60):
        words, changed = scene.caption.split(), scenes.change_one_word(scene, rng).caption.split()
        assert sum(a != b for a, b in zip(words, changed, strict=True)) == 1


@pytest.mark.parametrize("grid", [8, 9])
def test_labels_find_every_thing(grid: int) -> None:
    for scene in some_scenes(10, 60):
        labels = scenes.cell_labels(scene, grid)
        assert labels.shape == (grid, grid)
        assert set(np.unique(labels)) == {0, *range(1, len(scene.things) + 1)}


def test_pictures_have_the_colours_the_caption_names() -> None:
    for scene in some_scenes(11, 30):
        pixels = np.asarray(scenes.render(scene, size=72, supersample=1))
        for thing, (row, column) in zip(scene.things, scene.cells, strict=True):
            x = round((column + 0.5) * 24 + thing.offset[0])
            y = round((row + 0.5) * 24 + thing.offset[1])
            expected = np.minimum(255, np.array(scenes.COLORS[thing.color]) * thing.shade)
            assert np.abs(pixels[y, x] - expected).max() <= 1
