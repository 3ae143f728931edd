"""Where images come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL import Image


class UnreadableImage(ValueError):  # noqa: N818 (what it says is what it is)
    """An image that cannot be read. name: which one. reason: why, in one line."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class ImageSource(Protocol):
    """Images by index, safe to read from several threads at once."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """The image at `index`, in RGB. Raises UnreadableImage."""

    def name(self, index: int) -> str:
        """What to call the image at `index` in a message: its path, or "cifar10/train[17]"."""
