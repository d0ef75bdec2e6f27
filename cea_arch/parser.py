"""The words of the ``cea`` command: what each of its commands takes. Nothing that a command needs is imported here."""

import argparse
import importlib
import os
from collections.abc import Callable

import cea_arch
from cea_arch.files import PACKAGED_WEIGHTS

path = os.path.expanduser  # `--output=~/x`: the shell leaves that as it is


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='cea', description='Continuous Expert Assembly for image restoration.')
    parser.add_argument('--version', action='version', version=f'cea_arch {cea_arch.__version__}')
    commands = parser.add_subparsers(dest='command', required=True)
    text = 'train a network as an option file says; results go to experiments/<name> and tb_logger/<name>'
    train = _add(commands, 'train', text, _later('cea_arch.training.pipeline'))
    text = 'score trained weights on the data sets of an option file; results go to results/<name>'
    test = _add(commands, 'test', text, _later('cea_arch.training.pipeline'))
    for command in (train, test):
        _add_options(command)
        command.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='job launcher')
        command.add_argument('--local_rank', '--local-rank', type=int, default=0, help='given by launchers, not by you')
    train.add_argument('--auto_resume', action='store_true', help='go on from the last training state')
    train.add_argument('--debug', action='store_true', help='validate and save every 8 iterations')
    _add_check(commands)
    _add_score(commands)
    _add_report(commands)
    text = (
        'list the modules of network_g, or of its base, with their channels and layout: which can be targets of WithCEA'
    )
    command = _add(commands, 'modules', text, _later('cea_arch.cli', 'modules'))
    command.add_argument('-opt', type=path, required=True, help='option YAML file')
    text = 'make a whole checkpoint from a base network and the CEA layers that a run with freeze_base saved'
    command = _add(commands, 'merge', text, _later('cea_arch.cli', 'merge'))
    for name in ('base', 'cea', 'out'):
        command.add_argument(name, type=path, metavar=f'{name}.pth')
    for command in (
        train,
        test,
        *(commands.choices[name] for name in ('check', 'study', 'schema', 'score', 'report', 'modules')),
    ):
        command.set_defaults(needs_basicsr=True)
    _add_restore(commands)
    _add_explain(commands)
    _add_export(commands)
    _add_demo(commands)
    _add_profile(commands)
    text = 'install basicsr where it is absent, also on Python 3.13 and later, on which it does not build by itself'
    _add(commands, 'setup', text, _later('cea_arch.compat', 'set_up'))
    text = 'say what is installed, what is not right, and what to do about it'
    _add(commands, 'doctor', text, _later('cea_arch.doctor'))
    info = _add(commands, 'info', 'say what a file of weights holds', _later('cea_arch.doctor', 'show_weights'))
    info.add_argument('file', type=path, help='.pth or .safetensors')
    _add_network(info)
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, text: str, call: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(call=call, needs_basicsr=False)
    text = 'import another package, or a file, that registers networks, models or data sets; may be repeated'
    command.add_argument('--plugin', action='append', default=[], metavar='MODULE', help=text)
    return command


def _least(smallest: int) -> Callable[[str], int]:
    """A whole number of at least so much."""

    def number(text: str) -> int:
        if not text.lstrip('-').isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f'expected a whole number, {smallest} or more, got {text!r}')
        return int(text)

    return number


def _later(module: str, function: str = 'run') -> Callable[[argparse.Namespace], int | None]:
    """A function whose module is imported when it is called."""
    return lambda args: getattr(importlib.import_module(module), function)(args)


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument('-opt', type=path, required=True, help='option YAML file')
    command.add_argument(
        '--root', type=path, default='.', help='folder that holds experiments/ and results/ (default: this one)'
    )
    command.add_argument(
        '--set', nargs='+', action='extend', metavar='A.B=C', help='set options: train.optim_g.lr=1e-4 num_gpu=0'
    )
    command.add_argument(
        '--force_yml',
        nargs='+',
        action='extend',
        metavar='A:B=C',
        help="the same in BasicSR's way: train:total_iter=100",
    )


