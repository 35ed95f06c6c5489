"""Pictures with people for the PASCAL_MT layout: figures with body parts, a salient object, indoors or outdoors.

Indoors is a room of `scene_rooms` with one or two people in it; outdoors is a meadow or a street under the sky with
people, animals, vehicles, trees and houses. Labels inside a scene are THINGS; the classes of VOC (21) and of
PASCAL-Context (459) are looked up from them.
"""

from __future__ import annotations

import numpy as np
import scene_furniture as f
from scene_furniture import PALETTES, Look, Piece, linear, new_piece
from scene_raycast import Camera, Light, Scene, render
from scene_rooms import Plot, build_room, generator, look_axes, move_camera
from scene_textures import Texture

PERSON = 31
GRASS, SKY, BUILDING, TREE, ROAD, CAR, BUS, DOG, HORSE, SHEEP, COW, BOTTLE = range(41, 53)

# thing: (VOC class or 0, PASCAL-Context number); whatever is missing is (0, 431 "unknown")
THINGS: dict[int, tuple[int, int]] = {
    f.WALL: (0, 440),
    f.FLOOR: (0, 158),
    f.CABINET: (0, 46),
    f.BED: (0, 18),
    f.CHAIR: (9, 72),
    f.SOFA: (18, 368),
    f.TABLE: (11, 397),
    f.DOOR: (0, 115),
    f.WINDOW: (0, 454),
    f.BOOKSHELF: (0, 349),
    f.PICTURE: (0, 287),
    f.CURTAIN: (0, 105),
    f.PILLOW: (0, 290),
    f.FLOOR_MAT: (0, 330),
    f.CEILING: (0, 68),
    f.TELEVISION: (20, 427),
    f.BOX_LABEL: (0, 37),
    f.LAMP: (0, 232),
    f.OTHER_PROP: (0, 10),  # balls
    f.PLANT: (16, 308),
    PERSON: (15, 284),
    GRASS: (0, 187),
    SKY: (0, 360),
    BUILDING: (0, 44),
    TREE: (0, 420),
    ROAD: (0, 324),
    CAR: (7, 59),
    BUS: (6, 45),
    DOG: (12, 113),
    HORSE: (13, 207),
    SHEEP: (17, 347),
    COW: (10, 98),
    BOTTLE: (5, 34),
}
VOC_OF = np.array([THINGS.get(i, (0, 431))[0] for i in range(64)], dtype=np.uint8)
CONTEXT_OF = np.array([THINGS.get(i, (0, 431))[1] for i in range(64)], dtype=np.uint16)

# Body parts by the names of PASCAL-Part; the second table joins them to the six of the benchmark.
PART_NAMES = (
    "",
    "head",
    "hair",
    "neck",
    "torso",
    "luarm",
    "llarm",
    "lhand",
    "ruarm",
    "rlarm",
    "rhand",
    "luleg",
    "llleg",
    "lfoot",
    "ruleg",
    "rlleg",
    "rfoot",
)
SIX_PARTS = np.array([0, 1, 1, 2, 2, 3, 4, 4, 3, 4, 4, 5, 6, 6, 5, 6, 6], dtype=np.uint8)
_PART = {name: i for i, name in enumerate(PART_NAMES)}

SKIN = ("f1c9a5", "d9a47a", "a86f45", "6f4527")
CLOTHES = {
    "source": ("c0392b", "e0a030", "2e7d4f", "8e44ad", "d96a8a", "f0ead6"),
    "target": ("34506b", "1f7a8c", "7f8fa6", "4a4e69", "b33951", "dfe6e9"),
}
COATS: dict[int, tuple[str, ...]] = {DOG: ("8a5a30", "d8b98a", "2b2523"), HORSE: ("5c3a21", "7b4a2a", "2f2622")}
COATS |= {SHEEP: ("eee8dc", "d9d2c3"), COW: ("f2efe8", "6b4a3a", "8c6a50")}
PAINT = {"source": ("c62828", "e9c46a", "2a6f4e"), "target": ("3a5a8c", "d0d5da", "22577a")}


