"""The ``cea`` command: it parses, and then imports what the command needs."""

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import cea_arch
from cea_arch.compat import REMEDY, has_basicsr
from cea_arch.errors import Notice, UserError, told
from cea_arch.files import PACKAGED_WEIGHTS

path = os.path.expanduser  # `--output=~/x`: the shell leaves that as it is
SPIN = '10000'  # how often a thread of libgomp looks for work before it sleeps; see docs/costs.md


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
    _add(commands, 'modules', text, _modules).add_argument('-opt', type=path, required=True, help='option YAML file')
    text = 'make a whole checkpoint from a base network and the CEA layers that a run with freeze_base saved'
    command = _add(commands, 'merge', text, _merge)
    for name in ('base', 'cea', 'out'):
        command.add_argument(name, type=path, metavar=f'{name}.pth')
    for command in (
        train,
        test,
        *(commands.choices[name] for name in ('check', 'study', 'schema', 'score', 'report', 'modules')),
    ):
        command.set_defaults(needs_basicsr=True)
    _add_restore(commands)
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
    study.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='one training of each variant for each')
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
    study.add_argument('--jobs', type=int, default=1, help='trainings at a time')
    _add(commands, 'schema', 'print the JSON schema of option files, for editors', _schema)


def _add_score(commands: argparse._SubParsersAction) -> None:
    score = _add(commands, 'score', 'score images that any network has written to folders, by a named protocol', _score)
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
    report = _add(commands, 'report', 'put result files side by side, on request beside published figures', _report)
    text = 'results.json files of train, test or score, side by side; or study.json files, whose tables are printed'
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
    command.add_argument('--compare', action='store_true', help='also write NAME_compare.png, input and output')
    command.add_argument(
        '--maps',
        nargs='?',
        const='last',
        metavar='LAYER',
        help='also write NAME_maps.png, where each component of a CEA layer acts (default: of the last layer)',
    )


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


def _schema(args: argparse.Namespace) -> None:
    print(json.dumps(importlib.import_module('cea_arch.training.option_rules').editors_schema(), indent=1))


def _score(args: argparse.Namespace) -> None:
    saved_images = importlib.import_module('cea_arch.metrics.saved_images')
    report = saved_images.score_saved_images(args.sets, args.protocol, args.output, args.lpips)
    print(f'{report.markdown()}\nWritten to {report.folder}.')


def _report(args: argparse.Namespace) -> None:
    comparison = importlib.import_module('cea_arch.metrics.comparison')
    study_tables = importlib.import_module('cea_arch.metrics.study_tables')
    studies = [content for path in args.results if (content := study_tables.read_study(path))]
    if studies and len(studies) == len(args.results) and not args.published:
        print('\n'.join(map(study_tables.tables, studies)), end='')
        return
    methods = comparison.published(args.published) if args.published else []
    methods += [comparison.read_results(path) for path in args.results]
    if not methods:
        raise UserError('name result files, or a benchmark with --published.')
    print(comparison.side_by_side(methods), end='')


def _modules(args: argparse.Namespace) -> None:
    """Print each module's name, class, channels and layout, or why it cannot be a target."""
    options = importlib.import_module('cea_arch.training.options')
    network = options.read_network(args.opt, base=True)
    modules = importlib.import_module('cea_arch.layers').find_sites(network)
    widths = [max(len(word) for word in words) for words in zip(*((name, m.kind) for name, m in modules.items()))]
    for name, module in modules.items():
        mark = ' ' if module.problem else '*'
        said = module.problem or f'{module.layout} {module.dim} -> {module.dim_out}'
        print(f'{mark} {name:<{widths[0]}}  {module.kind:<{widths[1]}}  {said}')
    print('Those with * can be targets: bchw are images, bnc tokens; channels in and out.')


def _merge(args: argparse.Namespace) -> None:
    count = importlib.import_module('cea_arch.networks.with_cea').merge(args.base, args.cea, args.out)
    print(f'{args.out}: {count} weights.')


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, its own, 2 for a user's mistake, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # names of files that the terminal's encoding lacks
            stream.reconfigure(errors='backslashreplace')
    if 'OMP_WAIT_POLICY' not in os.environ:  # read when torch is loaded
        os.environ.setdefault('GOMP_SPINCOUNT', SPIN)
    try:
        with _notices_as_lines(args.command):
            return _run(args)
    except UserError as error:
        print(f'cea {args.command}: {error}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # as with `| head`; what is left must not be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        hint = (
            ' The same command with --auto_resume goes on from the last checkpoint.' if args.command == 'train' else ''
        )
        print(f'\ncea {args.command}: interrupted.{hint}', file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.needs_basicsr:
        _import_basicsr()
    if args.plugin:
        importlib.import_module('cea_arch.plugins').load_plugins(args.plugin)
    if 'network_g' in args and args.opt:
        args.network_g = importlib.import_module('cea_arch.training.option_files').network_section(args.opt)
    code = args.call(args) or 0
    sys.stdout.flush()
    return code


def _import_basicsr() -> None:
    if not has_basicsr():
        raise UserError(REMEDY)
    try:
        importlib.import_module('basicsr')
    except UserError:
        raise
    except Exception as error:  # of whatever goes by this name
        raise UserError(f'basicsr cannot be imported: {told(error)}. `cea doctor` says which one it is.') from error


@contextmanager
def _notices_as_lines(command: str) -> Iterator[None]:
    """Print notices as the command's own lines; other people's warnings stay as they are."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_notice(message: Warning, kind: type, *words: Any) -> None:
            if issubclass(kind, Notice):
                print(f'cea {command}: {message}', file=sys.stderr)
            else:
                show(message, kind, *words)

        warnings.simplefilter('always', Notice)
        warnings.showwarning = show_notice
        yield


if __name__ == '__main__':
    sys.exit(main())
