"""CEAIR and networks with CEA layers for programs that load models through spandrel, such as chaiNNer.

Spandrel hands on the weights of a file alone, so options are read off the shapes. Four leave no trace there:
heads and strides of the hyper-adapters, routing and RankNorm. The paper's are taken, and a warning says so where
nothing confirms them. :func:`load` reads what the file says.
"""

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cea_arch.checkpoints import check_fit
from cea_arch.errors import need
from cea_arch.layers import cea_state_dict, inject_cea
from cea_arch.networks.cea_ir import CEAIR, NUM_LEVELS, STAGES, named_size
from cea_arch.networks.from_file import load_network
from cea_arch.networks.with_cea import need_whole
from cea_arch.restoring.fitting import Fit, find_fit

spandrel = need('spandrel', 'spandrel', 'This module')

# where spandrel's own implementation of a network names a block otherwise than BasicSR's
RENAMED = {'ESRGAN': (r'body\.(\d+)', r'model.1.sub.\1')}
CEAIR_SIZES = spandrel.SizeRequirements(multiple_of=CEAIR.trained_multiple)
PROBED = 64  # pixels: the side of what networks are tried on that spandrel does not know
ASSUMED = (
    'the weights do not tell heads, strides, routing and RankNorm of {network}: 4, 2, signed and true are taken. '
    'cea_arch.interop.spandrel.load reads what the file says.'
)


def install() -> None:
    """Teach spandrel's main registry both architectures; may be called again."""
    registry = spandrel.MAIN_REGISTRY
    # ours first: a network with CEA layers has all the keys of its base
    others = tuple(one.architecture.id for one in registry if one.architecture.id not in ('CEAIR', 'WithCEA'))
    supports = [spandrel.ArchSupport.from_architecture(arch, before=others) for arch in (CEAIRArch(), WithCEAArch())]
    registry.add(*supports, ignore_duplicates=True)


def load(path: str | Path, network_g: Mapping[str, Any] | None = None) -> spandrel.ImageModelDescriptor:
    """A descriptor of the network in a file, by the options that the file holds.

    Args:
        path: File of weights.
        network_g: Options of the network, where the file does not say them.

    Raises:
        UserError: As :func:`cea_arch.networks.from_file.load_network`, or it restores no RGB pictures.
    """
    net = load_network(path, network_g)
    fit = find_fit(net, torch.device('cpu'))
    if isinstance(net, CEAIR):
        return _descriptor(net, CEAIRArch(), [], fit.scale, 3, CEAIR_SIZES)
    try:
        base = _base_of(net.state_dict())
    except Exception:  # whatever it takes other networks' weights for
        minimum, half, bfloat16 = _smallest(net, fit), _runs_in(net, torch.float16), _runs_in(net, torch.bfloat16)
    else:
        minimum, half, bfloat16 = base.size_requirements.minimum, base.supports_half, base.supports_bfloat16
    size = spandrel.SizeRequirements(minimum=minimum, multiple_of=fit.multiple)
    return _descriptor(net, WithCEAArch(), [], fit.scale, 3, size, None, half, bfloat16)


def _base_of(weights: Mapping[str, Tensor]) -> spandrel.ModelDescriptor:
    """What spandrel makes of the weights of a network without its CEA layers."""
    return spandrel.MAIN_REGISTRY.load({n.removeprefix('base.'): v for n, v in weights.items() if '.cea.' not in n})


@torch.no_grad()
def _smallest(net: nn.Module, fit: Fit) -> int:
    """The least side of square pictures that a network takes, of powers of two times what sides are multiples of."""
    side = fit.multiple
    while side < PROBED:
        try:
            net(torch.zeros(1, 3, side, side))
            return side if side > fit.multiple else 0
        except (RuntimeError, ValueError, AssertionError, IndexError):
            side *= 2
    return side


