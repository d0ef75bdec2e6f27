"""From a file of weights, or from options, to the network."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from cea_arch.checkpoints import check_fit, read_checkpoint, weights_of
from cea_arch.compat import has_basicsr, registry
from cea_arch.errors import UserError, lookup
from cea_arch.networks.cea_ir import CEAIR, SIZES, named_size
from cea_arch.networks.with_cea import need_whole


def build_network(options: Mapping[str, Any]) -> nn.Module:
    """A network from its options, ``type`` and the constructor's own: CEAIR, or any that basicsr's registry knows.

    Raises:
        UserError: The type is unknown, or needs basicsr where it is absent; or an option is not the network's.
    """
    options = dict(options)
    kind = options.pop('type', None)
    options.pop('pretrained_base', None)  # the weights are in this file
    if kind == 'CEAIR':
        network: Callable[..., nn.Module] = CEAIR
    elif not has_basicsr():
        raise UserError(f'network {kind!r} needs basicsr, which is not installed; without it there is CEAIR.')
    else:
        network = lookup(registry('ARCH'), kind, 'network')
    try:
        return network(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f'network {kind!r} cannot be built: {error}') from error


def network_options(
    content: Mapping[str, Any], path: str | os.PathLike, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The network's options: ``given``, or from the file or, for CEAIR's named sizes, the shapes of its weights."""
    options = given or content.get('network_g')
    if isinstance(options, Mapping):
        return dict(options)
    weights = weights_of(content, path)
    if size := named_size(weights):
        return {'type': 'CEAIR', 'size': size}
    raise UserError(
        f'{path} does not say what network it holds, and its {len(weights)} weights are not those of CEAIR in size '
        f'{", ".join(SIZES)}: expected options under network_g, as CEAModel writes them. `-opt OPTIONS.yml` takes them '
        'from the file that it was trained with.'
    )


def load_network(path: str | os.PathLike, options: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that a file holds, with its weights in float32, in evaluation mode.

    Args:
        path: File of weights.
        options: Of the network, as in ``network_g``, where the file does not say them.

    Raises:
        UserError: No such file, not a file of weights, an unknown network, or weights that do not fit it.
    """
    return network_in(read_checkpoint(path), path, options)


def network_in(
    content: Mapping[str, Any], path: str | os.PathLike, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """As :func:`load_network`, from the content of the file."""
    weights = weights_of(content, path)
    need_whole(weights, path)
    options = network_options(content, path, options)
    net = build_stored(content, options)
    check_fit(net.state_dict(), weights, f'{path} does not fit {options.get("type")}')
    net.load_state_dict(weights)
    return net.eval()


def build_stored(content: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """As :func:`build_network`; an error says which plugins a file's network was trained with. They are not imported
    unasked."""
    try:
        return build_network(options)
    except UserError as error:
        names = content.get('plugins')
        if not isinstance(names, list) or not names:
            raise
        flags = ' '.join(f'--plugin {name}' for name in names)
        raise UserError(f'{error} The file was made with plugins: {flags} imports them.') from error
