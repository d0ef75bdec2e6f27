"""WithCEA: any registered network with CEA layers inside; and files that hold these layers without their base."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cea_arch.checkpoints import WEIGHT_KEYS, check_fit, read_checkpoint, weights_of, write_checkpoint
from cea_arch.compat import registry
from cea_arch.errors import UserError, lookup
from cea_arch.layers import cea_parameters, cea_state_dict, inject_cea

# ``targets: auto`` of the architectures that BasicSR ships (our choice): the residual blocks or groups of the body,
# after each activation where a body has no blocks
AUTO_TARGETS = {
    'ECBSR': ['backbone.*.act'],
    'EDSR': ['body.*'],
    'MSRResNet': ['body.*'],
    'RCAN': ['body.*'],
    'RIDNet': ['body.*'],
    'RRDBNet': ['body.*'],
    'SRVGGNetCompact': ['body.*[13579]'],
    'SwinIR': ['layers.*.residual_group.blocks.*'],
    'UNetDiscriminatorSN': ['conv[4-6]'],
}


class WithCEA(nn.Module):
    """A registered network, ``base``, whose chosen modules carry CEA layers; fresh, it computes what the base does.

    Args:
        base: Options of the base network as in ``network_g``: ``type`` and its own.
        targets: Patterns over the base's module names, see :func:`cea_arch.layers.inject_cea`; ``auto`` takes those of
            ``AUTO_TARGETS``. ``cea modules -opt`` lists the modules.
        rank: Components of each layer, or a mapping from patterns to their number.
        factors, routing, rank_norm, width, heads: As for :class:`cea_arch.layers.CEALayer`.
        pretrained_base: File of the base's weights: ``params_ema``, ``params`` or plain.
        freeze_base: Whether the CEA layers alone train. The base then stays in evaluation mode, and what is stored are
            the CEA layers alone if the base has a file of its own, ``pretrained_base``.

    Raises:
        UserError: ``base`` is no network's options, it has no preset, or the weights do not fit, each named.
        ValueError, TypeError: As :func:`cea_arch.layers.inject_cea`.
    """

    def __init__(
        self,
        base: dict[str, Any],
        targets: str | Sequence[str] = 'auto',
        rank: int | Mapping[str, int] = 8,
        factors: str = 'dynamic',
        routing: str = 'signed',
        rank_norm: bool = True,
        width: int | None = None,
        heads: int = 4,
        pretrained_base: str | None = None,
        freeze_base: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(base, Mapping):
            raise UserError(f'base must be the options of a network, such as {{type: SwinIR}}, got {base!r}.')
        options = dict(base)
        kind = options.pop('type', None)
        self.base = lookup(registry('ARCH'), kind, 'base.type')(**options)
        if pretrained_base:
            weights = weights_of(read_checkpoint(pretrained_base), pretrained_base)
            check_fit(self.base.state_dict(), weights, f'{pretrained_base} does not fit {kind}')
            self.base.load_state_dict(weights)
        self.base_has_file = bool(pretrained_base)
        self.freeze_base = freeze_base
        targets = auto_targets(kind) if targets == 'auto' else targets
        targets = inject_cea(self.base, targets, rank, factors, routing, rank_norm, width, heads)
        self.blocks = [f'base.{name}' for name in targets]  # for train.checkpoint_activations
        if freeze_base:
            self.base.requires_grad_(False)
            for parameter in cea_parameters(self.base):
                parameter.requires_grad_(True)
            self.train()

    def forward(self, x: Tensor) -> Tensor:
        """What the base does, with the CEA layers inside; shapes and ranges are the base's."""
        return self.base(x)

    def train(self, mode: bool = True) -> 'WithCEA':
        """As ``nn.Module.train``, but a frozen base stays in evaluation mode: its running statistics do not move."""
        super().train(mode)
        if self.freeze_base:
            self.base.eval()
        return self

    def stored_state(self) -> dict[str, Tensor]:
        """What a checkpoint must hold: all weights, or the CEA layers' alone if the base is frozen and has a file."""
        return cea_state_dict(self) if self.freeze_base and self.base_has_file else self.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``; CEA layers alone are enough if the base came from a file of its own."""
        own = self.state_dict()
        base = own.keys() - cea_state_dict(self).keys()
        if self.base_has_file and base.isdisjoint(state_dict):
            state_dict = {name: own[name] for name in base} | dict(state_dict)
        return super().load_state_dict(state_dict, strict, assign)


class NetworkOptions(dict):
    """Options of :class:`WithCEA` in which models of others find what they look for: those of ``base``, too."""

    def __missing__(self, key: str) -> Any:
        return dict.get(self, 'base', {})[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in dict.get(self, 'base', {})

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default


def auto_targets(kind: str) -> list[str]:
    """The preset of an architecture.

    Raises:
        UserError: It has none.
    """
    if kind not in AUTO_TARGETS:
        raise UserError(
            f'targets: auto knows {", ".join(AUTO_TARGETS)}, not {kind}. Name the modules; cea modules -opt lists them.'
        )
    return AUTO_TARGETS[kind]


def holds_layers_alone(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are CEA layers without their base, as a run with a frozen base stores them."""
    return all('.cea.' in name for name in weights)


def need_whole(weights: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Raise UserError if the weights of the file ``path`` are CEA layers alone."""
    if holds_layers_alone(weights):
        raise UserError(f'{path} holds CEA layers alone; `cea merge base.pth {path} whole.pth` makes a whole file.')


def merge(base: str, cea: str, out: str) -> int:
    """Write a whole checkpoint from a base network's and one that holds CEA layers alone; returns its weights' number.

    ``out`` has the keys (``params``, ``params_ema``) and the names of ``cea``, so it loads where ``cea`` would.

    Raises:
        UserError: ``out`` exists, ``cea`` holds more than CEA layers, or layers of modules that ``base`` lacks.
    """
    if Path(out).exists():
        raise UserError(f'{out} exists already.')
    base_weights = weights_of(read_checkpoint(base), base)
    content = read_checkpoint(cea)
    keys = [key for key in WEIGHT_KEYS if key in content]
    parts = {key: weights_of({key: content[key]}, cea) for key in keys} or {'params': weights_of(content, cea)}
    merged = {key: _merged(base_weights, part, base, cea) for key, part in parts.items()}
    options = content.get('network_g')
    if isinstance(options, dict):
        merged['network_g'] = options | {'pretrained_base': None}
    write_checkpoint(merged, out)
    return len(next(iter(merged.values())))


def _merged(base: dict[str, Tensor], cea: dict[str, Tensor], base_path: str, cea_path: str) -> dict[str, Tensor]:
    prefix = 'base.' if all(name.startswith('base.') for name in cea) else ''
    whole = {f'{prefix}{name}': value for name, value in base.items()}
    for name in cea:
        target, has_layer, _ = name.rpartition('.cea.')
        if not has_layer:
            raise UserError(f'{cea_path} holds more than CEA layers: {name}.')
        # a target may have no weights of its own, such as an activation: then its parent has
        parents = (f'{target}.', f'{target.rpartition(".")[0]}.')
        if not any(key.startswith(parents) for key in whole) or name in whole:
            raise UserError(
                f'{cea_path} does not fit {base_path}, which has no module {target.removeprefix(prefix)!r}.'
            )
    return whole | cea
