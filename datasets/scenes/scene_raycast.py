"""An analytic ray caster for boxes, cylinders, ellipsoids and capsules, vectorised over pixels with numpy.

World: x and y along the floor, z up, metres. Camera: x right, y down, z forward. A camera ray has z = 1, so the ray
parameter of a hit *is* the depth along the optical axis, which is what NYUD stores.

Shape legend: N pixels (or rays), P primitives, H x W image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scene_textures import Texture, paint

BOX, CYLINDER, ELLIPSOID, CAPSULE = range(4)
NEAR = 0.05
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)


@dataclass
class Primitive:
    """One solid: `axes` [3, 3] holds its local axes as columns, `half` its half sizes; `stretch` is a capsule's
    half length in radii."""

    kind: int
    centre: np.ndarray
    half: np.ndarray
    axes: np.ndarray
    texture: Texture
    instance: int
    label: int
    part: int = 0
    stretch: float = 0.0
    casts_shadow: bool = True


@dataclass
class Camera:
    """`axes` [3, 3] has the rows right, down, forward in world coordinates; `focal` is in units of the image width."""

    position: np.ndarray
    axes: np.ndarray
    focal: float

    def rays(self, height: int, width: int) -> np.ndarray:
        """Directions [H, W, 3] in the world through the pixel centres, scaled to depth 1."""
        u = (np.arange(width) + 0.5 - width / 2) / (self.focal * width)
        v = (np.arange(height) + 0.5 - height / 2) / (self.focal * width)
        right, down, forward = self.axes
        return forward + u[None, :, None] * right + v[:, None, None] * down


@dataclass
class Light:
    """A point light with a soft falloff, a directionless ambient term and an unshadowed fill light at the camera."""

    position: np.ndarray
    colour: np.ndarray
    reach: float
    ambient: np.ndarray
    fill: float = 0.15


@dataclass
class Scene:
    """Everything that a picture needs. `room_*` describe the six faces in the order x-, x+, y-, y+, floor, ceiling."""

    room_half: np.ndarray
    room_textures: list[Texture]
    room_labels: list[int]
    camera: Camera
    light: Light
    primitives: list[Primitive] = field(default_factory=list)
    num_instances: int = 7  # 0 is nothing, 1 to 6 are the faces of the room
    exposure: float = 1.0
    noise: float = 0.01
    blur: float = 0.15


def hit_box(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Entry parameter of rays `o + t d` into the cube [-1, 1]^3; inf for a miss. `o` is [3] or [N, 3], `d` [N, 3]."""
    inverse = 1.0 / d
    a = (-1.0 - o) * inverse
    b = (1.0 - o) * inverse
    near, far = np.minimum(a, b), np.maximum(a, b)
    enter = np.maximum(np.maximum(near[:, 0], near[:, 1]), near[:, 2])
    leave = np.minimum(np.minimum(far[:, 0], far[:, 1]), far[:, 2])
    return np.where(enter <= leave, enter, np.inf)


