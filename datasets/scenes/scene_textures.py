"""Procedural textures: each mixes two colours by a pattern of the surface coordinates.

Shape legend: N pixels; `metres` and `unit` are surface coordinates [N, 2], in metres and in half sizes (-1 to 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_RNG = np.random.default_rng(20240515)
_LATTICE = _RNG.random((64, 64))  # a table, not a hash of sines: the same on every machine
_COLOURS = _RNG.random((64, 64, 3)) ** 1.3


@dataclass(frozen=True)
class Texture:
    """`pattern` is a name in PATTERNS; colours are linear RGB in 0..1; `scale` is the size of a tile in metres;
    `glow` is the share of light that the surface gives by itself (1: a lamp or the sky)."""

    pattern: str
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    scale: float = 0.5
    phase: tuple[float, float] = (0.0, 0.0)
    glow: float = 0.0


def noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Smooth value noise in 0..1 on a lattice of spacing 1 (period 64)."""
    x0, y0 = np.floor(x), np.floor(y)
    u, v = x - x0, y - y0
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = x0.astype(np.int64) & 63, y0.astype(np.int64) & 63
    k, n = (i + 1) & 63, (j + 1) & 63
    low = _LATTICE[i, j] * (1 - u) + _LATTICE[k, j] * u
    high = _LATTICE[i, n] * (1 - u) + _LATTICE[k, n] * u
    return low * (1 - v) + high * v


