"""The networks of the paper: EA ResNet (ImageNet), EA Mask R-CNN (MS-COCO), EA-PSMNet (Scene Flow); and small ones.

Importing this loads none of them, and nothing beside torch and safetensors.
"""

from .checkpoints import load_checkpoint
from .registry import create_model, list_models

__all__ = ["create_model", "list_models", "load_checkpoint"]
