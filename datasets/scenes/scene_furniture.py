"""Furniture from boxes, cylinders, ellipsoids and capsules, and the palettes of the two domains.

A piece is built in its own frame: x to its right, y to its front, z up, the origin on the floor below its middle;
metres. Its parts share one instance number and one label (NYUD-40 numbers, see CLASSES).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scene_raycast import BOX, CAPSULE, CYLINDER, ELLIPSOID, Primitive, Scene
from scene_textures import Texture

# Raw NYUD-40 labels that appear in the rooms; 0 is void.
WALL, FLOOR, CABINET, BED, CHAIR, SOFA, TABLE, DOOR, WINDOW, BOOKSHELF, PICTURE = range(1, 12)
CURTAIN, PILLOW, FLOOR_MAT, CEILING, TELEVISION, BOX_LABEL, LAMP, OTHER_PROP = 16, 18, 20, 22, 25, 29, 35, 40
VOID = 0
PLANT = 53  # OTHER_PROP on disk in NYUD_MT, a class of its own (pottedplant) in PASCAL_MT

PALETTES: dict[str, dict[str, str]] = {
    # warm living rooms and bedrooms
    "source": {
        "wall": "f0e6d2 e8d8b8 d9e4d0 f4e3d7 e6dcc8",
        "floor": "b07a45 8f6236 c49a6c 9c6f43",
        "ceiling": "fbf8f0",
        "cabinet": "7a4a24 8d5c33 6a3f22",
        "bed": "b23a48 d98e73 c75b4a a84a6a",
        "chair": "d2803c c0692b e09f3e",
        "sofa": "7a8450 8c6a5d 6b7f4a 97825a",
        "table": "c69a63 b58650 d1aa78",
        "door": "d8b98a cfa873",
        "frame": "fafafa f2eee4",
        "shelf": "6e4a2a 5d3b20",
        "art": "3b2716 8a6d1f",
        "curtain": "c9a66b b5534c d9b44a",
        "pillow": "f6e7cb f3d9b1 fff4e0",
        "mat": "9e2b25 7b3f61 8e3b2f",
        "screen": "141418",
        "carton": "c8a165 b98f55",
        "lamp": "fff1c0 ffe9b0",
        "plant": "3f7d3a 557f2e",
        "toy": "e63946 f4a261 e9c46a",
    },
    # cool, modern rooms
    "target": {
        "wall": "c9d6df b8c4cc dfe7ea a9b8c2 d5d9e5",
        "floor": "80868e 9aa0a6 6d7884 a8a6a0",
        "ceiling": "e8edf0",
        "cabinet": "5d6d7e 7b8794 4b5a68",
        "bed": "5f7fa8 7a6fa0 4f8a97",
        "chair": "2e9fb8 3fa7d6 4cb0a5",
        "sofa": "3f5f5a 4a6658 5a6a55",
        "table": "d3d9dc b9c0c4 c7c2b8",
        "door": "8fa0a8 a3a89d",
        "frame": "50565c e8ecef",
        "shelf": "3f4a54 2f3a44",
        "art": "1d1d1f e0e0e0",
        "curtain": "8d99ae 6f8fa6 a5a58d",
        "pillow": "e7ecf2 cfd8e6 dfe6da",
        "mat": "4a3f6b 35516b 6b4a5a",
        "screen": "0f1115",
        "carton": "b59a78 a58f74",
        "lamp": "eef6ff f6fbff",
        "plant": "2f6b4f 4b7a55",
        "toy": "d1495b 00a6a6 edae49",
    },
}


def linear(code: str, jitter: Sequence[float] = (0.0, 0.0, 0.0)) -> tuple[float, float, float]:
    """Linear RGB of a hex colour, with an offset added before the gamma is taken away."""
    raw = (int(code[i : i + 2], 16) / 255.0 + jitter[i // 2] for i in (0, 2, 4))
    r, g, b = (min(max(value, 0.02), 0.98) ** 2 for value in raw)
    return r, g, b


class Look:
    """Draws textures from the palette of a domain with the random numbers of one scene."""

    def __init__(self, palette: dict[str, str], rng: np.random.Generator) -> None:
        self.palette, self.rng = palette, rng

    def __call__(self, name: str, pattern: str = "plain", scale: float = 0.5, shade: float = 0.75, glow: float = 0.0):
        """A texture in a colour of `name`; the second colour is the first times `shade`."""
        codes = self.palette[name].split()
        code = codes[int(self.rng.integers(len(codes)))]
        hue, brightness = self.rng.normal(0.0, 0.025, 3).tolist(), float(self.rng.normal(0.0, 0.02))
        first = linear(code, [h + brightness for h in hue])
        second = (first[0] * shade, first[1] * shade, first[2] * shade)
        x, y = (self.rng.random(2) * 40).tolist()
        return Texture(pattern, first, second, scale, (x, y), glow)

    def two(self, name: str, other: str, pattern: str, scale: float = 0.5) -> Texture:
        """A texture in the colours of two palette entries."""
        a, b = self(name), self(other)
        return Texture(pattern, a.first, b.first, scale, a.phase)


@dataclass
class Piece:
    """One instance under construction; its parts go into the scene as they are made."""

    scene: Scene
    label: int
    origin: np.ndarray
    yaw: float
    instance: int

    def _frame(self) -> np.ndarray:
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])

    def _add(self, kind: int, at, half, texture: Texture, axes=None, stretch=0.0, shadow=True, label=None, part=0):
        frame = self._frame()
        centre = self.origin + frame @ np.asarray(at, dtype=np.float64)
        axes = frame if axes is None else frame @ axes
        label = self.label if label is None else label
        half = np.asarray(half, dtype=np.float64)
        self.scene.primitives.append(
            Primitive(kind, centre, half, axes, texture, self.instance, label, part, stretch, shadow)
        )

    def box(self, at, size, texture: Texture, shadow: bool = True, turn: float = 0.0) -> None:
        """A box by its middle and its full size, turned round its own upright by `turn` radians."""
        c, s = np.cos(turn), np.sin(turn)
        axes = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) if turn else None
        self._add(BOX, at, np.asarray(size) / 2, texture, axes, shadow=shadow)

    def cylinder(self, at, radius: float, height: float, texture: Texture, shadow=True, part=0) -> None:
        """An upright cylinder by its middle."""
        self._add(CYLINDER, at, (radius, radius, height / 2), texture, shadow=shadow, part=part)

    def wheel(self, at, radius: float, width: float, texture: Texture) -> None:
        """A cylinder that lies along x."""
        axes = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
        self._add(CYLINDER, at, (radius, radius, width / 2), texture, axes)

    def ellipsoid(self, at, half, texture: Texture, shadow=True, part=0) -> None:
        """An ellipsoid by its middle and half axes."""
        self._add(ELLIPSOID, at, half, texture, shadow=shadow, part=part)

    def capsule(self, start, end, radius: float, texture: Texture, part: int = 0) -> None:
        """A rod with round ends between two points."""
        start, end = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
        along = end - start
        length = float(np.linalg.norm(along))
        z = along / length
        x = np.cross(z, [1.0, 0.0, 0.0] if abs(z[0]) < 0.9 else [0.0, 1.0, 0.0])
        x /= np.linalg.norm(x)
        axes = np.stack([x, np.cross(z, x), z], axis=1)
        half = (radius, radius, radius)
        self._add(CAPSULE, (start + end) / 2, half, texture, axes, stretch=length / 2 / radius, part=part)

    def on_top(self, label: int, at, turn: float = 0.0) -> Piece:
        """A new instance that stands at a point of this piece."""
        return new_piece(self.scene, label, self.origin + self._frame() @ np.asarray(at), self.yaw + turn)


def new_piece(scene: Scene, label: int, origin, yaw: float) -> Piece:
    """The next instance of a scene."""
    piece = Piece(scene, label, np.asarray(origin, dtype=np.float64), yaw, scene.num_instances)
    scene.num_instances += 1
    return piece


def table(piece: Piece, look: Look, size, modern: bool) -> None:
    """A table on four legs, or round on one; `size` is width, depth, height."""
    w, d, h = size
    top = look("table", "wood", 0.25, 0.6)
    if modern and look.rng.random() < 0.5:
        radius = min(w, d) / 2
        piece.cylinder((0, 0, h - 0.02), radius, 0.05, top)
        piece.cylinder((0, 0, h / 2), 0.05, h, look("table", shade=0.6))
        piece.cylinder((0, 0, 0.02), radius * 0.55, 0.04, top, shadow=False)
        return
    piece.box((0, 0, h - 0.025), (w, d, 0.05), top)
    for x in (-1, 1):
        for y in (-1, 1):
            piece.box((x * (w / 2 - 0.06), y * (d / 2 - 0.06), h / 2 - 0.03), (0.06, 0.06, h - 0.05), top)


def chair(piece: Piece, look: Look, size, modern: bool) -> None:
    """Seat, back and legs (source: four wooden; target: one column and a rounded shell)."""
    w, d, h = size
    seat = look("chair", "cloth", 0.15, 0.7)
    if modern:
        piece.cylinder((0, 0, 0.46), w / 2, 0.06, seat)
        piece.ellipsoid((0, -d / 2 + 0.06, 0.72), (w / 2, 0.05, 0.22), seat)
        piece.cylinder((0, 0, 0.23), 0.03, 0.44, look("screen"))
        piece.cylinder((0, 0, 0.02), w * 0.4, 0.03, look("screen"), shadow=False)
        return
    wood = look("chair", "wood", 0.2, 0.6)
    piece.box((0, 0, 0.45), (w, d, 0.06), seat)
    piece.box((0, -d / 2 + 0.03, 0.72), (w, 0.04, h - 0.5), wood)
    for x in (-1, 1):
        for y in (-1, 1):
            piece.box((x * (w / 2 - 0.03), y * (d / 2 - 0.03), 0.21), (0.05, 0.05, 0.42), wood)


def bed(piece: Piece, look: Look, size, modern: bool) -> None:
    """Head board at the back, mattress, blanket, one or two pillows (instances of their own)."""
    w, d, h = size
    frame = look("shelf", "wood", 0.3, 0.7)
    blanket = look("bed", "checker" if modern else "stripes", 0.22, 0.72)
    piece.box((0, 0, 0.15), (w, d, 0.24), frame)
    piece.box((0, 0, 0.36), (w - 0.06, d - 0.06, 0.2), look("pillow"))
    piece.box((0, 0.25, 0.4), (w, d - 0.5, 0.2), blanket)
    piece.box((0, -d / 2 + 0.03, h / 2), (w, 0.06, h), frame)
    for x in (-0.25, 0.25):
        pillow = piece.on_top(PILLOW, (x * w, -d / 2 + 0.3, 0.5))
        pillow.ellipsoid((0, 0, 0.03), (0.2 * w, 0.17, 0.09), look("pillow", "cloth", 0.3, 0.85))


def sofa(piece: Piece, look: Look, size, modern: bool) -> None:
    """Base, back, two arms; arms are round in the source domain."""
    w, d, h = size
    cloth = look("sofa", "cloth", 0.25 if modern else 0.12, 0.7)
    seat = Texture(cloth.pattern, cloth.first, cloth.second, cloth.scale, (3.3, 7.1))
    piece.box((0, 0, 0.2), (w, d, 0.32), cloth)
    piece.box((0, 0.06, 0.39), (w - 0.3, d - 0.14, 0.12), seat)
    piece.box((0, -d / 2 + 0.1, h / 2), (w, 0.2, h), cloth)
    for x in (-1, 1):
        if modern:
            piece.box((x * (w / 2 - 0.09), 0, 0.3), (0.18, d, 0.56), cloth)
        else:
            ends = ((x * (w / 2 - 0.1), -d / 2 + 0.12, 0.5), (x * (w / 2 - 0.1), d / 2 - 0.1, 0.5))
            piece.capsule(*ends, 0.12, cloth)
    for seat_x in (-0.28, 0.28):
        if look.rng.random() < 0.5:
            pillow = piece.on_top(PILLOW, (seat_x * w, -0.05, 0.6), float(look.rng.uniform(-0.4, 0.4)))
            pillow.ellipsoid((0, 0, 0), (0.2, 0.09, 0.18), look("pillow", "cloth", 0.3, 0.85))


def cabinet(piece: Piece, look: Look, size, modern: bool) -> None:
    """A body with fronts; something may stand on a low one."""
    w, d, h = size
    piece.box((0, -0.01, h / 2 + 0.03), (w, d - 0.02, h - 0.06), look("cabinet", "doors", w / round(w / 0.45), 0.45))
    piece.box((0, 0, h - 0.015), (w + 0.04, d + 0.02, 0.03), look("cabinet", "wood", 0.3, 0.7))
    if h < 1.1:
        ornament(piece, look, (float(look.rng.uniform(-0.3, 0.3)) * w, 0, h))


def bookshelf(piece: Piece, look: Look, size, modern: bool) -> None:
    """Sides, boards, a back, and rows of books."""
    w, d, h = size
    wood = look("shelf", "wood", 0.3, 0.7)
    for x in (-1, 1):
        piece.box((x * (w / 2 - 0.02), 0, h / 2), (0.04, d, h), wood)
    piece.box((0, -d / 2 + 0.01, h / 2), (w, 0.02, h), wood)
    boards = 4 if h < 1.6 else 5
    gap = (h - 0.04) / (boards - 1)
    for i in range(boards):
        piece.box((0, 0, 0.02 + i * gap), (w, d, 0.035), wood)
        if i < boards - 1 and look.rng.random() < 0.85:
            share = float(look.rng.uniform(0.55, 1.0))
            books = look("shelf", "books", 0.045, 1.0)
            row = Texture("books", books.first, (float(look.rng.random()) * 0.6, 0.3, 0.25), 0.045, books.phase)
            piece.box(
                ((share - 1) * w * 0.45, -0.04, 0.04 + (i + 0.4) * gap), (w * share - 0.09, d - 0.12, gap * 0.8), row
            )


def floor_lamp(piece: Piece, look: Look, size, modern: bool) -> None:
    """A foot, a stem, a shade that glows."""
    w, _, h = size
    shade = look("lamp", shade=0.9, glow=0.75)
    piece.cylinder((0, 0, 0.015), w * 0.4, 0.03, look("screen"), shadow=False)
    piece.cylinder((0, 0, h / 2), 0.018, h, look("screen"))
    if modern:
        piece.ellipsoid((0, 0, h), (w / 2, w / 2, w / 2), shade, shadow=False)
    else:
        piece.cylinder((0, 0, h), w / 2, w * 0.8, shade, shadow=False)


def plant(piece: Piece, look: Look, size, modern: bool) -> None:
    """A pot and a bunch of leaves."""
    w, _, h = size
    pot = look("toy" if modern else "door", shade=0.8)
    piece.cylinder((0, 0, h * 0.15), w * 0.3, h * 0.3, pot)
    leaves = look("plant", "cloth", 0.06, 0.35)
    for _ in range(5):
        x, y = look.rng.uniform(-0.2, 0.2, 2) * w
        lean = look.rng.uniform(-0.35, 0.35, 2) * w
        piece.capsule((x * 0.3, y * 0.3, h * 0.3), (x + lean[0], y + lean[1], h * 0.85), w * 0.09, leaves)
    piece.ellipsoid((0, 0, h * 0.65), (w * 0.33, w * 0.33, h * 0.22), leaves)


def carton(piece: Piece, look: Look, size, modern: bool) -> None:
    """One or two cardboard boxes."""
    w, d, h = size
    card = look("carton", "cloth", 0.4, 0.85)
    piece.box((0, 0, h / 2), (w, d, h), card)
    piece.box((0, 0, h / 2), (0.06, d + 0.004, h + 0.004), look("lamp", shade=0.9), shadow=False)
    if look.rng.random() < 0.35:
        piece.box((0.03, 0, h * 1.3), (w * 0.7, d * 0.7, h * 0.6), card, turn=float(look.rng.uniform(-0.5, 0.5)))


def ball(piece: Piece, look: Look, size, modern: bool) -> None:
    """A beach ball."""
    r = size[0] / 2
    piece.ellipsoid((0, 0, r), (r, r, r), look.two("toy", "pillow", "stripes", r * 0.8))


def television(piece: Piece, look: Look, size, modern: bool) -> None:
    """A low board (cabinet) with a television on it."""
    w, d, h = size
    cabinet_low = new_piece(piece.scene, CABINET, piece.origin, piece.yaw)
    cabinet_low.box((0, 0, h / 2), (w, d, h), look("cabinet", "doors", w / 3, 0.45))
    tv = look.two("screen", "sofa", "screen", 1.0)
    piece.box((0, 0, h + 0.4), (w * 0.75, 0.06, w * 0.42), tv)
    piece.box((0, 0, h + 0.06), (0.1, 0.05, 0.16), look("screen"))


def ornament(piece: Piece, look: Look, at) -> None:
    """Something small on a table or cabinet: a lamp, a box, a plant, a ball, or an unlabelled object (void)."""
    kind = int(look.rng.integers(0, 5))
    if kind == 0:
        lamp = piece.on_top(LAMP, at)
        lamp.cylinder((0, 0, 0.12), 0.03, 0.24, look("art"))
        lamp.cylinder((0, 0, 0.32), 0.13, 0.2, look("lamp", shade=0.9, glow=0.75), shadow=False)
    elif kind == 1:
        carton(piece.on_top(BOX_LABEL, at, 0.3), look, (0.26, 0.2, 0.16), False)
    elif kind == 2:
        plant(piece.on_top(PLANT, at), look, (0.3, 0.3, 0.4), False)
    elif kind == 3:
        ball(piece.on_top(OTHER_PROP, at), look, (0.22, 0.22, 0.22), False)
    else:
        vase = piece.on_top(VOID, at)
        vase.ellipsoid((0, 0, 0.12), (0.08, 0.08, 0.13), look("toy"))
