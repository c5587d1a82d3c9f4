"""Stereo pairs that are generated, with exact disparities: random scenes, drawn by inverse mapping.

``choices``, ``surfaces``, ``shapes``, ``textures`` and ``photographs`` know of nothing here; ``materials`` lay textures
on, ``layers`` put it all together, ``objects`` and ``scenes`` choose at random, ``rendering`` and ``cameras`` look.
"""

from .dataset import GeneratedStereo
from .photographs import installed_photographs

__all__ = ["GeneratedStereo", "installed_photographs"]
