"""Furnished rooms: size, light, camera, what hangs on the walls and what stands where; one function a step.

The camera stands near the wall y- and looks towards y+. Furniture along a wall has its back to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scene_furniture as f
from scene_furniture import PALETTES, Look, Piece, new_piece
from scene_raycast import Camera, Light, Scene, render
from scene_textures import Texture

DOMAINS = ("source", "target")
X_LOW, X_HIGH, Y_HIGH = "x-", "x+", "y+"
WALLS = (Y_HIGH, X_LOW, X_HIGH)


@dataclass(frozen=True)
class Style:
    """What tells one domain from another, besides the palette. Lengths in metres, angles in degrees."""

    room: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]  # ranges of width, depth, height
    eye_height: tuple[float, float]
    view: tuple[float, float]  # horizontal field of view
    pitch: tuple[float, float]
    lamp_colour: tuple[float, float, float]
    lamp_power: tuple[float, float]
    ambient: tuple[float, float]
    floors: tuple[tuple[str, float, float], ...]  # pattern, tile size, second colour as a share of the first
    walls: tuple[tuple[str, float, float], ...]
    along_walls: dict[str, float]  # how often each piece is drawn
    in_middle: dict[str, float]
    num_pieces: tuple[int, int]
    noise: float


STYLES = {
    "source": Style(
        room=((3.6, 5.2), (4.0, 5.6), (2.4, 2.7)),
        eye_height=(1.4, 1.65),
        view=(60.0, 70.0),
        pitch=(8.0, 17.0),
        lamp_colour=(1.0, 0.93, 0.8),
        lamp_power=(1.6, 2.2),
        ambient=(0.3, 0.42),
        floors=(("planks", 0.16, 0.55), ("wood", 0.5, 0.65)),
        walls=(("plain", 1.0, 0.85), ("stripes", 0.3, 0.88), ("cloth", 0.4, 0.85)),
        along_walls={
            "bed": 2.2,
            "sofa": 1.6,
            "cabinet": 1.0,
            "bookshelf": 1.4,
            "lamp": 1.2,
            "plant": 1.0,
            "table": 0.6,
            "tv": 0.5,
        },
        in_middle={"table": 2.0, "chair": 2.5, "carton": 0.5, "ball": 1.0},
        num_pieces=(5, 9),
        noise=0.012,
    ),
    "target": Style(
        room=((4.4, 6.4), (4.8, 7.0), (2.7, 3.1)),
        eye_height=(1.0, 1.3),
        view=(72.0, 84.0),
        pitch=(1.0, 8.0),
        lamp_colour=(0.86, 0.94, 1.0),
        lamp_power=(1.1, 1.7),
        ambient=(0.26, 0.4),
        floors=(("checker", 0.45, 0.72), ("cloth", 0.2, 0.75), ("plain", 0.8, 0.8)),
        walls=(("plain", 1.0, 0.85), ("brick", 0.09, 0.8), ("plain", 1.0, 0.9)),
        along_walls={"cabinet": 2.4, "tv": 1.5, "sofa": 1.4, "bookshelf": 1.4, "plant": 1.2, "lamp": 0.9, "bed": 0.9},
        in_middle={"table": 1.6, "chair": 3.0, "carton": 1.6, "ball": 0.5},
        num_pieces=(6, 10),
        noise=0.02,
    ),
}


@dataclass(frozen=True)
class Kind:
    """A kind of furniture: its label, how it is built, and ranges of width, depth, height."""

    label: int
    build: Callable[[Piece, Look, tuple[float, ...], bool], None]
    size: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


KINDS = {
    "bed": Kind(f.BED, f.bed, ((1.0, 1.7), (1.9, 2.1), (0.8, 1.1))),
    "sofa": Kind(f.SOFA, f.sofa, ((1.5, 2.2), (0.8, 0.95), (0.75, 0.9))),
    "cabinet": Kind(f.CABINET, f.cabinet, ((0.8, 1.5), (0.4, 0.6), (0.75, 2.1))),
    "bookshelf": Kind(f.BOOKSHELF, f.bookshelf, ((0.7, 1.2), (0.28, 0.36), (1.3, 2.1))),
    "lamp": Kind(f.LAMP, f.floor_lamp, ((0.34, 0.46), (0.34, 0.46), (1.3, 1.6))),
    "plant": Kind(f.PLANT, f.plant, ((0.5, 0.7), (0.5, 0.7), (0.8, 1.3))),
    "table": Kind(f.TABLE, f.table, ((0.9, 1.6), (0.7, 0.9), (0.5, 0.76))),
    "chair": Kind(f.CHAIR, f.chair, ((0.44, 0.52), (0.44, 0.52), (0.9, 1.0))),
    "carton": Kind(f.BOX_LABEL, f.carton, ((0.35, 0.6), (0.3, 0.5), (0.25, 0.45))),
    "ball": Kind(f.OTHER_PROP, f.ball, ((0.25, 0.45), (0.25, 0.45), (0.25, 0.45))),
    "tv": Kind(f.TELEVISION, f.television, ((1.2, 1.7), (0.4, 0.45), (0.4, 0.5))),
}


@dataclass
class Plot:
    """The floor plan while it fills: rectangles taken (x0, x1, y0, y1) and, per wall, spans taken (from, to)."""

    width: float
    depth: float
    height: float
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    spans: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: {w: [] for w in WALLS})

    def free(self, rect: tuple[float, float, float, float]) -> bool:
        """Whether a rectangle lies in the room and touches nothing."""
        x0, x1, y0, y1 = rect
        if x0 < -self.width / 2 or x1 > self.width / 2 or y0 < -self.depth / 2 or y1 > self.depth / 2:
            return False
        return all(x1 <= a0 or x0 >= a1 or y1 <= b0 or y0 >= b1 for a0, a1, b0, b1 in self.taken)

    def length(self, wall: str) -> float:
        return self.width if wall == Y_HIGH else self.depth

    def on_wall(self, wall: str, along: float, out: float) -> tuple[float, float, float]:
        """World x, y and yaw of a thing on a wall, `along` from its middle and `out` into the room."""
        if wall == Y_HIGH:
            return along, self.depth / 2 - out, np.pi
        side = -1.0 if wall == X_LOW else 1.0
        return side * (self.width / 2 - out), along, side * np.pi / 2

    def free_span(self, wall: str, start: float, end: float) -> bool:
        inside = -self.length(wall) / 2 + 0.1 < start and end < self.length(wall) / 2 - 0.1
        return inside and all(end < a or start > b for a, b in self.spans[wall])


Visit = Callable[[Scene, Plot, Look], None]


def _between(rng: np.random.Generator, low_high: tuple[float, float]) -> float:
    return float(rng.uniform(*low_high))


def _pick(rng: np.random.Generator, shares: dict[str, float]) -> str:
    weights = np.array(list(shares.values()))
    return str(rng.choice(list(shares), p=weights / weights.sum()))


def _camera(plot: Plot, style: Style, rng: np.random.Generator) -> Camera:
    """Near the wall y-, looking at a point of the far half of the room."""
    position = np.array([rng.uniform(-0.3, 0.3) * plot.width, -plot.depth / 2 + rng.uniform(0.15, 0.6), 0.0])
    position[2] = _between(rng, style.eye_height)
    target = np.array([rng.uniform(-0.25, 0.25) * plot.width, plot.depth * rng.uniform(0.2, 0.5)])
    yaw = np.arctan2(target[0] - position[0], target[1] - position[1])
    pitch = np.deg2rad(_between(rng, style.pitch))
    focal = 0.5 / np.tan(np.deg2rad(_between(rng, style.view)) / 2)
    return Camera(position, look_axes(float(yaw), float(pitch)), float(focal))


def look_axes(yaw: float, pitch: float) -> np.ndarray:
    """Camera axes (rows right, down, forward) that look along +y, turned by `yaw` to the right and `pitch` down."""
    forward = np.array([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), -np.sin(pitch)])
    right = np.array([np.cos(yaw), -np.sin(yaw), 0.0])
    return np.stack([right, np.cross(forward, right), forward])


def _light(plot: Plot, style: Style, rng: np.random.Generator) -> Light:
    spot = rng.uniform(-0.25, 0.25, 2) * (plot.width, plot.depth)
    colour = np.array(style.lamp_colour)
    return Light(
        position=np.array([spot[0], spot[1], plot.height - 0.3]),
        colour=colour * _between(rng, style.lamp_power),
        reach=2.6,
        ambient=(0.5 + 0.5 * colour) * _between(rng, style.ambient),
        fill=0.25,
    )


def _doors(scene: Scene, plot: Plot, look: Look) -> None:
    """At most one door; nothing may stand before it."""
    rng = look.rng
    if rng.random() > 0.65:
        return
    wall, width, height = str(rng.choice(WALLS)), 0.9, 2.05
    along = rng.uniform(-0.42, 0.42) * (plot.length(wall) - 1.2)
    x, y, yaw = plot.on_wall(wall, along, 0.0)
    door = new_piece(scene, f.DOOR, (x, y, 0.0), yaw)
    door.box((0, 0, height / 2), (width + 0.12, 0.03, height + 0.06), look("frame", shade=0.9), shadow=False)
    door.box((0, 0.02, height / 2), (width, 0.04, height), look("door", "panels", 0.5, 0.55), shadow=False)
    door.ellipsoid((0.36, 0.07, 1.0), (0.035, 0.035, 0.035), look("art"), shadow=False)
    plot.spans[wall].append((along - 0.55, along + 0.55))
    x, y, _ = plot.on_wall(wall, along, 0.4)
    plot.taken.append((x - 0.5, x + 0.5, y - 0.5, y + 0.5))


def _hang(scene: Scene, plot: Plot, look: Look, label: int, wall: str, modern: bool) -> None:
    """A window (perhaps with curtains) or a picture in a free stretch of a wall; gives up after a few tries."""
    rng = look.rng
    window = label == f.WINDOW
    width, height = (rng.uniform(0.9, 1.7), rng.uniform(0.9, 1.25)) if window else rng.uniform(0.4, 0.9, 2)
    middle = 1.55 + (0.0 if window else rng.uniform(-0.05, 0.15))
    margin = 0.3 if window else 0.06
    for _ in range(6):
        along = rng.uniform(-0.5, 0.5) * plot.length(wall)
        if plot.free_span(wall, along - width / 2 - margin, along + width / 2 + margin):
            break
    else:
        return
    plot.spans[wall].append((along - width / 2 - margin, along + width / 2 + margin))
    x, y, yaw = plot.on_wall(wall, along, 0.0)
    piece = new_piece(scene, label, (x, y, middle), yaw)
    if not window:
        art = look.two("art", str(rng.choice(["sofa", "toy", "mat", "plant"])), "picture")
        piece.box((0, 0.01, 0), (width, 0.05, height), art, shadow=False)
        return
    sky = (0.28, 0.5, 0.9) if modern else (0.45, 0.65, 0.95)
    frame = look("frame", shade=0.9)
    piece.box((0, 0, 0), (width + 0.14, 0.06, height + 0.14), frame, shadow=False)
    phase = (float(rng.random()), 0.0)
    piece.box((0, 0.02, 0), (width, 0.04, height), Texture("window", frame.first, sky, 1.0, phase, 0.8), shadow=False)
    if rng.random() < 0.5:
        cloth = look("curtain", "stripes", 0.09, 0.78)
        curtain = new_piece(scene, f.CURTAIN, (x, y, middle), yaw)
        for side in (-1, 1):
            at = (side * (width / 2 + 0.12), 0.06, -0.1)
            curtain.box(at, (0.34, 0.06, height + 0.5), cloth, shadow=False)


def _along_wall(scene: Scene, plot: Plot, look: Look, name: str, modern: bool) -> None:
    """Put a piece with its back to a wall; gives up after a few tries."""
    rng, kind = look.rng, KINDS[name]
    w, d, h = (_between(rng, r) for r in kind.size)
    for _ in range(8):
        wall = WALLS[int(rng.integers(3))]
        along = rng.uniform(-0.5, 0.5) * max(plot.length(wall) - w - 0.1, 0.0)
        x, y, yaw = plot.on_wall(wall, along, d / 2 + 0.04)
        half_x, half_y = (w / 2, d / 2) if wall == Y_HIGH else (d / 2, w / 2)
        if plot.free((x - half_x, x + half_x, y - half_y, y + half_y)):
            break
    else:
        return
    plot.taken.append((x - half_x, x + half_x, y - half_y, y + half_y))
    if h > 0.95 or name == "tv":
        plot.spans[wall].append((along - w / 2, along + w / 2))
    kind.build(new_piece(scene, kind.label, (x, y, 0.0), yaw), look, (w, d, h), modern)


def _in_middle(scene: Scene, plot: Plot, look: Look, name: str, modern: bool) -> None:
    """Put a piece anywhere on the floor, turned anyhow; a table gets chairs and something on it."""
    rng, kind = look.rng, KINDS[name]
    w, d, h = (_between(rng, r) for r in kind.size)
    radius = 0.5 * float(np.hypot(w, d))
    for _ in range(10):
        x, y = rng.uniform(-0.5, 0.5) * (plot.width - 2 * radius), rng.uniform(-0.3, 0.5) * (plot.depth - 2 * radius)
        if plot.free((x - radius, x + radius, y - radius, y + radius)):
            break
    else:
        return
    plot.taken.append((x - radius, x + radius, y - radius, y + radius))
    piece = new_piece(scene, kind.label, (x, y, 0.0), float(rng.uniform(-np.pi, np.pi)))
    kind.build(piece, look, (w, d, h), modern)
    if name != "table":
        return
    if rng.random() < 0.7:
        f.ornament(piece, look, (float(rng.uniform(-0.25, 0.25)) * w, 0.0, h))
    for side in (-1, 1):
        if h > 0.6 and rng.random() < 0.6:
            seat = piece.on_top(f.CHAIR, (rng.uniform(-0.2, 0.2) * w, side * (d / 2 + 0.12), 0), np.pi * (side > 0))
            f.chair(seat, look, (0.46, 0.46, 0.95), modern)


def _mat(scene: Scene, plot: Plot, look: Look) -> None:
    """A rug near the middle, under whatever stands there."""
    rng = look.rng
    if rng.random() < 0.55:
        x, y = rng.uniform(-0.2, 0.2, 2) * (plot.width, plot.depth)
        pattern = str(rng.choice(["stripes", "cloth", "checker"]))
        mat = new_piece(scene, f.FLOOR_MAT, (x, y, 0.0), float(rng.uniform(-0.3, 0.3)))
        texture = look("mat", pattern, float(rng.uniform(0.12, 0.3)), 0.6)
        mat.box((0, 0, 0.006), (rng.uniform(1.2, 2.2), rng.uniform(1.0, 1.7), 0.012), texture, shadow=False)


def build_room(domain: str, rng: np.random.Generator, visit: Visit | None = None) -> Scene:
    """A furnished room of a domain; `visit` may put something of its own on the empty floor first."""
    style, look = STYLES[domain], Look(PALETTES[domain], rng)
    modern = domain == "target"
    width, depth, height = (_between(rng, r) for r in style.room)
    plot = Plot(width, depth, height)
    camera = _camera(plot, style, rng)
    (pattern, tile, shade) = style.walls[int(rng.integers(len(style.walls)))]
    wall = look("wall", pattern, tile, shade)
    (pattern, tile, shade) = style.floors[int(rng.integers(len(style.floors)))]
    floor = look("floor", pattern, tile, shade)
    scene = Scene(
        room_half=np.array([width, depth, height]) / 2,
        room_textures=[wall] * 4 + [floor, look("ceiling", shade=0.92)],
        room_labels=[f.WALL] * 4 + [f.FLOOR, f.CEILING],
        camera=camera,
        light=_light(plot, style, rng),
        exposure=float(rng.uniform(0.65, 1.0)),
        noise=style.noise,
    )
    x, y = camera.position[:2]
    plot.taken.append((x - 0.6, x + 0.6, y - 0.6, y + 1.1))  # nothing right before the lens
    _doors(scene, plot, look)
    _mat(scene, plot, look)
    if visit is not None:
        visit(scene, plot, look)
    for i in range(int(rng.integers(*style.num_pieces, endpoint=True))):
        if i % 5 < 3:
            _along_wall(scene, plot, look, _pick(rng, style.along_walls), modern)
        else:
            _in_middle(scene, plot, look, _pick(rng, style.in_middle), modern)
    for _ in range(int(rng.integers(2, 6))):
        label = f.WINDOW if rng.random() < 0.5 else f.PICTURE
        _hang(scene, plot, look, label, WALLS[int(rng.integers(3))], modern)
    return scene


def move_camera(camera: Camera, mirrored: bool, shift: tuple[float, float, float], roll: float, zoom: float) -> Camera:
    """The camera moved by `shift` metres along its own axes, turned clockwise by `roll` degrees round its optical axis,
    with its focal length times `zoom`; `mirrored` turns its x axis round, which is the room seen in a mirror."""
    right, down, forward = camera.axes
    c, s = np.cos(np.deg2rad(roll)), np.sin(np.deg2rad(roll))
    right, down = c * right + s * down, c * down - s * right
    axes = np.stack([-right if mirrored else right, down, forward])
    return Camera(camera.position + np.asarray(shift, dtype=np.float64) @ axes, axes, camera.focal * zoom)


def generator(seed: int, domain: str, index: int) -> np.random.Generator:
    """The random numbers of one picture: they depend on these three and on nothing else."""
    return np.random.default_rng(np.random.SeedSequence([seed, DOMAINS.index(domain), index]))


def render_scene(
    seed: int,
    domain: str,
    index: int,
    height: int,
    width: int,
    mirrored: bool = False,
    camera_shift: tuple[float, float, float] = (0.0, 0.0, 0.0),
    roll: float = 0.0,
    zoom: float = 1.0,
) -> dict[str, np.ndarray]:
    """Room number `index` of a domain as `scene_raycast.render` returns it (image, segmentation, depth, normals, ...).

    The last four arguments move the camera and leave the room as it is (see `move_camera`); a mirrored view equals the
    flipped one pixel for pixel, with the x of the normals negated.
    """
    rng = generator(seed, domain, index)
    scene = build_room(domain, rng)
    scene.camera = move_camera(scene.camera, mirrored, camera_shift, roll, zoom)
    view = render(scene, height, width, rng, mirrored)
    view["segmentation"][view["segmentation"] == f.PLANT] = f.OTHER_PROP
    return view
