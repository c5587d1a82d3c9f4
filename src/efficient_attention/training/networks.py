"""A network as a recipe names it: built by its options, or from a folder, with the weights that it starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..models import create_model, load_checkpoint
from ..models.network import Network

__all__ = ["NetworkOptions", "differences"]

# What the plain network does not have, and begins as the identity.
_ATTENTION = "*inserted_attention*"


@dataclass
class NetworkOptions:
    """Which network to train: the arguments of :func:`create_model`, or a folder that has one; and its first weights.

    Args:
        name: one of ``list_models()``; not with ``pretrained``.
        attention: kind of attention; ``"none"`` for the plain network.
        at: places of the attention, or places with options of their own; default: the paper's; an empty list: nowhere.
        attention_options: of every module: ``normalization``, ``num_heads``, ``key_channels``...
        options: of the network's builder: ``num_classes``, ``norm``...
        pretrained: a folder of ``save_pretrained``, or a repository of the Hugging Face Hub, instead of the above.
        weights: a file with the weights of the plain network, as torchvision or the authors of PSMNet publish them.
        weights_prefix: what the keys of the file begin with; others do not count.
        weights_into: the part of the network that the weights are of, ``backbone.body`` for a classifier's in a
            detector; default: all of it.
        ignore: keys or patterns of keys that are not taken from the file, and may be missing in it: ``fc.*``.

    Raises:
        ValueError: options that exclude each other, or do not fit.
        FileNotFoundError: a file or folder that is not there.

    Example:
        >>> NetworkOptions(name="resnet_small", at=["res3"], options={"num_classes": 10}).build().fc.out_features
        10
    """

    name: str | None = None
    attention: Literal["efficient", "non_local", "none"] = "efficient"
    at: list[str] | dict[str, dict[str, Any]] | None = None
    attention_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    pretrained: str | None = None
    weights: str | None = None
    weights_prefix: str = ""
    weights_into: str = ""
    ignore: list[str] = field(default_factory=list)

    def build(self) -> Network:
        """The network, in training mode."""
        if (self.name is None) == (self.pretrained is None):
            raise ValueError(
                f"network must have either a name or pretrained; got name={self.name!r}, pretrained={self.pretrained!r}"
            )
        network = self._create() if self.pretrained is None else self._pretrained()
        if self.weights is not None:
            part = network.get_submodule(self.weights_into)
            load_checkpoint(
                part,
                self.weights,
                prefix=self.weights_prefix,
                allow_missing=[_ATTENTION, *self.ignore],
                ignore=self.ignore,
            )
        elif self.weights_prefix or self.weights_into or self.ignore:
            raise ValueError(
                "network must have weights where weights_prefix, weights_into or ignore say how to load them"
            )
        return network.train()

    def _create(self) -> Network:
        assert self.name is not None
        return create_model(
            self.name,
            self.attention,
            at=self.at,
            attention_options=self.attention_options,
            **self.options,
        )

    def _pretrained(self) -> Network:
        assert self.pretrained is not None
        if (self.attention, self.at, self.attention_options, self.options) != (
            "efficient",
            None,
            {},
            {},
        ):
            raise ValueError(
                f"network of pretrained={self.pretrained!r} has its own attention, at, attention_options and options; "
                "leave them out"
            )
        return Network.from_pretrained(self.pretrained)


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """What differs between two configurations of networks: both values by option, None for one that is absent.

    Example:
        >>> differences({"name": "psmnet", "at": {}}, {"name": "psmnet", "at": {"volume": {}}})
        {'at': ({}, {'volume': {}})}
    """
    return {
        option: (there.get(option), here.get(option))
        for option in sorted(there.keys() | here.keys())
        if there.get(option) != here.get(option)
    }