def _cloth(rng: np.random.Generator, codes: tuple[str, ...], pattern="plain", scale=0.3, shade=0.75) -> Texture:
    first = linear(codes[int(rng.integers(len(codes)))], rng.normal(0.0, 0.03, 3).tolist())
    second = (first[0] * shade, first[1] * shade, first[2] * shade)
    return Texture(pattern, first, second, scale, (float(rng.random() * 40), float(rng.random() * 40)))


def _limb(piece: Piece, names: tuple[str, str, str], start, bend, lengths, radius, textures) -> None:
    """Upper and lower limb and a hand or foot; `bend` holds two directions [2, 3]."""
    start = np.asarray(start, dtype=np.float64)
    for k in range(2):
        direction = np.asarray(bend[k]) / np.linalg.norm(bend[k])
        end = start + direction * lengths[k]
        piece.capsule(start, end, radius * (1.0, 0.82)[k], textures[k], _PART[names[k]])
        start = end
    foot = names[2].endswith("foot")
    half = (radius * 0.8, radius * 1.7, radius * 0.7) if foot else (radius * 0.85,) * 3
    at = start + (np.array([0.0, radius * 0.9, -radius * 0.3]) if foot else direction * radius)
    piece.ellipsoid(at, half, textures[2], part=_PART[names[2]])


def person(piece: Piece, domain: str, rng: np.random.Generator) -> None:
    """A standing or walking figure, face to its own y; 1.5 to 1.9 m tall."""
    s = float(rng.uniform(1.5, 1.9)) / 1.75
    skin, hair = _cloth(rng, SKIN, shade=0.9), _cloth(rng, ("2b1d14", "5a3a1e", "c9a25a", "1b1b1d"), "cloth", 0.05)
    pattern = ("plain", "stripes", "checker")[int(rng.integers(3))]
    shirt = _cloth(rng, CLOTHES[domain], pattern, 0.12, 0.7)
    trousers = _cloth(rng, ("2c3e50", "3b3b40", "6b5b4b", "8a8f98"), "cloth", 0.2)
    shoes = _cloth(rng, ("1d1d1f", "f0f0f0", "7a2e1f"))
    bare_arms, bare_legs = rng.random() < 0.6, rng.random() < 0.35
    hip, shoulder = 0.88 * s, 1.42 * s
    piece.ellipsoid((0, 0, 1.17 * s), (0.2 * s, 0.125 * s, 0.33 * s), shirt, part=_PART["torso"])
    piece.ellipsoid((0, 0, 0.93 * s), (0.17 * s, 0.12 * s, 0.13 * s), trousers, part=_PART["torso"])
    piece.cylinder((0, 0, 1.5 * s), 0.05 * s, 0.12 * s, skin, part=_PART["neck"])
    piece.ellipsoid((0, 0.01, 1.63 * s), (0.085 * s, 0.1 * s, 0.125 * s), skin, part=_PART["head"])
    piece.ellipsoid((0, -0.025, 1.665 * s), (0.092 * s, 0.1 * s, 0.105 * s), hair, part=_PART["hair"])
    stride = float(rng.uniform(-0.45, 0.45))
    for side, letter in ((-1, "l"), (1, "r")):
        swing, lift, fold = -side * stride, float(rng.choice([0.15, 0.3, 0.9])), float(rng.uniform(0.0, 1.2))
        arms = ((side * lift, swing, -1.0), (side * lift * 0.4, swing + fold, -1.0 + 0.9 * fold))
        names = (f"{letter}uarm", f"{letter}larm", f"{letter}hand")
        textures = (shirt, skin if bare_arms else shirt, skin)
        _limb(piece, names, (side * 0.23 * s, 0, shoulder), arms, (0.28 * s, 0.25 * s), 0.055 * s, textures)
        step = side * stride
        legs = ((side * 0.08, step, -1.0), (0.0, step - 0.25 * abs(step), -1.0))
        names = (f"{letter}uleg", f"{letter}lleg", f"{letter}foot")
        textures = (trousers, skin if bare_legs else trousers, shoes)
        _limb(piece, names, (side * 0.1 * s, 0, hip), legs, (0.4 * s, 0.4 * s), 0.085 * s, textures)


