"""CEAModel: BasicSR's SRModel for restoration, with float validation, named loss terms and atomic checkpoints."""

import os
from pathlib import Path
from typing import Any

import torch
from basicsr.losses import build_loss
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cea_arch import distributed
from cea_arch.checkpoints import read_checkpoint, weights_of, write_checkpoint
from cea_arch.data.replay import seed_all
from cea_arch.errors import UserError
from cea_arch.metrics.protocols import PROTOCOLS
from cea_arch.metrics.report import Report
from cea_arch.models.resuming import made_with, take_up
from cea_arch.models.training_step import TrainingStep, build_optimizer, checkpoint_activations, memory_format
from cea_arch.models.validation import ValidatedModel
from cea_arch.networks.with_cea import WithCEA
from cea_arch.plugins import loaded_plugins
from cea_arch.rules import differences
from cea_arch.threads import ThreadChooser


class CEAModel(ValidatedModel):
    """Train and validate a restoration network.

    Beside SRModel's options it reads ``train.fft_opt`` (a loss, such as ``CEAFFTLoss``), those of
    :class:`TrainingStep`, ``train.checkpoint_activations`` (see the function), any of torch's usual optimizers,
    ``device: mps``, ``val.protocol`` (one of ``PROTOCOLS``), ``val.maps`` (CEA layers whose routing is drawn for each
    set's first image, see :class:`RoutingMaps`; true: the last one), ``logger.keep_last`` (how many checkpoints stay,
    all by default), and from each validation set ``benchmark`` and ``group``: sets of one benchmark, and of one group,
    get a common mean. Validation scores the degraded input beside the result, and writes the files of :class:`Report`;
    the weights with the best mean of the first metric are kept as ``net_g_best.pth``.

    Attributes:
        stop_asked: Set from outside, by a signal's name, it has training save and end after the current step.
    """

    stop_asked: str | None = None

    def __init__(self, opt: dict[str, Any]) -> None:
        val = opt.get('val') or {}
        self.protocol = val.get('protocol')
        self.replaced = 0
        self.made_with = made_with(opt)  # before BasicSR takes out what it has read
        super().__init__(opt)
        folder = opt['path']['experiments_root' if self.is_train else 'results_root']
        self.metrics = val.get('metrics') or {}
        self.report = Report(folder, opt['name'], self.metrics, self.protocol)

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """Move ``net`` to CUDA, MPS or CPU, and let it train in step with those of the other processes."""
        if self.opt['num_gpu'] == 0:
            self.device = torch.device(self.opt.get('device', 'cpu'))
        if self.is_train:
            net = net.to(memory_format=memory_format(self.opt['train']))
            checkpoint_activations(net, self.opt['train'].get('checkpoint_activations', False))
        if not self.opt['dist']:
            return super().model_to_device(net)
        net = net.to(self.device)
        if not self.is_train:
            return net
        devices = [torch.cuda.current_device()] if self.device.type == 'cuda' else None
        unused = self.opt.get('find_unused_parameters', False)
        return DistributedDataParallel(net, device_ids=devices, find_unused_parameters=unused)

    def init_training_settings(self) -> None:
        """As SRModel's, and the frequency loss."""
        fft_opt = self.opt['train'].get('fft_opt')
        self.cri_fft = build_loss(fft_opt).to(self.device) if fft_opt else None
        self.step = TrainingStep(self.opt['train'], self.device)
        alone = self.device.type == 'cpu' and not self.opt['dist'] and not self.step.compile
        self.threads = ThreadChooser(get_root_logger().info, alone)
        super().init_training_settings()
        get_root_logger().info(self.describe_training())

    def describe_training(self) -> str:
        """What decides whether two runs can be compared: batch, loss terms with their weights, protocol of scoring."""
        devices = distributed.devices(self.opt)
        per_device = self.opt['datasets']['train']['batch_size_per_gpu']
        total = self.opt['train'].get('total_batch_size') or per_device * devices
        if total != per_device * devices:
            raise UserError(
                f'train.total_batch_size is {total}, but {devices} devices take {per_device} each: import cea_arch '
                'before the options are parsed, or use cea train.'
            )
        parts = f', each computed in {self.step.accumulate} parts' if self.step.accumulate > 1 else ''
        lines = [f'Effective batch: {per_device * devices} ({devices} x {per_device}{parts})']
        for name, loss in (('l_pix', self.cri_pix), ('l_fft', self.cri_fft), ('l_percep', self.cri_perceptual)):
            if loss:
                words = [
                    f'{key} {value}' for key, value in vars(loss).items() if key.endswith(('weight', 'norm', 'target'))
                ]
                lines.append(f'Loss term {name}: {type(loss).__name__}, {", ".join(words)}')
        if self.protocol:
            lines.append(f'Scores by protocol {self.protocol}: {PROTOCOLS[self.protocol].text}')
        return '\n'.join(lines)

    def setup_optimizers(self) -> None:
        """One optimizer over the parameters that train; says how many do not, once."""
        trained = [p for p in self.net_g.parameters() if p.requires_grad]
        frozen = sum(p.numel() for p in self.net_g.parameters() if not p.requires_grad)
        if frozen:
            get_root_logger().info(f'{frozen:,} parameters are frozen.')
        self.optimizer_g = build_optimizer(self.opt['train']['optim_g'], trained, self.device.type)
        self.optimizers.append(self.optimizer_g)

    @master_only
    def print_network(self, net: nn.Module) -> None:
        """Log the network's name and size; its modules, as BasicSR prints them, fill screens."""
        net = self.get_bare_model(net)
        count = sum(p.numel() for p in net.parameters())
        get_root_logger().info(f'{type(net).__name__} with {count:,} parameters on {self.device}.')

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``lq`` and, where there is one, ``gt``, RGB ``(B, 3, H, W)`` in [0, 1]."""
        self.lq = data['lq'].to(self.device, non_blocking=True)
        self.gt = data['gt'].to(self.device, non_blocking=True) if 'gt' in data else None
        self.files = list(data.get('lq_path', ()))
        for problem in filter(None, data.get('replaced', ())):
            self.replaced += 1
            # as an error, so that every process says it
            get_root_logger().error(f'{problem} Another image took its place, {self.replaced} so far.')

    def optimize_parameters(self, current_iter: int) -> None:
        """One step on one batch; what the network draws follows from the seed, the process and the iteration."""
        seed_all(self.opt['manual_seed'], self.opt['rank'], current_iter)
        with self.threads.piece():
            losses, stepped = self.step.run(self.net_g, self.optimizer_g, (self.lq, self.gt), self.losses)
        self.log_dict = distributed.means(losses | {'stop': float(self.stop_asked is not None)}, self.device)
        stop = self.log_dict.pop('stop') > 0  # asked of any process
        if not stepped:
            self.files = [file for files in distributed.gather(self.files) for file in files]
            self.step.complain(self.log_dict, current_iter, self.files)
        elif self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)
        if stop or self.step.skipped >= self.step.max_skipped:
            self.save((current_iter - 1) // self.opt['train']['iters_per_epoch'], current_iter)
            distributed.wait()  # a process that ends would have the launcher end the one that saves
        if stop:
            asked = self.stop_asked or 'another process'
            get_root_logger().info(f'Stopped by {asked} after iteration {current_iter}; saved.')
            raise KeyboardInterrupt
        self.step.check(self.files)

    def losses(self, output: Tensor, gt: Tensor) -> dict[str, Tensor]:
        """The active loss terms, weighted."""
        losses = {}
        if self.cri_pix:
            losses['l_pix'] = self.cri_pix(output, gt)
        if self.cri_fft:
            losses['l_fft'] = self.cri_fft(output, gt)
        if self.cri_perceptual:
            percep, style = self.cri_perceptual(output, gt)
            losses |= {k: v for k, v in (('l_percep', percep), ('l_style', style)) if v is not None}
        return losses

    @master_only
    def save_network(self, net: Any, net_label: str, current_iter: int | str, param_key: Any = 'params') -> None:
        """Save weights under BasicSR's name and keys and ``network_g``, the options to rebuild it, beside and renamed.

        Of :class:`WithCEA` with a frozen base, the CEA layers alone.
        """
        nets = [self.get_bare_model(net) for net in (net if isinstance(net, list) else [net])]
        keys = param_key if isinstance(param_key, list) else [param_key]
        states = [net.stored_state() if isinstance(net, WithCEA) else net.state_dict() for net in nets]
        weights = {
            key: {name: value.cpu() for name, value in state.items()} for key, state in zip(keys, states, strict=True)
        }
        weights['network_g'] = dict(self.opt['network_g'])
        if plugins := loaded_plugins(with_folders=False):
            weights['plugins'] = plugins
        label = 'latest' if current_iter == -1 else current_iter
        write_checkpoint(weights, os.path.join(self.opt['path']['models'], f'{net_label}_{label}.pth'))

    def load_network(
        self, net: nn.Module, load_path: str, strict: bool = True, param_key: str | None = 'params'
    ) -> None:
        """As BaseModel's, from any file of weights, ``.safetensors`` too; those under ``param_key`` if it is there."""
        content = read_checkpoint(load_path)
        weights = weights_of({'params': content[param_key]} if param_key in content else content, load_path)
        net = self.get_bare_model(net)
        get_root_logger().info(f'{type(net).__name__} starts with the weights of {load_path}.')
        self._print_different_keys_loading(net, weights, strict)
        net.load_state_dict(weights, strict=strict)

    def _print_different_keys_loading(
        self, crt_net: nn.Module, load_net: dict[str, Tensor], strict: bool = True
    ) -> None:
        """Log what a loose load leaves out; a strict one names it itself, and CEA layers alone are no mistake."""
        if not strict:
            super()._print_different_keys_loading(crt_net, load_net, strict)

    def model_ema(self, decay: float = 0.999) -> None:
        """As BaseModel's, but what does not train is copied, buffers too: averaging equal numbers would drift."""
        trained = dict(self.get_bare_model(self.net_g).named_parameters())
        for name, average in self.net_g_ema.named_parameters():
            if trained[name].requires_grad:
                average.data.mul_(decay).add_(trained[name].data, alpha=1 - decay)
            else:
                average.data.copy_(trained[name].data)
        for average, buffer in zip(self.net_g_ema.buffers(), self.get_bare_model(self.net_g).buffers(), strict=True):
            average.copy_(buffer)

    def save(self, epoch: int, current_iter: int) -> None:
        """Save weights, then what resuming needs, so that a state implies its weights; drop what ``keep_last`` says."""
        self.save_weights(current_iter)
        self.save_training_state(epoch, current_iter)
        if 'keep_last' in self.opt['logger'] and current_iter != -1:
            self._drop_old(self.opt['logger']['keep_last'])

    def save_weights(self, current_iter: int | str) -> None:
        """Save the network and, if there is one, its average."""
        averages = [self.net_g_ema] if hasattr(self, 'net_g_ema') else []
        self.save_network([self.net_g, *averages], 'net_g', current_iter, ['params', 'params_ema'][: 1 + len(averages)])

    @master_only
    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Save what resuming needs besides weights, beside and renamed."""
        if current_iter == -1:
            return
        state = {
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            'scaler': self.step.scaler.state_dict(),
            'threads': self.threads.state_dict(),
            'best_metric_results': getattr(self, 'best_metric_results', {}),
            'made_with': self.made_with,
        }
        write_checkpoint(state, os.path.join(self.opt['path']['training_states'], f'{current_iter}.state'))

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Take up optimizers, schedules, loss scaling, threads and the best scores; says which options are others."""
        said = list(differences(resume_state.get('made_with') or self.made_with, self.made_with))
        for sentence in said + take_up(self.optimizers, self.schedulers, resume_state):
            get_root_logger().info(f'Going on: {sentence}')
        self.step.scaler.load_state_dict(resume_state.get('scaler', {}))
        self.threads.load_state_dict(resume_state.get('threads', {}))
        if resume_state.get('best_metric_results'):
            self.best_metric_results = resume_state['best_metric_results']

    @master_only
    def _drop_old(self, keep: int) -> None:
        states = Path(self.opt['path']['training_states']).glob('*.state')
        states = sorted((path for path in states if path.stem.isdigit()), key=lambda path: int(path.stem))
        for path in states[:-keep]:
            path.unlink()
            Path(self.opt['path']['models'], f'net_g_{path.stem}.pth').unlink(missing_ok=True)