def _quadratic(o: np.ndarray, d: np.ndarray, axes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entry, exit and hit mask of the unit sphere (3 axes) or the endless cylinder round z (2 axes)."""
    d_0, o_0 = d[:, 0], o[..., 0]
    a, b, c = d_0 * d_0, o_0 * d_0, o_0 * o_0
    for i in range(1, axes):
        d_i, o_i = d[:, i], o[..., i]
        a, b, c = a + d_i * d_i, b + o_i * d_i, c + o_i * o_i
    disc = b * b - a * (c - 1.0)
    hit = disc > 0
    root = np.sqrt(np.where(hit, disc, 0.0))
    return (-b - root) / a, (-b + root) / a, hit


def hit_ellipsoid(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Entry into the unit sphere."""
    enter, _, hit = _quadratic(o, d, 3)
    return np.where(hit, enter, np.inf)


def hit_cylinder(o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Entry into the cylinder of radius 1 round z with |z| <= 1."""
    enter, leave, hit = _quadratic(o, d, 2)
    a, b = (-1.0 - o[..., 2]) / d[:, 2], (1.0 - o[..., 2]) / d[:, 2]
    enter = np.maximum(enter, np.minimum(a, b))
    leave = np.minimum(leave, np.maximum(a, b))
    return np.where(hit & (enter <= leave), enter, np.inf)


def hit_capsule(o: np.ndarray, d: np.ndarray, stretch: float) -> np.ndarray:
    """Entry into the capsule of radius 1 round the segment from z = -stretch to z = stretch."""
    enter, _, hit = _quadratic(o, d, 2)
    hit &= np.abs(o[..., 2] + enter * d[:, 2]) <= stretch
    best = np.where(hit, enter, np.inf)
    for end in (-stretch, stretch):
        best = np.minimum(best, hit_ellipsoid(o - np.array([0.0, 0.0, end]), d))
    return best


def _hit(primitive: Primitive, o: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Entry of world rays into any primitive."""
    to_local = primitive.axes / primitive.half
    o_local, d_local = (o - primitive.centre) @ to_local, d @ to_local
    if primitive.kind == BOX:
        return hit_box(o_local, d_local)
    if primitive.kind == CYLINDER:
        return hit_cylinder(o_local, d_local)
    if primitive.kind == ELLIPSOID:
        return hit_ellipsoid(o_local, d_local)
    return hit_capsule(o_local, d_local, primitive.stretch)


def _windows(scene: Scene, height: int, width: int) -> list[tuple[int, int, int, int] | None]:
    """For each primitive the rows and columns (y0, y1, x0, x1) that it can cover, from its projected corners."""
    if not scene.primitives:
        return []
    camera = scene.camera
    half = np.stack([p.half * np.array([1.0, 1.0, 1.0 + p.stretch]) for p in scene.primitives])
    axes = np.stack([p.axes for p in scene.primitives])
    centre = np.stack([p.centre for p in scene.primitives])
    corners = centre[:, None] + np.einsum("pij,pkj->pki", axes, CORNERS * half[:, None])
    seen = (corners - camera.position) @ camera.axes.T
    z = np.maximum(seen[..., 2], 1e-6)
    x = seen[..., 0] / z * camera.focal * width + width / 2
    y = seen[..., 1] / z * camera.focal * width + height / 2
    x0, x1 = np.clip(x.min(1) - 1, 0, width).astype(int), np.clip(x.max(1) + 2, 0, width).astype(int)
    y0, y1 = np.clip(y.min(1) - 1, 0, height).astype(int), np.clip(y.max(1) + 2, 0, height).astype(int)
    behind = seen[..., 2].min(1) < NEAR  # it reaches behind the camera, where projecting corners means nothing
    x0[behind], x1[behind], y0[behind], y1[behind] = 0, width, 0, height
    visible = (x0 < x1) & (y0 < y1) & (seen[..., 2].max(1) > NEAR)
    corners_of = zip(y0.tolist(), y1.tolist(), x0.tolist(), x1.tolist(), strict=True)
    return [window if ok else None for window, ok in zip(corners_of, visible.tolist(), strict=True)]


def _cast_room(scene: Scene, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth [H, W] and face number (0..5, order of `room_textures`) of the surrounding walls."""
    half, origin = scene.room_half, scene.camera.position - np.array([0.0, 0.0, scene.room_half[2]])
    best = np.full(rays.shape[:2], np.inf)
    face = np.zeros(rays.shape[:2], dtype=np.int64)
    for axis in range(3):
        d = rays[..., axis]
        positive = d > 0
        t = (np.where(positive, half[axis], -half[axis]) - origin[axis]) / np.where(d == 0, 1e-12, d)
        t = np.where(t < 0, np.inf, t)  # a ray along the wall
        closer = t < best
        best = np.where(closer, t, best)
        face = np.where(closer, 2 * axis + positive, face)
    return best, face


def cast(scene: Scene, height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth [H, W], hit [H, W] (0..5 the faces of the room, 6 + p primitive p) and the rays [H, W, 3]."""
    rays = scene.camera.rays(height, width)
    depth, hit = _cast_room(scene, rays)
    for p, window in enumerate(_windows(scene, height, width)):
        if window is None:
            continue
        y0, y1, x0, x1 = window
        t = _hit(scene.primitives[p], scene.camera.position, rays[y0:y1, x0:x1].reshape(-1, 3))
        t = t.reshape(y1 - y0, x1 - x0)
        view = depth[y0:y1, x0:x1]
        closer = (t < view) & (t > NEAR)
        view[closer] = t[closer]
        hit[y0:y1, x0:x1][closer] = 6 + p
    return depth, hit, rays


@dataclass
class _Surface:
    """What lies under each pixel: world point, world normal, texture coordinates in metres and in units of the size."""

    point: np.ndarray
    normal: np.ndarray
    metres: np.ndarray
    unit: np.ndarray


def _room_surface(scene: Scene, point: np.ndarray, face: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normals (inwards), texture coordinates in metres and in units, for pixels on the walls."""
    axis = face // 2
    normal = np.zeros_like(point)
    normal[np.arange(len(face)), axis] = np.where(face % 2 == 1, -1.0, 1.0)
    local = point - np.array([0.0, 0.0, scene.room_half[2]])
    return normal, _plane(point, axis), _plane(local / scene.room_half, axis)


def _plane(point: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """The two coordinates [N, 2] of points across `axis`."""
    first = np.where(axis == 0, point[:, 1], point[:, 0])
    second = np.where(axis == 2, point[:, 1], point[:, 2])
    return np.stack([first, second], -1)


def _length(v: np.ndarray) -> np.ndarray:
    """Euclidean norms [N] of [N, 3]; several times faster than np.linalg.norm for rows this short."""
    return np.sqrt(np.einsum("ni,ni->n", v, v))


def _dominant(v: np.ndarray) -> np.ndarray:
    """The axis [N] of the largest absolute coordinate (a fast argmax)."""
    x, y, z = np.abs(v).T
    return np.where(x >= y, np.where(x >= z, 0, 2), np.where(y >= z, 1, 2))


def _local_normal(kind: np.ndarray, local: np.ndarray, stretch: np.ndarray) -> np.ndarray:
    """Outward gradient [N, 3] in unit coordinates for points on a unit box, cylinder, ellipsoid or capsule."""
    normal = local.copy()  # right for the ellipsoid
    box = kind == BOX
    axis = _dominant(local)
    rows = np.arange(len(local))
    flat = np.zeros_like(local)
    flat[rows, axis] = np.sign(local[rows, axis])
    normal[box] = flat[box]
    cylinder = kind == CYLINDER
    radius = np.hypot(local[:, 0], local[:, 1])
    cap = cylinder & (np.abs(local[:, 2]) > radius)
    normal[cylinder, 2] = 0.0
    normal[cap] = 0.0
    normal[cap, 2] = np.sign(local[cap, 2])
    capsule = kind == CAPSULE
    normal[capsule, 2] -= np.clip(local[capsule, 2], -stretch[capsule], stretch[capsule])
    return normal


def surface(scene: Scene, depth: np.ndarray, hit: np.ndarray, rays: np.ndarray) -> _Surface:
    """Points, normals and texture coordinates of all pixels [N, ...], gathered per primitive in one go."""
    hit_N = hit.reshape(-1)
    point = scene.camera.position + rays.reshape(-1, 3) * depth.reshape(-1, 1)
    normal, metres, unit = np.empty_like(point), np.empty((len(point), 2)), np.empty((len(point), 2))
    walls = np.flatnonzero(hit_N < 6)
    normal[walls], metres[walls], unit[walls] = _room_surface(scene, point[walls], hit_N[walls])
    things = np.flatnonzero(hit_N >= 6)
    if len(things):
        which = hit_N[things] - 6
        pick = scene.primitives
        half = np.take([p.half for p in pick], which, 0)
        axes = np.take([p.axes for p in pick], which, 0)
        offset = point[things] - np.take([p.centre for p in pick], which, 0)
        size = (offset[:, None] @ axes)[:, 0]
        local = size / half
        gradient = _local_normal(
            np.take([p.kind for p in pick], which), local, np.take([p.stretch for p in pick], which)
        )
        outward = (axes @ (gradient / half)[..., None])[..., 0]
        normal[things] = outward / _length(outward)[:, None]
        axis = _dominant(gradient)
        metres[things], unit[things] = _plane(size, axis), _plane(local, axis)
    return _Surface(point, normal, metres, unit)


def _shadowed(scene: Scene, start: np.ndarray, lamp: np.ndarray) -> np.ndarray:
    """bool [N]: whether anything stands between a point and the lamp. A primitive is tried only on the points inside
    the cone that its bounding sphere throws away from the lamp."""
    casters = [p for p in scene.primitives if p.casts_shadow]
    shadow = np.zeros(len(start), dtype=bool)
    if not casters or not len(start):
        return shadow
    ray = lamp - start
    reached = _length(ray)
    centre = np.array([p.centre for p in casters]) - lamp
    half = np.array([p.half for p in casters])
    half[:, 2] *= 1.0 + np.array([p.stretch for p in casters])
    radius, away = _length(half), _length(centre)
    sine = np.minimum(radius / np.maximum(away, 1e-9), 1.0)
    threshold = np.where(away > radius, np.sqrt(1.0 - sine**2), -2.0) - 1e-4
    away_from_lamp = np.ascontiguousarray((ray / -reached[:, None]).T, dtype=np.float32)
    along = (centre / np.maximum(away, 1e-9)[:, None]).astype(np.float32) @ away_from_lamp  # [P, N]
    for p, candidates in enumerate(along > threshold[:, None].astype(np.float32)):
        rows = np.flatnonzero(candidates)
        rows = rows[(reached[rows] > away[p] - radius[p]) & ~shadow[rows]]
        if len(rows):
            t = _hit(casters[p], start[rows], ray[rows])
            shadow[rows[(t > 0) & (t < 1)]] = True
    return shadow


def lit(scene: Scene, point: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Share of light [N] that reaches each point: cosine, falloff, and 0 where a primitive stands between."""
    lamp = scene.light.position
    to_lamp = lamp - point
    distance = _length(to_lamp)
    cosine = np.einsum("ni,ni->n", normal, to_lamp) / distance
    share = np.maximum(cosine, 0.0) / (1.0 + (distance / scene.light.reach) ** 2)
    facing = np.flatnonzero(cosine > 0)
    shadow = _shadowed(scene, point[facing] + 2e-3 * normal[facing], lamp)
    share[facing[shadow]] = 0.0
    return share


def shade(scene: Scene, hit: np.ndarray, at: _Surface) -> np.ndarray:
    """Linear colours [N, 3]: texture times light, plus what glows by itself."""
    light = scene.light
    textures = scene.room_textures + [p.texture for p in scene.primitives]
    albedo, glow = paint(textures, hit.reshape(-1), at.metres, at.unit)
    dim = np.flatnonzero(glow < 1.0)  # the sky needs no light
    direct = np.zeros(len(glow))
    direct[dim] = lit(scene, at.point[dim], at.normal[dim])
    to_eye = scene.camera.position - at.point
    facing = np.einsum("ni,ni->n", at.normal, to_eye) / _length(to_eye)
    sky = 0.75 + 0.25 * at.normal[:, 2]  # surfaces that look up are a little brighter
    energy = direct[:, None] * light.colour + (sky + light.fill * facing)[:, None] * light.ambient
    return albedo * (energy * (1.0 - glow[:, None]) + glow[:, None])


def develop(linear_HW3: np.ndarray, exposure: float, blur: float, noise_HW: np.ndarray) -> np.ndarray:
    """uint8 picture from linear colours: tone curve, gamma, a slight lens blur, sensor noise."""
    x = linear_HW3 * exposure
    x = np.sqrt(x / (1.0 + 0.35 * x) * 1.35)  # rolls off highlights; the root stands for gamma
    for axis in (0, 1):
        padded = np.concatenate([x.take([0], axis), x, x.take([-1], axis)], axis)
        low, high = padded.take(range(0, x.shape[axis]), axis), padded.take(range(2, x.shape[axis] + 2), axis)
        x = (1 - 2 * blur) * x + blur * (low + high)
    return (np.clip(x + noise_HW[..., None], 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def boundaries(instance_HW: np.ndarray) -> np.ndarray:
    """uint8 [H, W], 1 on the pixels whose right, left, upper or lower neighbour is an instance of a lower number.

    Marking only the higher number keeps the line thin, and the rule does not know left from right: the edges of a
    mirrored room are the mirrored edges. Furniture is numbered after the room, so an outline lies on the object.
    """
    edge = np.zeros(instance_HW.shape, dtype=np.uint8)
    edge[:, 1:] |= instance_HW[:, 1:] > instance_HW[:, :-1]
    edge[:, :-1] |= instance_HW[:, :-1] > instance_HW[:, 1:]
    edge[1:] |= instance_HW[1:] > instance_HW[:-1]
    edge[:-1] |= instance_HW[:-1] > instance_HW[1:]
    return edge


def render(scene: Scene, height: int, width: int, rng: np.random.Generator, mirrored: bool = False) -> dict:
    """Picture and exact labels of a scene.

    Returns a dict: image uint8 [H, W, 3], segmentation uint8 [H, W] (the labels of the scene), depth float32 [H, W]
    (metres along the optical axis), normals float32 [H, W, 3] (unit, camera axes, towards the camera), edge uint8
    [H, W], instance int32 [H, W] and part uint8 [H, W] (body part, 0 where there is none).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        depth, hit, rays = cast(scene, height, width)
        at = surface(scene, depth, hit, rays)
        linear = shade(scene, hit, at).reshape(height, width, 3)
    grain = rng.normal(0.0, scene.noise, (height, width))
    image = develop(linear, scene.exposure, scene.blur, grain[:, ::-1] if mirrored else grain)
    things = scene.primitives
    instance = np.array(list(range(1, 7)) + [p.instance for p in things], dtype=np.int32)[hit]
    return {
        "image": image,
        "segmentation": np.array(scene.room_labels + [p.label for p in things], dtype=np.uint8)[hit],
        "depth": depth.astype(np.float32),
        "normals": (at.normal @ scene.camera.axes.T).reshape(height, width, 3).astype(np.float32),
        "edge": boundaries(instance),
        "instance": instance,
        "part": np.array([0] * 6 + [p.part for p in things], dtype=np.uint8)[hit],
    }