def animal(piece: Piece, thing: int, rng: np.random.Generator) -> None:
    """A body on four legs with neck, head and tail; proportions by kind."""
    height = {DOG: 0.55, SHEEP: 0.75, COW: 1.35, HORSE: 1.5}[thing] * float(rng.uniform(0.9, 1.1))
    shapes = {DOG: (0.75, 0.35, 0.2), SHEEP: (0.75, 0.2, 0.33), COW: (0.8, 0.25, 0.26), HORSE: (0.75, 0.5, 0.2)}
    body, neck, thick = shapes[thing]
    pattern, scale = ("checker", 0.35) if thing == COW else ("cloth", 0.08)
    coat = _cloth(rng, COATS[thing], pattern, scale, 0.35 if thing == COW else 0.7)
    dark = _cloth(rng, ("2b2523", "4a3b30"))
    long, h = body * height, height * 0.72
    piece.ellipsoid((0, 0, h), (thick * height, long * 0.62, thick * height * 1.1), coat)
    for x in (-1, 1):
        for y in (-1, 1):
            top = (x * thick * 0.55 * height, y * long * 0.42, h)
            piece.capsule(top, (top[0], top[1] + float(rng.uniform(-0.08, 0.08)), 0.05), 0.055 * height, coat)
    throat, skull = (0, long * 0.5, h + 0.1 * height), (0, long * 0.5 + neck * 0.5 * height, h + neck * height)
    piece.capsule(throat, skull, 0.1 * height, coat)
    piece.ellipsoid((0, skull[1] + 0.1 * height, skull[2]), (0.09 * height, 0.18 * height, 0.09 * height), dark)
    piece.capsule((0, -long * 0.6, h), (0, -long * 0.6 - 0.12 * height, h - 0.3 * height), 0.03 * height, dark)


def vehicle(piece: Piece, thing: int, domain: str, rng: np.random.Generator) -> None:
    """A car or a bus: body, cabin with windows, four wheels; its long side is y."""
    paint_, tyre = _cloth(rng, PAINT[domain], shade=0.85), _cloth(rng, ("17171a",))
    glass = Texture("checker", (0.05, 0.07, 0.09), (0.25, 0.33, 0.4), 0.9)
    w, long, h = (1.75, 4.1, 0.75) if thing == CAR else (2.4, 8.5, 2.6)
    piece.box((0, 0, 0.35 + h / 2), (w, long, h), paint_)
    if thing == CAR:
        piece.ellipsoid((0, -0.2, 1.1), (w * 0.46, long * 0.3, 0.52), glass)
        piece.box((0, -0.2, 1.56), (w * 0.6, long * 0.25, 0.06), paint_)
    else:
        piece.box((0, 0, 2.05), (w + 0.03, long * 0.94, 0.85), glass)
    for x in (-1, 1):
        for y in (-0.31, 0.31):
            piece.wheel((x * (w / 2 - 0.1), y * long, 0.36), 0.36, 0.24, tyre)


def tree(piece: Piece, rng: np.random.Generator) -> None:
    """A trunk under a few balls of leaves."""
    h = float(rng.uniform(3.0, 6.0))
    leaves = _cloth(rng, ("3f7d3a", "5b8c2a", "2f6b4f"), "cloth", 0.25, 0.4)
    piece.cylinder((0, 0, h * 0.25), 0.14, h * 0.5, _cloth(rng, ("5c4033", "7a5a43"), "wood", 0.2))
    for _ in range(4):
        x, y = rng.uniform(-0.16, 0.16, 2) * h
        z = h * float(rng.uniform(0.55, 0.85))
        piece.ellipsoid((x, y, z), (h * 0.22, h * 0.22, h * 0.2), leaves)


