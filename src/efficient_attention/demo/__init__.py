"""The demonstration, on a CPU: depth by a network that ships with the package, and a photograph whose every pixel
attends to every pixel.
"""

from .depth import run as show_depth
from .main import run

__all__ = ["run", "show_depth"]
