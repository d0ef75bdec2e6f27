"""CEANet and networks with CEA layers for programs that load models through spandrel, such as chaiNNer.

Spandrel hands on the weights of a file alone, so options are read off the shapes. Two leave no trace there, the heads
of the hyper-adapters and the routing: the defaults are taken, and a warning says so where nothing confirms them.
:func:`load` reads what the file says.
"""

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cea_arch.archs.ceanet_arch import NUM_LEVELS, CEANet
from cea_arch.checkpoints import check_fit, holds_layers_alone, load_network, named_size
from cea_arch.errors import UserError, need
from cea_arch.fitting import find_fit
from cea_arch.layers import cea_state_dict, inject_cea

spandrel = need('spandrel', 'spandrel', 'This module')

# where spandrel's own implementation of a network names a block otherwise than BasicSR's
RENAMED = {'ESRGAN': (r'body\.(\d+)', r'model.1.sub.\1')}
RANKED = ('adapter.probes', 'adapter.bases')  # whose length is a layer's rank
ASSUMED = (
    'the weights do not tell the heads and the routing of {network}: {heads} and signed are taken. '
    'cea_arch.spandrel.load reads what the file says.'
)


def install() -> None:
    """Teach spandrel's main registry both architectures; may be called again."""
    registry = spandrel.MAIN_REGISTRY
    # ours first: a network with CEA layers has all the keys of its base
    others = tuple(one.architecture.id for one in registry if one.architecture.id not in ('CEANet', 'WithCEA'))
    supports = [spandrel.ArchSupport.from_architecture(arch, before=others) for arch in (CEANetArch(), WithCEAArch())]
    registry.add(*supports, ignore_duplicates=True)


def load(path: str | Path) -> spandrel.ImageModelDescriptor:
    """A descriptor of the network in a file, by the options that the file holds.

    Raises:
        UserError: As :func:`cea_arch.checkpoints.load_network`, or it restores no RGB pictures.
    """
    net = load_network(path)
    fit = find_fit(net, torch.device('cpu'))
    architecture = CEANetArch() if isinstance(net, CEANet) else WithCEAArch()
    return _descriptor(net, architecture, [], fit.scale, 3, spandrel.SizeRequirements(multiple_of=fit.multiple))


class CEANetArch(spandrel.Architecture[CEANet]):
    """CEANet in its named sizes and others."""

    def __init__(self) -> None:
        keys = ('embed.weight', 'latent.0.attn.temperature', 'fuse.0.weight', 'refinement.0.ffn.dwconv.weight')
        super().__init__(id='CEANet', detect=spandrel.util.KeyCondition.has_all(*keys))

    def load(self, state_dict: Mapping[str, Any]) -> spandrel.ImageModelDescriptor[CEANet]:
        """As spandrel asks; UserError where the shapes are no CEANet's."""
        options = ceanet_options(state_dict)
        net = CEANet(**options)
        check_fit(net.state_dict(), state_dict, 'the weights do not fit CEANet')
        net.load_state_dict(state_dict)
        tags = [options['size']] if len(options) == 1 else [f'{options["dim"]}dim']
        return _descriptor(net, self, tags, 1, state_dict['embed.weight'].shape[1])


class WithCEAArch(spandrel.Architecture[nn.Module]):
    """Networks that spandrel knows, with CEA layers inside."""

    def __init__(self) -> None:
        super().__init__(id='WithCEA', detect=lambda weights: any('.cea.adapter.' in name for name in weights))

    def load(self, state_dict: Mapping[str, Any]) -> spandrel.ImageModelDescriptor[nn.Module]:
        """As spandrel asks; UserError for CEA layers alone, UnsupportedModelError for a base that it does not know."""
        if holds_layers_alone(state_dict):
            raise UserError('these are CEA layers alone; `cea merge base.pth cea.pth whole.pth` makes a whole file.')
        weights = {name.removeprefix('base.'): value for name, value in state_dict.items()}
        base = spandrel.MAIN_REGISTRY.load({name: value for name, value in weights.items() if '.cea.' not in name})
        pattern, replacement = RENAMED.get(base.architecture.id, ('', ''))
        layers: dict[str, dict[str, Tensor]] = {}
        for name, value in weights.items():
            target, has_layer, rest = name.rpartition('.cea.')
            if has_layer:
                layers.setdefault(re.sub(f'^{pattern}$', replacement, target), {})[rest] = value
        _inject(base.model, layers, base.architecture.name)
        return _descriptor(
            base.model,
            self,
            [*base.tags, base.architecture.name],
            base.scale,
            base.input_channels,
            base.size_requirements,
            base.output_channels,
            base.supports_half,
            base.supports_bfloat16,
        )


