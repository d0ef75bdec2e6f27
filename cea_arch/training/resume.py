"""Which training state a run goes on from, and whether it can: known before anything is written."""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from basicsr.utils import check_resume

from cea_arch import distributed
from cea_arch.checkpoints import check_fit, weights_of
from cea_arch.errors import UserError
from cea_arch.networks.with_cea import holds_layers_alone
from cea_arch.rules import differences
from cea_arch.training.options import build_network


def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from: ``path.resume_state``, or with ``--auto_resume`` the newest one that is whole.

    Works without CUDA and from any folder.

    Raises:
        UserError: The state that was asked for, or every one that exists, cannot be read; or it is of another run,
            network or optimizer than the options say, or of a later iteration than the last one.
    """
    if opt['auto_resume']:
        states = list(Path(opt['path']['training_states']).glob('*.state'))
        states = sorted((p for p in states if p.stem.isdigit()), key=lambda p: int(p.stem), reverse=True)
    else:
        states = [Path(p) for p in [opt['path'].get('resume_state')] if p]
    for path in states:
        weights = path.parent.parent / 'models' / f'net_g_{path.stem}.pth'
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
            content = torch.load(weights, map_location='cpu', weights_only=True, mmap=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            logging.getLogger('cea_arch').warning('Cannot resume from %s: %s', path, error)
            continue
        _check_state(opt, state, path)
        _check_weights(opt, state, weights_of(content, weights), weights)
        opt['path']['resume_state'] = str(path)
        check_resume(opt, state['iter'])
        return state
    if states:
        raise UserError(f'none of the {len(states)} training states can be read; the newest is {states[0]}.')
    return None


def agreed_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from, the same one in all processes."""
    with distributed.together():
        state = load_resume_state(opt)
    found = distributed.gather(state and state['iter'])
    if len(set(found)) > 1:
        raise UserError(
            f'the processes found different training states, of iterations {found}: the folder experiments must be one '
            'that all machines share.'
        )
    return state


def _check_state(opt: dict[str, Any], state: dict[str, Any], path: Path) -> None:
    run = Path(opt['path']['experiments_root'])
    if path.resolve().parent.parent != run.resolve():
        raise UserError(
            f'path.resume_state: {path} is of another run than {opt["name"]!r}. Go on under its own name, '
            f'{path.resolve().parent.parent.name!r}, or start from its weights with path.pretrain_network_g.',
            'path.resume_state',
        )
    if state['iter'] > opt['train']['total_iter']:
        raise UserError(
            f'train.total_iter is {opt["train"]["total_iter"]}, but {path} is of iteration {state["iter"]} already.',
            'train.total_iter',
        )
    optimizer, before = opt['train']['optim_g']['type'], _stored(state, 'train', 'optim_g', 'type')
    if before not in (None, optimizer):
        raise UserError(
            f'train.optim_g.type: {path} is of {before}, and of no use to {optimizer}. Keep {before}, or start anew '
            'under another name from the weights, with path.pretrain_network_g.',
            'train.optim_g.type',
        )


def _check_weights(opt: dict[str, Any], state: dict[str, Any], weights: dict[str, torch.Tensor], path: Path) -> None:
    network = build_network(opt['network_g'], 'network_g')
    changed = '; '.join(differences(_stored(state, 'network_g') or opt['network_g'], opt['network_g'], 'network_g.'))
    if not holds_layers_alone(weights):
        label = f'{path}, to go on from, does not fit network_g' + (f' ({changed})' if changed else '')
        check_fit(network.state_dict(), weights, label)
    trained = sum(parameter.requires_grad for parameter in network.parameters())
    stored = [len(group['params']) for group in state['optimizers'][0]['param_groups']]
    if opt['model_type'] == 'CEAModel' and stored != [trained]:
        raise UserError(
            f'network_g: {trained} of its parameters train, of the run to go on from {sum(stored)}'
            + (f' ({changed}).' if changed else '.'),
            'network_g',
        )


def _stored(state: dict[str, Any], *keys: str) -> Any:
    """An option that the run to go on from had; ``None`` where its state does not say."""
    found = state.get('made_with', {})
    for key in keys:
        found = (found or {}).get(key)
    return found
