"""BasicSR's own train and test pipelines, with what stands in the way on today's machines put right around them.

``basicsr.train.train_pipeline`` looks the functions below up as globals of its module. They are replaced for the
duration of one call and put back; no file of basicsr is touched.
"""

import importlib
import logging
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import current_thread, main_thread
from types import ModuleType
from typing import Any

import basicsr
import torch
from basicsr.models.base_model import BaseModel
from basicsr.utils.dist_util import master_only

import cea_arch
from cea_arch import distributed
from cea_arch.compat import replaced
from cea_arch.data.replay import same_random_numbers
from cea_arch.errors import UserError
from cea_arch.files import locked, remove_leftovers, written_beside
from cea_arch.models.cea_model import CEAModel
from cea_arch.models.resuming import take_up
from cea_arch.models.training_step import TrainingStopped
from cea_arch.restoring.tiling import keep_freed_memory
from cea_arch.training.curves import ProgressLogger, open_tensorboard, start_wandb, write_curves
from cea_arch.training.loaders import ReplaySampler, exact_loaders, let_go
from cea_arch.training.option_files import Options, write_options
from cea_arch.training.options import check_options, read_options
from cea_arch.training.resume import agreed_state


def run(args: Namespace) -> int:
    """Train or test (``args.command``) as the option file ``args.opt`` says, below the folder ``args.root``.

    What ends all processes at once is raised in the first one alone; the others return the exit code.
    """
    try:
        opt = read_options(args.opt, args.set, args.force_yml)
    except UserError:
        if args.launcher == 'none' or distributed.first_of_machine():
            raise
        return 2
    try:
        _run_here(args, opt)
    except (KeyboardInterrupt, TrainingStopped) as reason:
        if distributed.rank() == 0:
            raise
        return 2 if isinstance(reason, TrainingStopped) else 130
    except RuntimeError as error:
        if not distributed.is_lost(error):
            raise
        raise UserError(
            f'process {distributed.rank()} of {distributed.size()} has lost another one, whose own output may say why. '
            f'The same command with --auto_resume goes on from the last checkpoint. ({str(error).splitlines()[0]})'
        ) from error
    finally:
        distributed.stop()
    return 0


def _run_here(args: Namespace, opt: Options) -> None:
    with ExitStack() as held:
        file = held.enter_context(_resolved(args, opt))
        _run_pipeline(importlib.import_module(f'basicsr.{args.command}'), args, opt, file, held)


def _run_pipeline(module: ModuleType, args: Namespace, opt: Options, file: Path, held: ExitStack) -> None:
    changes = [
        *_parsing(args, opt, file),
        (module, 'parse_options', _checked(module.parse_options, held, opt)),
        (module, 'get_env_info', _environment),
        *_keeping_options(module, args, file),
    ]
    if args.command == 'train':
        resumed = {}
        changes += [
            (module, 'load_resume_state', lambda parsed: resumed.setdefault('state', _state(parsed, opt))),
            (module, 'EnlargedSampler', ReplaySampler),
            (module, 'create_train_val_dataloader', exact_loaders(module, resumed)),
            (module, 'init_tb_logger', lambda log_dir: open_tensorboard(log_dir, resumed['state'])),
            (module, 'init_wandb_logger', start_wandb),
            (BaseModel, 'resume_training', _resume),
            (module, 'MessageLogger', ProgressLogger),
        ]
    keep_freed_memory()
    stops = args.command == 'train' and opt['model_type'] == 'CEAModel' and current_thread() is main_thread()
    with replaced(changes), _own_log(), _stopping_on_signals() if stops else nullcontext():
        with let_go():
            getattr(module, f'{args.command}_pipeline')(str(Path(args.root).absolute()))
        if args.command == 'train' and not args.debug:
            write_curves(args.root, opt['name'])


def _state(parsed: dict[str, Any], opt: Options) -> dict[str, Any] | None:
    with opt.placing():
        return agreed_state(parsed)


def _resume(model: BaseModel, state: dict[str, Any]) -> None:
    """BasicSR's models, too, go on with the schedule that the options say now."""
    for sentence in take_up(model.optimizers, model.schedulers, state):
        logging.getLogger('basicsr').info('Going on: %s', sentence)


def _start(launcher: str, opt: dict[str, Any]) -> None:
    distributed.start(launcher, torch.cuda.is_available() and opt['num_gpu'] != 0, **opt.get('dist_params') or {})


def parsed_options(args: Namespace, opt: Options, is_train: bool) -> dict[str, Any]:
    """What BasicSR's parser makes of options, for one process: phases, paths, devices."""
    parse_options = importlib.import_module('basicsr.utils.options').parse_options
    with _resolved(args, opt) as file, replaced(_parsing(args, opt, file)):
        parsed = parse_options(str(Path(args.root).absolute()), is_train)[0]
    return _choose_device(parsed, opt)