def _add_check(commands: argparse._SubParsersAction) -> None:
    text = 'check an option file, say what it would do, and take two real steps of a training; nothing is written'
    check = _add(commands, 'check', text, _later('cea_arch.training.check'))
    _add_options(check)
    check.add_argument('--steps', type=int, default=2, help='how many steps to take; 0: none')
    check.add_argument('--processes', type=int, default=1, help='of the launcher, for batch and epochs')
    check.add_argument('--allow-missing', action='store_true', help='exit with 0 though data or weights are missing')
    text = 'train a network with CEA and its ablations, as the paper names them, for several seeds, and compare'
    study = _add(commands, 'study', text, _later('cea_arch.training.study'))
    _add_options(study)
    study.add_argument(
        '--seeds', nargs='+', type=_least(0), default=[0, 1, 2], help='one training of each variant for each'
    )
    study.add_argument(
        '--variants',
        nargs='+',
        default=None,
        help='cea (as the file says), none, static, pooled, topk, static_topk, no_rank_norm, r2, r4, r16; of CEAIR q, '
        'k, v, qk, qkv, ffn, mixer, mixed, fuse, scale, none_scale; those of study.variants in the file; none*1.2: for '
        '1.2 times the steps (default: none static pooled topk cea)',
    )
    text = 'equal parameters, by the width of feed-forwards or, of other networks, by the option study.width names'
    study.add_argument('--match', action='store_true', help=text)
    study.add_argument('--hours', type=float, help='save and end after so many; the same command goes on')
    study.add_argument('--jobs', type=_least(1), default=1, help='trainings at a time')
    _add(commands, 'schema', 'print the JSON schema of option files, for editors', _later('cea_arch.cli', 'schema'))


def _add_score(commands: argparse._SubParsersAction) -> None:
    text = 'score images that any network has written to folders, by a named protocol'
    score = _add(commands, 'score', text, _later('cea_arch.cli', 'score'))
    score.add_argument(
        '--set',
        nargs=3,
        action='append',
        required=True,
        dest='sets',
        metavar=('NAME', 'RESTORED', 'GT'),
        help='a set: its name, the folder of restored images, the folder or LMDB of ground truths; may be repeated',
    )
    score.add_argument('--protocol', required=True, help='aio, moce-ir, onerestore or basicsr')
    score.add_argument(
        '--lpips',
        nargs='?',
        const='',
        type=path,
        metavar='BACKBONE',
        help="also LPIPS (AlexNet), its backbone's weights from torchvision's file, or else downloaded",
    )
    score.add_argument('--output', type=path, required=True, help='folder for results.md, .csv, .json and the pictures')


def _add_report(commands: argparse._SubParsersAction) -> None:
    text = 'put result files side by side, on request beside published figures'
    report = _add(commands, 'report', text, _later('cea_arch.cli', 'report'))
    text = (
        'results.json of train, test or score, side by side; or study.json, in one table where data and training agree'
    )
    report.add_argument('results', type=path, nargs='*', help=text)
    report.add_argument('--published', metavar='BENCHMARK', help='add the published rows: aio3, aio5 or cdd11')


def _add_restore(commands: argparse._SubParsersAction) -> None:
    text = 'restore picture files, folders of them, or patterns'
    command = _add(commands, 'restore', text, _later('cea_arch.restoring.command'))
    command.add_argument(
        'inputs',
        type=path,
        nargs='*',
        metavar='PICTURE',
        help='files, folders or patterns such as "scans/*.png"; clips (.mp4, .mov, .mkv, .webm) by their names',
    )
    command.add_argument(
        '-i', '--input', type=path, nargs='+', action='extend', default=[], metavar='PICTURE', help='the same'
    )
    command.add_argument('-o', '--output', type=path, default='restored', help='folder to write to (default: restored)')
    _add_model(command)
    command.add_argument('-r', '--recursive', action='store_true', help='also the folders below a folder')
    command.add_argument('--suffix', default='', help='put at the end of names: --suffix _restored')
    command.add_argument(
        '--ext',
        default='auto',
        choices=('auto', 'png', 'jpg', 'webp', 'tif', 'bmp'),
        help='format of the results; auto: that of each picture (default)',
    )
    command.add_argument('--overwrite', action='store_true', help='replace files that exist')
    command.add_argument('--list', action='store_true', help='only say what would be read and written')
    command.add_argument('--debug', action='store_true', help='show where in the code a picture failed')
    device = command.add_mutually_exclusive_group()
    _add_device(device)
    device.add_argument('-g', '--gpu-id', type=int, metavar='N', help='the same as --device cuda:N')
    command.add_argument('--precision', default='fp32', help='fp32, bf16 or fp16 (default: fp32)')
    command.add_argument(
        '-t',
        '--tile',
        default='auto',
        type=lambda text: text if text == 'auto' else int(text),
        help='side of tiles in pixels; auto: by memory; 0: none (default: auto)',
    )
    command.add_argument(
        '--overlap',
        default=32,
        type=int,
        help='pixels by which tiles reach over their own on each side, as --tile_pad elsewhere (default: 32)',
    )
    command.add_argument(
        '--conditioning',
        default='whole',
        help='whole: tiles share the statistics of the whole image; tile: faster, each has its own (default: whole)',
    )
    command.add_argument(
        '--strength', type=float, default=1.0, help='0 is the input, 1 the result, between them a blend (default: 1)'
    )
    text = 'keep light, contrast and colours, restore details alone: for pictures without haze and low light'
    command.add_argument('--keep-tones', action='store_true', help=text)
    text = 'first let the probes follow each picture for N steps: for noise unlike the training, not for light or haze'
    command.add_argument('--adapt', type=int, default=0, metavar='N', help=text)
    command.add_argument('--compare', action='store_true', help='also write NAME_compare.png, input and output')
    command.add_argument(
        '--maps',
        nargs='?',
        const='last',
        metavar='LAYER',
        help='also write NAME_maps.png, where each component of a CEA layer acts (default: of the last layer)',
    )


