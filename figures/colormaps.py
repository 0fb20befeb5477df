"""Perceptually uniform colour maps for maps of cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.colors import Colormap


def diverging_map() -> Colormap:
    """Purple, white, green in straight lines through OKLab: equal differences look equal."""
    return _oklab_map("differences", ["#7B3A94", "#F7F7F7", "#16642C"])


def sequential_map() -> Colormap:
    from matplotlib import colormaps

    return colormaps["viridis"]


def _oklab_map(name: str, stops: Sequence[str]) -> Colormap:
    """Interpolate between colours in OKLab (Ottosson 2020, bottosson.github.io/posts/oklab)."""
    from matplotlib.colors import ListedColormap, to_rgb

    to_lms = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    )  # fmt: skip
    to_lab = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    )  # fmt: skip
    srgb = np.array([to_rgb(stop) for stop in stops])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    lab = np.cbrt(linear @ to_lms.T) @ to_lab.T
    at = np.linspace(0, len(stops) - 1, 255)
    lab = np.stack([np.interp(at, np.arange(len(stops)), lab[:, k]) for k in range(3)], axis=1)
    linear = np.clip((lab @ np.linalg.inv(to_lab).T) ** 3 @ np.linalg.inv(to_lms).T, 0, 1)
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return ListedColormap(srgb, name=name)