@contextmanager
def _resolved(args: Namespace, opt: Options) -> Iterator[Path]:
    """A file of these options, which BasicSR reads and the run keeps."""
    given = [('--set', args.set), ('--force_yml', args.force_yml)]
    words = [args.opt, *(word for name, values in given if values for word in (name, *values))]
    command = f'cea {args.command} -opt {shlex.join(words)}'
    header = (
        f'{command}\n{time.strftime("%Y-%m-%d %H:%M:%S")}; with what the file inherited and left out, what was set and '
        'the protocol'
    )
    with TemporaryDirectory() as folder:
        file = Path(folder, 'options.yml')
        write_options(opt, file, header)
        yield file


def _parsing(args: Namespace, opt: Options, file: Path) -> list[tuple[ModuleType, str, Any]]:
    """Have BasicSR's parser read ``file``."""
    argv = [f'cea {args.command}', '-opt', str(file), '--launcher', getattr(args, 'launcher', 'none')]
    argv += [f'--{switch}' for switch in ('auto_resume', 'debug') if getattr(args, switch, False)]
    options_module = importlib.import_module('basicsr.utils.options')
    return [
        (options_module, 'print', lambda *words, **options: None),  # 'Disable distributed.'
        (options_module, 'init_dist', lambda launcher, **_: _start(launcher, opt)),
        (sys, 'argv', argv),
    ]


def _choose_device(parsed: dict[str, Any], opt: dict[str, Any]) -> dict[str, Any]:
    """``num_gpu: auto`` takes Apple's GPU where there is no other, of which BasicSR knows nothing."""
    if opt['num_gpu'] == 'auto' and not parsed['num_gpu'] and torch.backends.mps.is_available():
        parsed.setdefault('device', 'mps')
    return parsed


def _checked(parse_options: Callable, held: ExitStack, opt: Options) -> Callable:
    """Check what was parsed and, as ``held``, lock the run's folder before BasicSR renames an earlier one."""

    def parse(root_path: str, is_train: bool = True) -> tuple[dict[str, Any], Namespace]:
        parsed, args = parse_options(root_path, is_train)
        with distributed.together(), opt.placing(), same_random_numbers():  # a run starts from its seed alone
            check_options(_choose_device(parsed, opt))
            _reset(logging.getLogger('basicsr'))  # which anything that was tried may have set up, without a file
            if parsed['rank'] == 0:
                folder = parsed['path']['experiments_root' if is_train else 'results_root']
                held.enter_context(locked(folder))
                remove_leftovers(folder)
        return parsed, args

    return parse


def _keeping_options(module: ModuleType, args: Namespace, file: Path) -> list[tuple[ModuleType, str, Any]]:
    """Have the run keep ``file``, as it is, where BasicSR would add its command line, or in testing keep nothing."""
    basicsr_make_exp_dirs = module.make_exp_dirs

    @master_only
    def keep(_: str, folder: str) -> None:
        with written_beside(Path(folder, file.name)) as aside:
            shutil.copyfile(file, aside)

    def make_exp_dirs(parsed: dict[str, Any]) -> None:
        basicsr_make_exp_dirs(parsed)
        keep('', parsed['path']['results_root'])

    return [(module, 'copy_opt_file', keep)] if args.command == 'train' else [(module, 'make_exp_dirs', make_exp_dirs)]


@contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM have :class:`CEAModel` save and end after the current step; a second one ends it at once."""

    def ask(number: int, frame: object) -> None:
        if CEAModel.stop_asked and distributed.size() == 1:  # launchers repeat what the terminal sent
            raise KeyboardInterrupt
        CEAModel.stop_asked = signal.Signals(number).name

    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, ask) for number in numbers}
    training = True

    def mask(how: int) -> None:
        if training:
            signal.pthread_sigmask(how, numbers)

    if hasattr(os, 'register_at_fork'):  # workers are born deaf: one can be hit before start_worker runs in it
        os.register_at_fork(before=lambda: mask(signal.SIG_BLOCK), after_in_parent=lambda: mask(signal.SIG_UNBLOCK))
    try:
        yield
    except RuntimeError as error:
        # a worker that the signal met before it could leave it to us
        if CEAModel.stop_asked and 'DataLoader worker' in str(error):
            raise KeyboardInterrupt from error
        raise
    finally:
        training = False
        CEAModel.stop_asked = None
        for number, handler in old.items():
            signal.signal(number, handler)


def _environment() -> str:
    versions = f'cea_arch {cea_arch.__version__}, basicsr {basicsr.__version__}, torch {torch.__version__}'
    return f'{versions}, Python {platform.python_version()}'


@contextmanager
def _own_log() -> Iterator[None]:
    """Give the run its own log file, though BasicSR may have been at work before it in this process.

    Drops the warning against several validation sets, which BasicSR repeats each time and CEAModel supports.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith('Multiple validation datasets')

    logger = logging.getLogger('basicsr')
    _reset(logger)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
        _reset(logger)


def _reset(logger: logging.Logger) -> None:
    """BasicSR sets its logger up once a process, even where something other than a run came first."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    importlib.import_module('basicsr.utils.logger').initialized_logger.clear()
