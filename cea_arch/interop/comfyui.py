"""A node for ComfyUI: restores the pictures of a batch, in tiles that share the statistics of the whole picture.

A file ``custom_nodes/cea.py`` in ComfyUI's folder that holds one line makes it known::

    from cea_arch.interop.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
"""

from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from cea_arch.files import PACKAGED_WEIGHTS
from cea_arch.restoring.restorer import CONDITIONINGS, PRECISIONS, Restorer, restore

load = lru_cache(maxsize=2)(Restorer)


class CEARestore:
    """Node with a picture, a file of weights and how to run it; gives the restored picture."""

    CATEGORY = 'image/restoration'
    FUNCTION = 'run'
    RETURN_TYPES: ClassVar = ('IMAGE',)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
        """What ComfyUI asks for."""
        return {
            'required': {
                'image': ('IMAGE',),
                'model': ('STRING', {'default': str(PACKAGED_WEIGHTS)}),
                'precision': (list(PRECISIONS),),
                'conditioning': (list(CONDITIONINGS),),
            },
            'optional': {
                'strength': ('FLOAT', {'default': 1.0, 'min': 0.0, 'max': 1.0, 'step': 0.05}),
                'keep_tones': ('BOOLEAN', {'default': False}),
            },
        }

    def run(
        self,
        image: Tensor,
        model: str,
        precision: str,
        conditioning: str,
        strength: float = 1.0,
        keep_tones: bool = False,
    ) -> tuple[Tensor]:
        """Restore a batch ``(B, H, W, C)`` in [0, 1], C 3 or 4; of the same shape unless the network enlarges.

        Raises:
            UserError: As :class:`cea_arch.Restorer`; ComfyUI shows it at the node.
        """
        restorer = load(model, precision=precision, conditioning=conditioning)
        restorer.strength, restorer.keep_tones = strength, keep_tones
        pictures = [torch.from_numpy(restore(one.cpu().numpy(), restorer)) for one in image]
        return (torch.stack(pictures),)


NODE_CLASS_MAPPINGS = {'CEARestore': CEARestore}
NODE_DISPLAY_NAME_MAPPINGS = {'CEARestore': 'Restore (CEA)'}
