"""Procedural scenes: two or three coloured, sized shapes in a row, a column or a corner.

A scene's caption states all that distinguishes it, for example "a small red circle left of a
large blue square on a grey background", so exactly one image of a pool is right for a query.
Objects sit on a 3 x 3 grid of cells; each is next to the one before it in the caption, so
"left of" and "above" are never in doubt. Everything follows from a seed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

COLORS = {
    "red": (222, 51, 58),
    "orange": (245, 140, 32),
    "yellow": (250, 215, 60),
    "green": (46, 163, 88),
    "blue": (45, 104, 214),
    "purple": (142, 68, 188),
}
BACKGROUNDS = {"white": (244, 242, 238), "grey": (152, 156, 163), "black": (33, 35, 42)}
SHAPES = ("circle", "square", "triangle", "star")
SIZES = ("small", "large")
RADIUS = {"small": 6.0, "large": 10.0}  # in units; the picture is 72 units wide
STEPS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
GROUP = 8  # a scene and its seven hard neighbours
SEEDS = {"train": 1, "validation": 2, "test": 3}
UNITS = 72
CELL = UNITS // 3
JITTER = 1.2

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: what the caption says of it, and where in its cell it sits (in units)."""

    color: str
    shape: str
    size: str
    offset: tuple[float, float] = (0.0, 0.0)
    shade: float = 1.0

    @property
    def words(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Things in caption order, the relation of each to the next, and the first thing's cell."""

    things: tuple[Thing, ...]
    relations: tuple[str, ...]
    start: Cell
    background: str

    @property
    def caption(self) -> str:
        words = [self.things[0].words]
        for relation, thing in zip(self.relations, self.things[1:], strict=True):
            words += [relation, thing.words]
        return " ".join([*words, f"on a {self.background} background"])

    @property
    def cells(self) -> list[Cell]:
        """Row and column of every thing on the 3 x 3 grid (outside it: the scene is invalid)."""
        cells = [self.start]
        for relation in self.relations:
            row, column = STEPS[relation]
            cells.append((cells[-1][0] + row, cells[-1][1] + column))
        return cells

    @property
    def meaning(self) -> tuple[str, ...]:
        """What the picture shows, the same for a caption read from either end."""
        things = [thing.words for thing in self.things]
        forward = (self.background, *_interleave(things, list(self.relations)))
        turned = [OPPOSITE[relation] for relation in reversed(self.relations)]
        return min(forward, (self.background, *_interleave(things[::-1], turned)))


def _interleave(things: list[str], relations: list[str]) -> list[str]:
    return [word for pair in zip(things, [*relations, ""], strict=True) for word in pair]


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]


def _random_thing(rng: np.random.Generator) -> Thing:
    x, y = rng.uniform(-JITTER, JITTER, 2)
    return Thing(
        _pick(rng, tuple(COLORS)),
        _pick(rng, SHAPES),
        _pick(rng, SIZES),
        (round(float(x), 2), round(float(y), 2)),
        round(float(rng.uniform(0.92, 1.08)), 3),
    )


