"""What all networks of this package have: places for attention, a configuration, and a way to disk and back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn

from .checkpoints import load_checkpoint
from .registry import create_model

__all__ = ["Network", "Place"]

_CONFIGURATION = "config.json"
_WEIGHTS = "model.safetensors"


class Place(NamedTuple):
    """Where attention can be inserted, by :func:`efficient_attention.insert`.

    Args:
        module: qualified name of the module whose output is attended to.
        dimensions: of the positions there: 1, 2 or 3.
        channels: of the feature map there.

    Example:
        >>> Place("backbone.body.layer2", 2, 512).dimensions
        2

    Paper: Shen et al. 2021, Sec. 4.
    """

    module: str
    dimensions: int
    channels: int


class Network(
    ModelHubMixin,
    nn.Module,
    library_name="efficient-attention",
    tags=["efficient-attention"],
    paper_url="https://arxiv.org/abs/1812.01243",
):
    """Base of the networks here; :func:`create_model` builds them and notes how.

    ``save_pretrained(folder)`` writes ``model.safetensors``, ``config.json`` and a model card;
    ``from_pretrained(folder_or_repository)`` builds the network of the configuration and loads its weights;
    ``push_to_hub(repository)`` uploads it. They are those of ``huggingface_hub.ModelHubMixin``; a folder that exists is
    preferred to a repository of that name. Files are written beside and then moved, so that none is ever half there.

    Example:
        >>> create_model("resnet_small").save_pretrained(folder)
        >>> network = Network.from_pretrained(folder)

    Not part of the paper.
    """

    #: Names of the places that the paper chose, all of which :func:`create_model` takes by default.
    paper_places: ClassVar[tuple[str, ...]] = ()

    _configuration: dict[str, Any] | None = None

    @property
    def places(self) -> Mapping[str, Place]:
        """The places that have a name."""
        raise NotImplementedError

    @property
    def configuration(self) -> dict[str, Any]:
        """The arguments of :func:`create_model` that this network was built with."""
        if self._configuration is None:
            kind = type(self).__name__
            raise ValueError(f"{kind} must come from create_model() to have a configuration")
        return self._configuration

    @configuration.setter
    def configuration(self, arguments: dict[str, Any]) -> None:
        self._configuration = arguments

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write weights, configuration and a model card into a folder, which is made if need be.

        Args:
            save_directory: the folder.
            options: those of ``huggingface_hub.ModelHubMixin.save_pretrained``.

        Returns:
            The address of the upload under ``push_to_hub=True``.

        Raises:
            ValueError: the network does not come from :func:`create_model`, or was changed since.
        """
        folder = Path(save_directory)
        config = options.pop("config", None) or self.configuration
        self._check_configuration(config)
        options = {"config": config, "repo_id": folder.resolve().name, **options}
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".incomplete-") as scratch:
            url = super().save_pretrained(scratch, **options)
            # The configuration last: a folder that has one has all of it. A model card may be somebody's work.
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path.suffix == ".json"):
                if path.suffix != ".md" or not (folder / path.name).exists():
                    path.replace(folder / path.name)
        return url

    def _check_configuration(self, config: Mapping[str, Any]) -> None:
        with torch.device("meta"):
            twin = create_model(**config)
        own, built = ({k: v.shape for k, v in m.state_dict().items()} for m in (self, twin))
        if own != built:
            changed = sorted(
                key for key in own.keys() | built.keys() if own.get(key) != built.get(key)
            )
            raise ValueError(
                f"the network must be as create_model() built it to be saved; {len(changed)} keys of its state_dict "
                f"have changed: {', '.join(changed[:4])}"
            )

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, save_directory / _WEIGHTS, metadata={"format": "pt"})

    # Without the **model_kwargs of the mixin: a misspelt option is an error.
    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Self:
        """Build a network that :meth:`save_pretrained` wrote, and load its weights.

        Args:
            pretrained_model_name_or_path: a folder, or else a repository of the Hugging Face Hub.
            revision: branch, tag or commit of the repository.
            cache_dir: where downloads are kept.
            force_download: download again.
            local_files_only: use what was downloaded before.
            token: for private repositories.

        Returns:
            The network, in evaluation mode, on the CPU, in the dtype of its weights.

        Raises:
            FileNotFoundError: a folder that lacks one of the files.
            ValueError: the configuration or the weights do not fit.
            TypeError: it is a network of another class; ``Network.from_pretrained`` takes all.
        """
        origin = str(pretrained_model_name_or_path)
        download = partial(
            hf_hub_download,
            origin,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        is_path = (
            Path(origin).is_absolute() or origin.startswith((".", "~")) or origin.count("/") > 1
        )
        find = partial(Path, origin) if is_path or Path(origin).is_dir() else download
        config, weights = Path(find(_CONFIGURATION)), Path(find(_WEIGHTS))
        for path in (config, weights):
            if not path.is_file():
                raise FileNotFoundError(f"{origin} must hold {_CONFIGURATION} and {_WEIGHTS}")
        try:
            arguments = json.loads(config.read_text())
        except ValueError as error:
            raise ValueError(f"{config} must be JSON; {error}") from error
        if not isinstance(arguments, dict) or "name" not in arguments:
            raise ValueError(
                f"{config} must hold the arguments of create_model(); got {arguments!r}"
            )
        network = create_model(**arguments)
        if not isinstance(network, cls):
            got = type(network).__name__
            raise TypeError(f"{origin} must hold a {cls.__name__}; got a {got}: use Network")
        tensors = load_file(weights)
        dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        if len(dtypes) == 1:
            network.to(dtypes.pop())
        load_checkpoint(network, tensors)
        return network.eval()
