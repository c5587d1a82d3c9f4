"""What is measured: one call of the operator or of a module, and the tensors it is made with.

Sizes: B batch, H heads, N positions, which attend to each other, Dk and Dv key and value channels; of one head for the
operator, of all heads together for the module, as everywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...modules import EfficientAttention2d

__all__ = ["DTYPES", "MODES", "Module", "Operator", "Problem", "Task"]

#: Forward without gradients; its backward pass alone; forward and backward, as in a step of training.
MODES = ("forward", "backward", "training")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """What both kinds have: what a record says of them."""

    subject: ClassVar[str]

    batch: int = 1
    heads: int = 8
    dtype: str = "float32"
    device: str = "cpu"
    mode: str = "forward"

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the inputs."""
        return getattr(torch, self.dtype).itemsize

    def describe(self) -> dict[str, Any]:
        """Its sizes, as JSON can hold them."""
        return {"subject": self.subject, **asdict(self)}

    def _numbers(self, *shape: int, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        numbers = torch.randn(shape, generator=generator, device=self.device)
        return numbers.to(getattr(torch, self.dtype))


@dataclass(frozen=True, kw_only=True)
class Operator(_Problem):
    """A call of the operator, ``query [B, H, N, Dk]``, ``key [B, H, N, Dk]`` and ``value [B, H, N, Dv]``.

    Example:
        >>> Operator(positions=65536, dtype="bfloat16").minimal_bytes // 2**20
        256
    """

    subject: ClassVar[str] = "operator"

    positions: int
    key_channels: int = 64
    value_channels: int = 64

    @property
    def minimal_bytes(self) -> int:
        """What must be read and written once: inputs and output; gradients too where there is a backward pass."""
        forward = 2 * self.key_channels + 2 * self.value_channels
        backward = 4 * self.key_channels + 3 * self.value_channels
        channels = {"forward": forward, "backward": backward, "training": forward + backward}
        rows = self.batch * self.heads * self.positions
        return rows * channels[self.mode] * self.itemsize

    @property
    def input_bytes(self) -> int:
        """Of queries, keys and values."""
        channels = 2 * self.key_channels + self.value_channels
        return self.batch * self.heads * self.positions * channels * self.itemsize

    def at(self, positions: int) -> Operator:
        """The same with so many positions."""
        return replace(self, positions=positions)

    def task(self) -> Task:
        """Standard normal numbers of these sizes, always the same."""
        rows = (self.batch, self.heads, self.positions)
        channels = {
            "query": self.key_channels,
            "key": self.key_channels,
            "value": self.value_channels,
        }
        inputs = {
            name: self._numbers(*rows, size, seed=seed)
            for seed, (name, size) in enumerate(channels.items())
        }
        return Task(self, inputs, self._numbers(*rows, self.value_channels, seed=3), {})


@dataclass(frozen=True, kw_only=True)
class Module(_Problem):
    """A call of a module over a feature map ``[B, C, H, W]``; key and value channels are of all heads together.

    Example:
        >>> Module(height=256, width=256).minimal_bytes // 2**20  # three times the map
        192
    """

    subject: ClassVar[str] = "module"

    height: int
    width: int
    channels: int = 256
    key_channels: int = 128
    value_channels: int = 128

    @property
    def positions(self) -> int:
        """N, all pixels of the map."""
        return self.height * self.width

    @property
    def input_bytes(self) -> int:
        """Of the map, X."""
        return self.batch * self.channels * self.positions * self.itemsize

    @property
    def minimal_bytes(self) -> int:
        """What must be read and written, in maps: X twice, as no output is known before every key is, and Y once.

        Backward the same twice over, for X and the gradient of Y: the gradient of the context comes between.
        """
        return self.input_bytes * {"forward": 3, "backward": 5, "training": 8}[self.mode]

    def at(self, positions: int) -> Module:
        """The same with about so many positions in a square."""
        side = max(1, round(positions**0.5))
        return replace(self, height=side, width=side)

    def task(self) -> Task:
        """A standard normal map, and weights as PyTorch initializes them, always the same."""
        shape = (self.batch, self.channels, self.height, self.width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = EfficientAttention2d(
                self.channels,
                self.key_channels,
                self.value_channels,
                num_heads=self.heads,
                init="official",
            )
        weights = module.to(self.device, getattr(torch, self.dtype)).state_dict()
        x, d_output = (self._numbers(*shape, seed=seed) for seed in range(2))
        return Task(self, {"x": x}, d_output, weights)


Problem = Operator | Module


@dataclass(frozen=True)
class Task:
    """The tensors of a problem.

    Attributes:
        problem: that they are of.
        inputs: by name.
        d_output: the gradient of the output, for backward passes.
        weights: of a module, by its keys.
    """

    problem: Problem
    inputs: dict[str, Tensor]
    d_output: Tensor
    weights: dict[str, Tensor]

    @property
    def trains(self) -> bool:
        """Whether gradients are computed."""
        return self.problem.mode != "forward"

    def leaves(self) -> dict[str, Tensor]:
        """The inputs, as leaves of a graph of their own where gradients are computed; they share memory."""
        return {name: x.detach().requires_grad_(self.trains) for name, x in self.inputs.items()}
