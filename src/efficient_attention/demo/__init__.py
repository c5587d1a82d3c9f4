"""The demonstration: every pixel of a photograph attends to every pixel, on a CPU."""

from .main import run

__all__ = ["run"]