def _placed(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Move the scene to a random place on the grid; None if it cannot fit."""
    cells = np.array(replace(scene, start=(0, 0)).cells)
    low, high = -cells.min(axis=0), 2 - cells.max(axis=0)
    if len(set(map(tuple, cells))) < len(cells) or (low > high).any():
        return None
    row, column = rng.integers(low, high + 1)
    return replace(scene, start=(int(row), int(column)))


def random_scene(rng: np.random.Generator) -> Scene:
    """Return a scene whose first two things differ in colour and in size."""
    while True:
        things = tuple(_random_thing(rng) for _ in range(int(rng.integers(2, 4))))
        relations = tuple(_pick(rng, tuple(STEPS)) for _ in things[1:])
        scene = Scene(things, relations, (0, 0), _pick(rng, tuple(BACKGROUNDS)))
        first, second = things[:2]
        placed = _placed(scene, rng)
        if placed and first.color != second.color and first.size != second.size:
            return placed


def swap_colors(scene: Scene) -> Scene:
    """Exchange the colours of the first two things."""
    a, b, *rest = scene.things
    return replace(scene, things=(replace(a, color=b.color), replace(b, color=a.color), *rest))


def swap_sizes(scene: Scene) -> Scene:
    """Exchange the sizes of the first two things."""
    a, b, *rest = scene.things
    return replace(scene, things=(replace(a, size=b.size), replace(b, size=a.size), *rest))


def swap_relation(scene: Scene, rng: np.random.Generator) -> Scene:
    """Turn the first relation (and any other along its axis) into its opposite."""
    axis = {scene.relations[0], OPPOSITE[scene.relations[0]]}
    turned = tuple(OPPOSITE[r] if r in axis else r for r in scene.relations)
    placed = _placed(replace(scene, relations=turned), rng)
    if placed is None:  # turning a whole axis mirrors the layout, which fits where it fitted
        raise AssertionError(f"a mirrored scene does not fit the grid: {scene}")
    return placed


def change_one_word(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change one colour, shape, size or the background to another value."""
    field = _pick(rng, ("color", "shape", "size", "background"))
    if field == "background":
        others = tuple(name for name in BACKGROUNDS if name != scene.background)
        return replace(scene, background=_pick(rng, others))
    index = int(rng.integers(len(scene.things)))
    values = {"color": tuple(COLORS), "shape": SHAPES, "size": SIZES}[field]
    now = getattr(scene.things[index], field)
    word = {field: _pick(rng, tuple(value for value in values if value != now))}
    changed = replace(scene.things[index], **word)  # type: ignore[arg-type]
    things = (*scene.things[:index], changed, *scene.things[index + 1 :])
    return replace(scene, things=things)


def jittered(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return the same scene drawn afresh: other offsets, shades and place on the grid."""
    fresh = [_random_thing(rng) for _ in scene.things]
    things = tuple(
        replace(thing, offset=new.offset, shade=new.shade)
        for thing, new in zip(scene.things, fresh, strict=True)
    )
    return _placed(replace(scene, things=things), rng) or scene


def neighbours(scene: Scene, rng: np.random.Generator) -> list[Scene]:
    """Return the scene's seven hard neighbours: colours, relation, sizes swapped, and mixtures."""
    twins = []
    for colors, relation, sizes in itertools.product((False, True), repeat=3):
        twin = swap_colors(scene) if colors else scene
        twin = swap_sizes(twin) if sizes else twin
        twins.append(swap_relation(twin, rng) if relation else twin)
    return [jittered(twin, rng) for twin in twins[1:]]


def groups(seed: int, *, num_extra: int = 0) -> Iterator[list[Scene]]:
    """Yield groups of a scene and its seven hard neighbours, no meaning twice in all groups.

    `num_extra` adds scenes that differ from the first in one word (used for training).
    """
    rng = np.random.default_rng(seed)
    seen: set[tuple[str, ...]] = set()
    while True:
        base = random_scene(rng)
        group = [base, *neighbours(base, rng)]
        group += [jittered(change_one_word(base, rng), rng) for _ in range(num_extra)]
        meanings = {scene.meaning for scene in group}
        if len(meanings) == len(group) and not meanings & seen:
            seen |= meanings
            yield group


def _outline(thing: Thing, x: float, y: float) -> list[tuple[float, float]]:
    """Return the corners of a thing's polygon around (x, y), in units."""
    radius = RADIUS[thing.size]
    if thing.shape == "square":
        half = radius * 0.86
        left, top, right, bottom = x - half, y - half, x + half, y + half
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    if thing.shape == "triangle":
        return _ring(x, y + radius * 0.2, [radius * 1.12], 3)
    return _ring(x, y, [radius * 1.1, radius * 0.5], 10)


def _ring(x: float, y: float, radii: list[float], count: int) -> list[tuple[float, float]]:
    points = []
    for index in range(count):
        angle = -math.pi / 2 + index * 2 * math.pi / count
        radius = radii[index % len(radii)]
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return points


def _draw(
    draw: ImageDraw.ImageDraw, thing: Thing, center: tuple[float, float], scale: float, fill: object
) -> None:
    x, y = center
    if thing.shape == "circle":
        radius = RADIUS[thing.size]
        box = [side * scale for side in (x - radius, y - radius, x + radius, y + radius)]
        draw.ellipse(box, fill=fill)  # type: ignore[arg-type]
    else:
        corners = [(px * scale, py * scale) for px, py in _outline(thing, x, y)]
        draw.polygon(corners, fill=fill)  # type: ignore[arg-type]


def _centers(scene: Scene) -> list[tuple[float, float]]:
    return [
        ((column + 0.5) * CELL + thing.offset[0], (row + 0.5) * CELL + thing.offset[1])
        for thing, (row, column) in zip(scene.things, scene.cells, strict=True)
    ]


def _shaded(color: tuple[int, int, int], factor: float) -> tuple[int, ...]:
    return tuple(min(255, round(channel * factor)) for channel in color)


def render(scene: Scene, *, size: int = 288, supersample: int = 2) -> Image.Image:
    """Draw the scene as an RGB picture of `size` x `size`, drawn larger and averaged down."""
    scale = size * supersample / UNITS
    ground = BACKGROUNDS[scene.background]
    picture = Image.new("RGB", (size * supersample,) * 2, ground)
    draw = ImageDraw.Draw(picture)
    for thing, (x, y) in zip(scene.things, _centers(scene), strict=True):
        _draw(draw, thing, (x + 0.6, y + 0.9), scale, _shaded(ground, 0.8))
    for thing, center in zip(scene.things, _centers(scene), strict=True):
        _draw(draw, thing, center, scale, _shaded(COLORS[thing.color], thing.shade))
    return picture.reduce(supersample) if supersample > 1 else picture


def draw_pool(
    seed: int, count: int, folder: Path, progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """Write the first `count` scenes of a seed into a new folder; return each file's caption."""
    folder.mkdir(parents=True)
    captions = {}
    pool = itertools.islice(itertools.chain.from_iterable(groups(seed)), count)
    for number, scene in enumerate(pool):
        name = f"scene-{number:04}.png"
        render(scene).save(folder / name)
        captions[name] = scene.caption
        if progress is not None:
            progress(number + 1, count)
    return captions


def cell_labels(scene: Scene, grid: int) -> npt.NDArray[np.uint8]:
    """Return uint8 [grid, grid]: 0 for background, else 1 + the thing that covers the square.

    A thing counts where it covers at least 12 % of the square: a small star laid over the
    corner of four squares still covers that much of one.
    """
    resolution = 8
    mask = Image.new("L", (grid * resolution,) * 2, 0)
    draw = ImageDraw.Draw(mask)
    for index, (thing, center) in enumerate(zip(scene.things, _centers(scene), strict=True)):
        _draw(draw, thing, center, grid * resolution / UNITS, index + 1)
    squares = np.asarray(mask).reshape(grid, resolution, grid, resolution)
    counts = np.stack([(squares == i + 1).sum((1, 3)) for i in range(len(scene.things))])
    best = counts.argmax(0).astype(np.uint8) + 1
    return np.where(counts.max(0) >= 0.12 * resolution**2, best, 0).astype(np.uint8)