def _house(scene: Scene, x: float, y: float, domain: str, rng: np.random.Generator) -> None:
    w, d, h = rng.uniform(5, 9), rng.uniform(4, 6), rng.uniform(3.5, 8)
    piece = new_piece(scene, BUILDING, (x, y, 0.0), float(rng.uniform(-0.4, 0.4)))
    walls = PALETTES[domain]["wall"] if rng.random() < 0.5 else "a9573f 8f6a55"
    piece.box((0, 0, h / 2), (w, d, h), _cloth(rng, tuple(walls.split()), "brick", 0.35, 0.8))
    piece.box((0, 0, h + 0.15), (w + 0.5, d + 0.5, 0.3), _cloth(rng, ("6b3a2e", "4a4f57")))
    pane = Texture("window", (0.8, 0.8, 0.8), (0.1, 0.16, 0.24), 1.0)
    for i in (-0.3, 0.0, 0.3):
        for z in np.arange(1.6, h - 0.8, 2.4):
            piece.box((i * w, -d / 2, z), (1.0, 0.08, 1.3), pane, shadow=False)


def _outdoor_scene(domain: str, rng: np.random.Generator) -> Scene:
    """Ground, sky, camera and sun, still empty."""
    warm = domain == "source"
    street = rng.random() < (0.35 if warm else 0.65)
    sky = (0.28, 0.5, 0.88) if warm else (0.5, 0.56, 0.64)
    air = Texture("sky", sky, (0.92, 0.92, 0.92), 16.0, (float(rng.random() * 40), float(rng.random() * 40)), 1.0)
    ground = _cloth(rng, ("77797d", "8a8783"), "cloth", 0.5, 0.8)
    if not street:
        ground = _cloth(rng, ("5f8f3a", "78983f") if warm else ("8a8f5a", "a39a6a"), "cloth", 0.35, 0.6)
    pitch = float(np.deg2rad(rng.uniform(2.0, 9.0)))
    axes = look_axes(float(rng.uniform(-0.2, 0.2)), pitch)
    focal = 0.5 / np.tan(np.deg2rad(rng.uniform(48, 60)) / 2)
    sun = np.array([rng.uniform(-25, 25), rng.uniform(-30, 0), 27.0])
    return Scene(
        room_half=np.array([40.0, 40.0, 15.0]),
        room_textures=[air] * 4 + [ground, air],
        room_labels=[SKY] * 4 + [ROAD if street else GRASS, SKY],
        camera=Camera(np.array([0.0, -8.0, rng.uniform(1.3, 1.8)]), axes, float(focal)),
        light=Light(sun, np.array([1.0, 0.95, 0.85]) * (1.5 if warm else 0.9), 60.0, np.full(3, 0.42), 0.2),
        exposure=float(rng.uniform(0.75, 1.0)),
        noise=0.012 if warm else 0.02,
    )


def build_outdoors(domain: str, rng: np.random.Generator) -> Scene:
    """Houses and trees behind, one or two subjects in front, something between."""
    scene = _outdoor_scene(domain, rng)
    eye, (right, _, forward) = scene.camera.position, scene.camera.axes
    ahead = np.array([forward[0], forward[1], 0.0]) / np.hypot(forward[0], forward[1])

    def spot(distance: float, across: float) -> np.ndarray:
        """A point on the ground; `across` is -1 to 1 over the width of the view at that distance."""
        return (eye + ahead * distance + right * (across * distance * 0.5 / scene.camera.focal)) * np.array([1, 1, 0])

    for _ in range(int(rng.integers(0, 3))):
        x, y, _z = spot(float(rng.uniform(20, 30)), float(rng.uniform(-1, 1)))
        _house(scene, x, y, domain, rng)
    for _ in range(int(rng.integers(1, 5))):
        tree(new_piece(scene, TREE, spot(float(rng.uniform(9, 24)), float(rng.uniform(-1.1, 1.1))), 0.0), rng)
    street = scene.room_labels[4] == ROAD
    for _ in range(int(rng.integers(0, 3))):
        thing = int(rng.choice([CAR, BUS] if street else [HORSE, COW, SHEEP]))
        at, yaw = spot(float(rng.uniform(9, 15)), float(rng.uniform(-0.9, 0.9))), float(rng.uniform(-np.pi, np.pi))
        piece = new_piece(scene, thing, at, yaw)
        if street:
            vehicle(piece, thing, domain, rng)
        else:
            animal(piece, thing, rng)
    people = int(rng.choice([0, 1, 1, 1, 2]))
    for i in range(max(people, 1)):
        at = spot(float(rng.uniform(2.8, 5.5)), float(rng.uniform(-0.35, 0.35)) + (0.4 * i if people > 1 else 0.0))
        yaw = float(rng.uniform(-0.8, 0.8)) + np.pi
        if people:
            person(new_piece(scene, PERSON, at, yaw), domain, rng)
        else:
            thing = int(rng.choice([DOG, HORSE, SHEEP, COW]))
            animal(new_piece(scene, thing, at, float(rng.uniform(-np.pi, np.pi))), thing, rng)
    if rng.random() < 0.4:
        dog = spot(float(rng.uniform(3.5, 6)), float(rng.uniform(-0.8, 0.8)))
        animal(new_piece(scene, DOG, dog, float(rng.uniform(-np.pi, np.pi))), DOG, rng)
    return scene


