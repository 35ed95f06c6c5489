"""Numbers that every layer agrees on."""

from __future__ import annotations

IGNORE = 255
"""Marks an invalid pixel in every target: labels, depth (255.0), normals (all three channels), edges."""
NO_CLASS = -100
"""Class of an image without a label (PyTorch's ``ignore_index``)."""