@torch.no_grad()
def _runs_in(net: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a network computes in a precision, of weights and pictures alike."""
    try:
        net = copy.deepcopy(net).to(dtype)
        return bool(net(torch.full((1, 3, PROBED, PROBED), 0.5, dtype=dtype)).isfinite().all())
    except (RuntimeError, ValueError, TypeError):
        return False


class CEAIRArch(spandrel.Architecture[CEAIR]):
    """CEAIR in its named sizes and others."""

    def __init__(self) -> None:
        keys = ('embed.weight', 'up.0.0.weight', 'fuse.0.conv.weight', 'refinement.0.norm1.weight', 'output.weight')
        super().__init__(id='CEAIR', detect=spandrel.util.KeyCondition.has_all(*keys))

    def load(self, state_dict: Mapping[str, Any]) -> spandrel.ImageModelDescriptor[CEAIR]:
        """As spandrel asks; UserError where the shapes are no CEAIR's."""
        options = cea_ir_options(state_dict)
        net = CEAIR(**options)
        check_fit(net.state_dict(), state_dict, 'the weights do not fit CEAIR')
        net.load_state_dict(state_dict)
        tags = [options['size']] if len(options) == 1 else [f'{options["dim"]}dim']
        return _descriptor(net, self, tags, 1, state_dict['embed.weight'].shape[1], CEAIR_SIZES)


class WithCEAArch(spandrel.Architecture[nn.Module]):
    """Networks that spandrel knows, with CEA layers inside."""

    def __init__(self) -> None:
        super().__init__(id='WithCEA', detect=lambda weights: any('.cea.adapter.' in name for name in weights))

    def load(self, state_dict: Mapping[str, Any]) -> spandrel.ImageModelDescriptor[nn.Module]:
        """As spandrel asks; UserError for CEA layers alone, UnsupportedModelError for a base that it does not know."""
        need_whole(state_dict, 'cea.pth')
        weights = {name.removeprefix('base.'): value for name, value in state_dict.items()}
        base = _base_of(weights)
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


def cea_ir_options(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a CEAIR by the names and shapes of its weights: ``size`` alone where it is a named one."""
    if size := named_size(weights):
        return {'size': size}

    def blocks(stage: str) -> int:
        return len({name.split('.')[stage.count('.') + 1] for name in weights if name.startswith(f'{stage}.')})

    levels = range(NUM_LEVELS - 1)
    stages = [*(f'encoder.{level}' for level in levels), 'latent']
    dim, channels = weights['embed.weight'].shape[:2]
    attention = 'latent.0.attn.temperature' in weights
    hidden = weights[f'latent.0.{"ffn.project_out" if attention else "mixer_in"}.weight'].shape[1 if attention else 0]
    options: dict[str, Any] = {
        'num_in_ch': channels,
        'block': 'attention' if attention else 'conv',
        'dim': dim,
        'num_blocks': [blocks(stage) for stage in stages],
        'num_dec_blocks': [blocks(f'decoder.{level}') for level in levels],
        'num_refinement_blocks': blocks('refinement'),
        # half a channel more, so that rounding down gives this number at every level
        'ffn_expansion_factor': (hidden + 0.5) / (dim * 2 ** (NUM_LEVELS - 1)),
        'up_kernel': weights['up.0.0.weight'].shape[-1],
        'bias': 'embed.bias' in weights,
        'pooled_scale': any('.pooled_scale.' in name for name in weights),
    }
    if attention:
        options['heads'] = [len(weights[f'{stage}.0.attn.temperature']) for stage in stages]
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        path, is_cea, rest = re.sub(r'\.(mixer|mixed|ffn)_cea\.', r'.\1.cea.', name).partition('.cea.')
        if is_cea:
            adapters.setdefault(path, {})[rest] = value
    layers = [_layer_options(layer, 'CEAIR') for layer in adapters.values()]
    options['modulate'] = list(dict.fromkeys(name for layer in layers for name in layer.pop('parts')))
    if not layers:
        return options
    options['cea_stages'] = [stage for stage in STAGES if any(path.startswith(f'{stage}.') for path in adapters)]
    widths = {layer.pop('width') for layer in layers}
    options |= {'cea_width': max(widths - {None}, default=None), 'cea_strides': [2] * NUM_LEVELS}
    return options | {'cea_heads': layers[0].pop('heads')} | layers[0]


def _layer_options(layer: Mapping[str, Tensor], network: str) -> dict[str, Any]:
    """Options of a hyper-adapter by its weights, and the names of its targets, ``parts``."""
    if 'factors.queries' in layer:
        rank, width = layer['factors.queries'].shape[1:]
        kind = 'pooled' if 'factors.describe.0.weight' in layer else 'dynamic'
        heads = 'factors.heads.to_bases.'
        dim = next(len(value) for name, value in layer.items() if name.startswith(heads))
        width = None if width == dim else width
    else:
        heads = 'factors.bases.'
        rank, width = next(value.shape[1] for name, value in layer.items() if name.startswith(heads)), None
        kind = 'static'
    warnings.warn(ASSUMED.format(network=network), stacklevel=4)
    parts = dict.fromkeys(name.removeprefix(heads).partition('.')[0] for name in layer if name.startswith(heads))
    return {'rank': rank, 'width': width, 'heads': 4, 'factors': kind, 'parts': list(parts)}


def _inject(net: nn.Module, layers: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
    """Put layers, weights by the paths of their targets, into ``net``."""
    found = {
        path: _layer_options({n.removeprefix('adapter.'): v for n, v in layer.items()}, name)
        for path, layer in layers.items()
    }
    options = dict(next(iter(found.values())))
    options['rank'] = {path: layer['rank'] for path, layer in found.items()}
    parts = {path: ''.join(layer['parts']) for path, layer in found.items()}
    targets = [path if parts[path] == 'out' else f'{path}:{parts[path]}' for path in found]
    del options['parts']
    try:
        inject_cea(net, targets, **options)
    except ValueError as error:
        raise spandrel.UnsupportedModelError(f"CEA layers in spandrel's {name}: {error}") from error
    weights = {f'{path}.cea.{rest}': value for path, layer in layers.items() for rest, value in layer.items()}
    check_fit(cea_state_dict(net), weights, f'the CEA layers do not fit {name}')
    net.load_state_dict(weights, strict=False)


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
