"""Small scenes of coloured shapes and their pictures; `dataset.scene_questions` asks about them.

A scene is a random description; `draw` makes its picture, the same pixels every time.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

COLOURS = {
    "red": (212, 32, 38),
    "orange": (246, 132, 18),
    "yellow": (250, 224, 40),
    "green": (36, 152, 58),
    "blue": (34, 78, 214),
    "purple": (146, 44, 180),
    "black": (24, 24, 28),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "moon")
PLACES = (
    ("top left", "top middle", "top right"),
    ("middle left", "middle", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)

# ---------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Thing:
    """An object. column, row: its cell in the 3×3 grid; x, y, radius: fractions of the picture's side; rgb: 0 to 255.

    colour: a key of COLOURS, or "" for a shade without a name, see `without_colour`.
    """

    colour: str
    shape: str
    size: str
    column: int
    row: int
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def new(self) -> bool:
        return (self.colour, self.shape) in NEW_PAIRS


@dataclass(frozen=True)
class Scene:
    """things: in reading order, one per cell; front: the order of painting; tones: two RGB values of the background."""

    things: tuple[Thing, ...]
    front: tuple[int, ...]
    pattern: tuple[str, int]
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    noise: int


PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
NEW_PAIRS = {  # each colour and each shape once, so the remaining pairs are balanced
    *(("red", "moon"), ("orange", "cross"), ("yellow", "heart"), ("green", "circle")),
    *(("blue", "triangle"), ("purple", "star"), ("black", "ring"), ("white", "square")),
}
OLD_PAIRS = [pair for pair in PAIRS if pair not in NEW_PAIRS]
CELLS = [(column, row) for row in range(3) for column in range(3)]
CORNERS = [{(column + i, row + j) for i in (0, 1) for j in (0, 1)} for column in (0, 1) for row in (0, 1)]
PATTERNS = [("plain", 0), *((kind, i) for kind in ("shade", "stripes", "checks", "clouds") for i in range(4))]


def is_new(things) -> bool:
    """Whether these things form a combination that never occurs in train and val: a pair, or three of a shape in a
    corner."""
    if any(thing.new for thing in things):
        return True
    return any(
        sum(thing.shape == shape and (thing.column, thing.row) in corner for thing in things) >= 3
        for shape in {thing.shape for thing in things}
        for corner in (CORNERS if len(things) >= 3 else ())
    )


def random_scene(rng: random.Random, new: bool = False, objects: tuple[int, int] = (1, 4)) -> Scene:
    """A scene with objects[0] to objects[1] things, often with shared colours or shapes; `new`: see `is_new`."""
    number = rng.randint(*objects)
    corner = new and number >= 3 and rng.random() < 0.5  # half the time, otherwise new pairs would dominate
    while True:
        alike = "shape" if corner else rng.choice(("", "", "colour", "shape", "both"))
        group = rng.randint(3 if corner else min(2, number), number) if alike else 0
        pairs = rng.choices(PAIRS if new and not corner else OLD_PAIRS, k=number)
        for i in range(1, group):
            colour, shape = pairs[i]
            pairs[i] = (colour if alike == "shape" else pairs[0][0], shape if alike == "colour" else pairs[0][1])
        cells = rng.sample(CELLS, number)
        if corner:
            cells[:3] = rng.sample(sorted(rng.choice(CORNERS)), 3)
        if not new and not NEW_PAIRS.isdisjoint(pairs) or len(set(cells)) < number:
            continue
        things = []
        for (colour, shape), (column, row) in zip(pairs, cells):
            size = rng.choice(("big", "small"))
            x, y = (0.2 + 0.3 * at + rng.uniform(-0.05, 0.05) for at in (column, row))
            radius = rng.uniform(0.155, 0.17) if size == "big" else rng.uniform(0.092, 0.104)
            rgb = tuple(min(255, max(0, level + rng.randint(-10, 10))) for level in COLOURS[colour])
            things.append(Thing(colour, shape, size, column, row, x, y, radius, rgb))
        if is_new(things) == new:
            break
    grey = rng.randint(140, 180)  # contrasts with both black and white
    tone = tuple(grey + rng.randint(-14, 14) for _ in range(3))
    other = tuple(level + shift for level, shift in zip(tone, [rng.choice((-26, -20, 20, 26))] * 3))
    things.sort(key=lambda thing: (thing.row, thing.column))
    front = tuple(rng.sample(range(number), number))
    return Scene(tuple(things), front, rng.choice(PATTERNS), (tone, other), rng.randrange(1024))


def without_colour(scene: Scene, rng: random.Random, share: float = 0.2) -> Scene:
    """Repaints a share of the things in shades far from all COLOURS; their colour is then "".

    An encoder that has seen a shape in many shades recognises it in a colour that it has never seen it in.
    """

    def shade(thing):
        rgb = COLOURS[thing.colour]
        while min(math.dist(rgb, colour) for colour in COLOURS.values()) <= 100:
            rgb = tuple(rng.randrange(256) for _ in range(3))
        return replace(thing, colour="", rgb=rgb)

    return replace(scene, things=tuple(shade(thing) if rng.random() < share else thing for thing in scene.things))


# ---------------------------------------------------------------------------- drawing


@cache
def sprite(shape: str, diameter: int, edge: float) -> tuple[Image.Image, Image.Image]:
    """Masks of a shape in a square of `diameter` pixels: the whole shape, and without a rim of `edge` pixels."""
    fine = max(2, round(8 / edge))  # draw it this many times larger and scale it down, for smooth edges
    side = diameter * fine
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)

    def disc(x, y, radius, fill=255):
        pen.ellipse([(at + sign * radius + 1) / 2 * side for sign in (-1, 1) for at in (x, y)], fill)

    def polygon(points):
        pen.polygon([tuple((at + 1) / 2 * side for at in point) for point in points], 255)

    if shape in ("circle", "ring", "moon"):
        disc(0, 0, 0.94)
        if shape == "ring":
            disc(0, 0, 0.46, 0)
        elif shape == "moon":
            disc(0.5, -0.12, 0.74, 0)
    elif shape == "square":
        polygon([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)])
    elif shape == "triangle":
        polygon([(0, -0.95), (1, 0.82), (-1, 0.82)])
    elif shape == "cross":
        polygon([(-0.95, -0.34), (0.95, -0.34), (0.95, 0.34), (-0.95, 0.34)])
        polygon([(-0.34, -0.95), (0.34, -0.95), (0.34, 0.95), (-0.34, 0.95)])
    elif shape == "star":
        turns = [(math.pi * i / 5, 1.08 if i % 2 == 0 else 0.46) for i in range(10)]
        polygon([(r * math.sin(turn), 0.08 - r * math.cos(turn)) for turn, r in turns])
    elif shape == "heart":
        disc(-0.46, -0.36, 0.5)
        disc(0.46, -0.36, 0.5)
        polygon([(-0.9, -0.12), (0, -0.5), (0.9, -0.12), (0, 0.95)])
    inner = mask.filter(ImageFilter.MinFilter(2 * round(edge * fine / 2) + 1))
    return tuple(each.resize((diameter, diameter), Image.Resampling.BOX) for each in (mask, inner))


@cache
def ground(kind: str, variant: int, size: int) -> Image.Image:
    """A mask (size, size) that mixes the two tones of a background."""
    down, across = np.mgrid[:size, :size] / size
    turn = math.pi / 4 * (variant + (0.5 if kind == "shade" else 0))
    along, beside = (math.cos(turn) * across + math.sin(turn) * down, math.cos(turn) * down - math.sin(turn) * across)
    if kind == "plain":
        level = np.zeros((size, size))
    elif kind == "shade":
        level = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        level = 0.25 + 0.25 * np.sin(along * math.tau * 8)
    elif kind == "checks":
        level = 0.25 + 0.25 * np.sign(np.sin(along * math.tau * 5) * np.sin(beside * math.tau * 5))
    else:
        small = Image.fromarray(np.random.default_rng(variant).integers(0, 256, (5, 5), dtype=np.uint8))
        return small.resize((size, size), Image.Resampling.BICUBIC)
    return Image.fromarray((level * 255).astype(np.uint8))


@cache
def grain(size: int) -> Image.Image:
    """Noise around 128, (size + 32)² pixels; cutting windows from it is much faster than drawing new noise."""
    noise = np.random.default_rng(0).normal(128, 4, (size + 32, size + 32, 3))
    return Image.fromarray(noise.round().astype(np.uint8))


def draw(scene: Scene, image_size: int) -> Image.Image:
    """The picture of a scene, RGB, image_size × image_size pixels."""
    image = Image.new("RGB", (image_size, image_size), scene.tones[0])
    image.paste(scene.tones[1], mask=ground(*scene.pattern, image_size))
    for i in scene.front:
        thing = scene.things[i]
        diameter = round(2 * thing.radius * image_size)
        corner = tuple(round((at - thing.radius) * image_size) for at in (thing.x, thing.y))
        rim = tuple(level * 2 // 5 for level in thing.rgb) if sum(thing.rgb) > 150 else (96, 96, 96)
        outer, inner = sprite(thing.shape, diameter, image_size / 64)
        image.paste(rim, corner, outer)
        image.paste(thing.rgb, corner, inner)
    left, top = divmod(scene.noise, 32)
    noise = grain(image_size).crop((left, top, left + image_size, top + image_size))
    return ImageChops.add(image, noise, offset=-128)


def save_jpeg(image: Image.Image, path: Path) -> None:
    """Writes a JPEG without chroma subsampling, which keeps colours sharp."""
    jpeg = BytesIO()
    image.save(jpeg, "JPEG", quality=92, subsampling=0)
    path.write_bytes(jpeg.getvalue())
