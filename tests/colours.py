"""Colours of pictures and styles, and how well one is seen on another."""

from __future__ import annotations

import re

import numpy as np


def ground(image: np.ndarray) -> tuple[int, ...]:
    """The commonest colour."""
    found, counts = np.unique(image @ [1 << 16, 1 << 8, 1], return_counts=True)
    return of_hex(f"#{found[counts.argmax()]:06x}")


def coloured(image: np.ndarray) -> float:
    """The share of pixels that are no grey: marks, since texts, grids and the page itself are nearly grey."""
    return float((image.max(2) - image.min(2) > 40).mean())


def of_hex(colour: str) -> tuple[int, ...]:
    """Of #rrggbb."""
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def of_style(colour: str) -> tuple[int, ...]:
    """Of a computed style: rgb(r, g, b)."""
    return tuple(int(float(part)) for part in re.findall(r"[\d.]+", colour)[:3])


def luminance(colour: tuple[int, ...]) -> float:
    """As WCAG 2.2 defines it, between 0 and 1."""
    parts = [part / 255 for part in colour]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """As WCAG 2.2 defines it, between 1 and 21."""
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)
