"""Folders of small pictures: three classes of three colours, labelled from head to tail, one file of each broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red_fox": (200, 60, 40), "sea_lion": (60, 90, 200), "tree": (50, 180, 60)}
NAMES = ("red fox", "sea lion", "tree")
LABELLED = (8, 5, 3)
UNLABELLED, TEST = 6, 4
BROKEN = 5


def photos(folder: Path) -> Path:
    """Write labelled/CLASS, known/CLASS (unlabelled), unlabelled and test/CLASS below `folder`."""
    random = np.random.default_rng(0)

    def write(path: Path, colour: tuple[int, int, int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.array(colour) + random.normal(0, 40, (36, 44, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)

    for (name, colour), labelled in zip(COLOURS.items(), LABELLED, strict=True):
        for number in range(labelled):
            write(folder / "labelled" / name / f"{number}.png", colour)
        for number in range(UNLABELLED):
            write(folder / "known" / name / f"{number}.png", colour)
            write(folder / "unlabelled" / f"{name}-{number}.png", colour)
        for number in range(TEST):
            write(folder / "test" / name / f"{number}.png", colour)
    for broken in ("labelled/tree", "known/tree", "unlabelled", "test/tree", "test/red_fox"):
        (folder / broken / "broken.png").write_bytes(b"no picture")
    return folder