def _cell(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.floor(x).astype(np.int64) & 63, np.floor(y).astype(np.int64) & 63


def _lerp(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    return first + (second - first) * share[:, None]


def _plain(p, unit, first, second):
    return _lerp(first, second, 0.35 * noise(p[:, 0] * 0.7, p[:, 1] * 0.7))


def _checker(p, unit, first, second):
    i, j = _cell(p[:, 0], p[:, 1])
    return _lerp(first, second, ((i + j) & 1) * 0.8 + 0.2 * _LATTICE[i, j])


def _stripes(p, unit, first, second):
    return _lerp(first, second, np.clip(np.sin(2 * np.pi * p[:, 0]) * 3 + 0.5, 0, 1))


def _planks(p, unit, first, second):
    """Floor boards: a shade for each board, grain along it, a dark gap between two."""
    row = np.floor(p[:, 1])
    i, j = _cell(p[:, 0] * 0.18 + 0.37 * row, row)
    grain = noise(p[:, 0] * 0.8 + 13.0 * j, p[:, 1] * 7.0)
    gap = (np.abs(p[:, 1] - row - 0.5) > 0.46) * 0.5
    return _lerp(first, second, np.clip(0.55 * _LATTICE[i, j] + 0.5 * grain + gap, 0, 1))


def _wood(p, unit, first, second):
    rings = noise(p[:, 0] * 0.9, p[:, 1] * 6.0) + 0.3 * noise(p[:, 0] * 3.0, p[:, 1] * 19.0)
    return _lerp(first, second, np.clip(rings, 0, 1))


def _cloth(p, unit, first, second):
    """Soft mottle at two sizes: carpet, upholstery, leaves, grass."""
    return _lerp(first, second, 0.5 * noise(p[:, 0], p[:, 1]) + 0.5 * noise(p[:, 0] * 4.1, p[:, 1] * 4.1))


def _brick(p, unit, first, second):
    row = np.floor(p[:, 1])
    across = p[:, 0] * 0.45 + 0.5 * (row.astype(np.int64) & 1)
    i, j = _cell(across, row)
    joint = (p[:, 1] - row < 0.13) | (across - np.floor(across) < 0.06)
    return _lerp(first, second, np.where(joint, 1.0, 0.45 * _LATTICE[i, j]))


def _picture(p, unit, first, second):
    """A painting: horizon, a few patches, a frame in the first colour."""
    i, j = _cell(unit[:, 0] * 1.6 + p[:, 0] * 0, unit[:, 1] * 1.6)
    offset = np.floor(second[:, 0] * 50).astype(np.int64)
    colours = _COLOURS[(i + offset) & 63, (j + 3 * offset) & 63] * 0.75 + second * 0.25
    frame = np.abs(unit).max(-1) > 0.84
    return np.where(frame[:, None], first, colours)


def _books(p, unit, first, second):
    """Backs of books side by side; `scale` is the width of one."""
    i, _ = _cell(p[:, 0], p[:, 0])
    offset = np.floor(second[:, 0] * 50).astype(np.int64)
    colours = _COLOURS[i, (offset + 7) & 63] * 0.8 + 0.1
    top = 0.35 + 0.6 * _LATTICE[i, offset & 63]
    dark = (unit[:, 1] > top) | (p[:, 0] - np.floor(p[:, 0]) < 0.1)
    return np.where(dark[:, None], first * 0.25, colours * 0.7 + second * 0.3)


def _window(p, unit, first, second):
    """Sky above, a pale horizon below, glazing bars across."""
    sky = _lerp(second, np.minimum(second * 0.35 + 0.6, 1.0), np.clip(0.5 - 0.6 * unit[:, 1], 0, 1))
    hill = unit[:, 1] < -0.45 + 0.5 * noise(unit[:, 0] * 2.5 + second[:, 0] * 31, unit[:, 0])
    sky = np.where(hill[:, None], np.array([0.16, 0.28, 0.13]), sky)
    bars = (np.abs(unit) < 0.045).any(-1)
    return np.where(bars[:, None], first, sky)


def _panels(p, unit, first, second):
    """Two sunken panels, for doors and cabinet fronts."""
    x, y = np.abs(unit[:, 0]), np.abs(np.abs(unit[:, 1]) - 0.5)
    rim = np.maximum(np.abs(x - 0.62) / 0.07, 0) < 1
    rim = (rim & (y < 0.36)) | ((np.abs(y - 0.33) < 0.03) & (x < 0.69))
    return _lerp(first, second, np.where(rim, 1.0, 0.15 * noise(p[:, 0] * 8, p[:, 1])))


def _doors(p, unit, first, second):
    """Upright fronts of a cupboard, `scale` metres wide, with dark joints and handles."""
    across = p[:, 0] - np.floor(p[:, 0])
    joint = (across < 0.04) | (across > 0.96) | (np.abs(unit[:, 1]) > 0.96)
    handle = (np.abs(across - 0.86) < 0.035) & (np.abs(unit[:, 1]) < 0.12)
    return _lerp(first, second, np.where(joint | handle, 1.0, 0.2 * noise(p[:, 0] * 3, p[:, 1] * 9)))


def _screen(p, unit, first, second):
    rim = (np.abs(unit) > 0.93).any(-1)
    picture = _lerp(first * 2.5, second, 0.15 + 0.4 * noise(unit[:, 0] * 1.5 + second[:, 0] * 40, unit[:, 1] * 1.5))
    return np.where(rim[:, None], first, picture)


def _sky(p, unit, first, second):
    clouds = noise(p[:, 0] * 0.7, p[:, 1]) * 0.6 + noise(p[:, 0] * 2.1, p[:, 1] * 3.0) * 0.4
    return _lerp(first, second, np.clip(2.2 * clouds - 0.75, 0, 1))


PATTERNS = {
    "plain": _plain,
    "checker": _checker,
    "stripes": _stripes,
    "planks": _planks,
    "wood": _wood,
    "cloth": _cloth,
    "brick": _brick,
    "picture": _picture,
    "books": _books,
    "window": _window,
    "panels": _panels,
    "doors": _doors,
    "screen": _screen,
    "sky": _sky,
}
_NAMES = list(PATTERNS)


def paint(
    textures: list[Texture], which_N: np.ndarray, metres: np.ndarray, unit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Albedo [N, 3] and glow [N] of pixels that show texture `which_N` at the given surface coordinates."""
    first, second = np.array([t.first for t in textures]), np.array([t.second for t in textures])
    scale = np.array([[t.scale] for t in textures])
    phase = np.array([t.phase for t in textures])
    pattern = np.take([_NAMES.index(t.pattern) for t in textures], which_N)
    albedo = np.empty((len(which_N), 3))
    for k in np.flatnonzero(np.bincount(pattern, minlength=len(_NAMES))):
        rows = np.flatnonzero(pattern == k)
        which = which_N[rows]
        p = np.take(metres, rows, 0) / np.take(scale, which, 0) + np.take(phase, which, 0)
        colours = np.take(first, which, 0), np.take(second, which, 0)
        albedo[rows] = PATTERNS[_NAMES[k]](p, np.take(unit, rows, 0), *colours)
    return albedo, np.take([t.glow for t in textures], which_N)