def ceanet_options(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a CEANet by the names and shapes of its weights: ``size`` alone where it is a named one."""
    if size := named_size(weights):
        return {'size': size}

    def blocks(stage: str) -> int:
        return len({name.split('.')[stage.count('.') + 1] for name in weights if name.startswith(f'{stage}.')})

    levels = range(NUM_LEVELS - 1)
    stages = [*(f'encoder.{level}' for level in levels), 'latent']
    dim, channels = weights['embed.weight'].shape[:2]
    hidden = weights['latent.0.ffn.project_out.weight'].shape[1]
    options = {
        'num_in_ch': channels,
        'size': 'T',
        'dim': dim,
        'num_blocks': [blocks(stage) for stage in stages],
        'num_dec_blocks': [blocks(f'decoder.{level}') for level in levels],
        'num_refinement_blocks': blocks('refinement'),
        'heads': [len(weights[f'{stage}.0.attn.temperature']) for stage in stages],
        # half a channel more, so that rounding down gives this number at every level
        'ffn_expansion_factor': (hidden + 0.5) / (dim * 2 ** (NUM_LEVELS - 1)),
    }
    present = {'encoder': 'encoder.0', 'latent': 'latent', 'decoder': 'decoder.0', 'refinement': 'refinement'}
    options['cea_stages'] = [stage for stage, path in present.items() if f'{path}.0.cea.gamma' in weights]
    if options['cea_stages']:
        path = f'{present[options["cea_stages"][0]]}.0.cea.'
        layer = _layer_options({n.removeprefix(path): v for n, v in weights.items() if n.startswith(path)}, 'CEANet')
        options |= {'cea_width': layer.pop('width'), 'cea_heads': layer.pop('num_heads')} | layer
    return options


def _layer_options(layer: Mapping[str, Tensor], network: str) -> dict[str, Any]:
    """Options of a CEALayer by its weights: rank, width, num_heads, conditioning."""
    if 'adapter.bases' in layer:
        return {'rank': len(layer['adapter.bases']), 'width': 32, 'num_heads': 2, 'conditioning': 'static'}
    rank, width = layer['adapter.probes'].shape
    if 'adapter.describe.0.weight' in layer:
        return {'rank': rank, 'width': width, 'num_heads': 1, 'conditioning': 'pooled'}
    heads = math.gcd(width, 2)
    warnings.warn(ASSUMED.format(network=network, heads=heads), stacklevel=4)
    return {'rank': rank, 'width': width, 'num_heads': heads, 'conditioning': 'cross_attention'}


def _inject(net: nn.Module, layers: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    """Put layers, weights by the paths of their targets, into ``net``."""
    options = _layer_options(next(iter(layers.values())), name)
    options['rank'] = {path: len(next(layer[k] for k in RANKED if k in layer)) for path, layer in layers.items()}
    try:
        inject_cea(net, list(layers), **options)
    except ValueError as error:
        raise spandrel.UnsupportedModelError(f"CEA layers in spandrel's {name}: {error}") from error
    found = {f'{path}.cea.{rest}': value for path, layer in layers.items() for rest, value in layer.items()}
    check_fit(cea_state_dict(net), found, f'the CEA layers do not fit {name}')
    net.load_state_dict(found, strict=False)


def _descriptor(
    net: nn.Module,
    architecture: spandrel.Architecture,
    tags: list[str],
    scale: int,
    channels: int,
    size_requirements: spandrel.SizeRequirements | None = None,
    output_channels: int | None = None,
    supports_half: bool = True,
    supports_bfloat16: bool = True,
) -> spandrel.ImageModelDescriptor:
    return spandrel.ImageModelDescriptor(
        net,
        net.state_dict(),
        architecture,
        purpose='Restoration' if scale == 1 else 'SR',
        tags=[*tags, 'CEA'],
        supports_half=supports_half,
        supports_bfloat16=supports_bfloat16,
        scale=scale,
        input_channels=channels,
        output_channels=output_channels or channels,
        size_requirements=size_requirements,
        tiling=spandrel.ModelTiling.DISCOURAGED,
    )
