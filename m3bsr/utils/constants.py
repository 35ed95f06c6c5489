"""Numbers that every layer agrees on."""

from __future__ import annotations

IGNORE = 255
"""Marks an invalid pixel in every target: labels, depth (255.0), normals (all three channels), edges."""
