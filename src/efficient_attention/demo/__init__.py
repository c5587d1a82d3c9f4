"""The demonstration, on a CPU: depth in a pair of photographs, and a photograph that attends to itself."""

from .depth import run as show_depth
from .main import run

__all__ = ["run", "show_depth"]