def build_indoors(domain: str, rng: np.random.Generator) -> Scene:
    """A furnished room with people (or, one time in six, nobody) and perhaps a bottle on the floor."""

    def visit(scene: Scene, plot: Plot, look: Look) -> None:
        for _ in range(int(rng.choice([0, 1, 1, 1, 2, 2]))):
            for _try in range(10):
                x = float(rng.uniform(-0.4, 0.4)) * plot.width
                y = float(rng.uniform(-0.1, 0.4)) * plot.depth
                rect = (x - 0.4, x + 0.4, y - 0.4, y + 0.4)
                if plot.free(rect):
                    plot.taken.append(rect)
                    yaw = np.pi + float(rng.uniform(-1.0, 1.0))
                    person(new_piece(scene, PERSON, (x, y, 0.0), yaw), domain, rng)
                    break
        if rng.random() < 0.3:
            x, y = rng.uniform(-0.3, 0.3) * plot.width, rng.uniform(-0.2, 0.3) * plot.depth
            bottle = new_piece(scene, BOTTLE, (x, y, 0.0), 0.0)
            green = _cloth(rng, ("1f6b3a", "7a4a1e"))
            bottle.cylinder((0, 0, 0.18), 0.09, 0.36, green)
            bottle.cylinder((0, 0, 0.42), 0.035, 0.2, green)

    return build_room(domain, rng, visit)


def salient(instance_HW: np.ndarray, voc_HW: np.ndarray) -> np.ndarray:
    """bool [H, W]: every person of more than 1.5 % of the picture; without one, the VOC object with the largest area
    weighted towards the middle; without any object, nothing."""
    height, width = instance_HW.shape
    y, x = np.mgrid[0:height, 0:width]
    middle = np.exp(-2.0 * (((x + 0.5) / width - 0.5) ** 2 + ((y + 0.5) / height - 0.5) ** 2) / 0.25)
    weight = {}
    for i in np.unique(instance_HW[voc_HW > 0]):
        mask = instance_HW == i
        if (voc_HW[mask] == 15).all() and mask.mean() > 0.015:
            weight[int(i)] = 1e9
        else:
            weight[int(i)] = float(middle[mask].sum())
    best = max(weight.values(), default=0.0)
    return np.isin(instance_HW, [i for i, w in weight.items() if w >= best * (1 - 1e-6)]) if weight else instance_HW < 0


def render_figures(
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
    """Picture number `index` with figures: what `scene_raycast.render` returns (`part` are PART_NAMES), and semseg
    uint8 (VOC, 0..20), context uint16 (PASCAL-Context), human_parts uint8 (0..6), saliency uint8 {0, 1}."""
    rng = generator(seed, domain, index)
    scene = build_outdoors(domain, rng) if rng.random() < 0.5 else build_indoors(domain, rng)
    scene.camera = move_camera(scene.camera, mirrored, camera_shift, roll, zoom)
    view = render(scene, height, width, rng, mirrored)
    view["semseg"] = VOC_OF[view["segmentation"]]
    view["context"] = CONTEXT_OF[view["segmentation"]]
    view["human_parts"] = SIX_PARTS[view["part"]]
    view["saliency"] = salient(view["instance"], view["semseg"]).astype(np.uint8)
    return view