def _add_explain(commands: argparse._SubParsersAction) -> None:
    text = 'show where CEA looks in pictures, what each layer adds, and how far pictures are from each other'
    command = _add(commands, 'explain', text, _later('cea_arch.restoring.explain'))
    command.add_argument('inputs', type=path, nargs='+', metavar='PICTURE', help='files, folders or patterns')
    command.add_argument(
        '-o', '--output', type=path, default='explained', help='folder to write to (default: explained)'
    )
    _add_model(command)
    _add_device(command)
    command.add_argument('--layer', metavar='LAYER', help='whose probes and routing are drawn (default: the last one)')
    command.add_argument('--synthetic', action='store_true', help='degrade each picture first, by each kind in turn')
    text = 'with --synthetic: what is lost with so many components of each layer alone'
    command.add_argument('--keep', type=int, nargs='+', default=[], metavar='N', help=text)
    command.add_argument('--sheets', type=int, default=12, help='none for more pictures than so many (default: 12)')
    command.add_argument('--overwrite', action='store_true', help='replace files that exist')


def _add_device(command: argparse._ActionsContainer) -> None:
    command.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, mps (default: auto)')


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        '-m',
        '--model',
        type=path,
        default=PACKAGED_WEIGHTS,
        help='file of weights, .pth or .safetensors (default: CEA-IR-T as it comes with the package)',
    )
    _add_network(command)


def _add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument('-opt', type=path, help='option file whose network_g it is, where the weights do not say so')
    command.set_defaults(network_g=None)


def _add_export(commands: argparse._SubParsersAction) -> None:
    text = 'write a network for other programs, as ONNX or for torch.export, for pictures of any size'
    command = _add(commands, 'export', text, _later('cea_arch.interop.export'))
    command.add_argument('output', type=path, help='NAME.onnx, NAME.pt2 for torch.export, or NAME.safetensors')
    _add_model(command)
    command.add_argument('--fp16', action='store_true', help='half precision: half the file, for GPUs')
    command.add_argument('--overwrite', action='store_true', help='replace a file that exists')


def _add_demo(commands: argparse._SubParsersAction) -> None:
    text = 'open a page on this machine to try a network on pictures'
    command = _add(commands, 'demo', text, _later('cea_arch.interop.demo'))
    _add_model(command)
    _add_device(command)
    command.add_argument('--host', default='127.0.0.1', help='address to serve on (default: 127.0.0.1, this machine)')
    command.add_argument('--port', type=int, help='port to serve on (default: the first free one from 7860)')


def _add_profile(commands: argparse._SubParsersAction) -> None:
    text = 'measure what networks cost, the share of CEA, or a CEA layer alone, and print tables'
    command = _add(commands, 'profile', text, _later('cea_arch.profiling.command'))
    command.add_argument(
        '-opt', type=path, nargs='+', action='extend', default=[], help='option YAML files, for their network_g'
    )
    command.add_argument('--code', nargs='+', default=[], help="others, each 'NAME=FILE.py:Class(word=value)'")
    command.add_argument('--size', nargs='+', default=[], help="CEAIR's named sizes: base, S, T")
    command.add_argument('--without-cea', action='store_true', help='each network also without its CEA layers')
    command.add_argument('--pixels', nargs='+', type=int, default=[256], help='heights of square images (256)')
    command.add_argument('--train', action='store_true', help='forward and backward instead of inference')
    command.add_argument('--layers', choices=('type', 'stage'), help='also where time and MACs go, by type or by stage')
    command.add_argument('--layer', action='store_true', help='one adapted projection, its parts, and its block')
    for name, default in (('dim', 96), ('rank', 8), ('heads', 4)):
        command.add_argument(f'--{name}', type=int, default=default, help=f'of the layer with --layer ({default})')
    _add_device(command)
    precisions = ('fp32', 'bf16', 'fp16')
    command.add_argument('--precision', choices=precisions, default='fp32', help='bf16 and fp16: under autocast')
    command.add_argument('--batch', type=int, default=1, help='images at a time (1)')
    command.add_argument('--threads', nargs='+', type=int, default=[], help='numbers of threads to compare')
    command.add_argument('--busy', type=int, default=0, help='so many other processes compute meanwhile (0)')
    command.add_argument('--start', action='store_true', help='how long commands take to start, and nothing else')
    command.add_argument('--repeats', type=int, default=11, help='runs that count, after one that does not (11)')
    command.add_argument('--output', type=path, help='also write the figures to this JSON file')
