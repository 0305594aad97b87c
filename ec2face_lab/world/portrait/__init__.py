"""The second miniature's world: procedural portraits, made for 128 px, of any size."""

from .rendering import Rendered, render
from .scenes import Scenes, sample_scenes

__all__ = ["Rendered", "Scenes", "render", "sample_scenes"]
