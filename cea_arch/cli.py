"""The ``cea`` command."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable

import cea_arch
from cea_arch import doctor
from cea_arch.checkpoints import merge
from cea_arch.compat import HAS_BASICSR, REMEDY
from cea_arch.errors import UserError
from cea_arch.interop import demo, export
from cea_arch.layers import find_sites
from cea_arch.profiling import command as profiling
from cea_arch.restoring import command as restoring


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='cea', description='Continuous Expert Assembly for image restoration.')
    parser.add_argument('--version', action='version', version=f'cea_arch {cea_arch.__version__}')
    commands = parser.add_subparsers(dest='command', required=True)
    text = 'train a network as an option file says; results go to experiments/<name> and tb_logger/<name>'
    train = _add(commands, 'train', text, _run_pipeline)
    text = 'score trained weights on the data sets of an option file; results go to results/<name>'
    test = _add(commands, 'test', text, _run_pipeline)
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
    _add(commands, 'modules', text, _modules).add_argument('-opt', required=True, help='option YAML file')
    text = 'make a whole checkpoint from a base network and the CEA layers that a run with freeze_base saved'
    command = _add(commands, 'merge', text, _merge)
    for name in ('base', 'cea', 'out'):
        command.add_argument(name, metavar=f'{name}.pth')
    for command in (
        train,
        test,
        *(commands.choices[name] for name in ('check', 'study', 'schema', 'score', 'report', 'modules')),
    ):
        command.set_defaults(needs_basicsr=True)
    restore = _add(commands, 'restore', 'restore picture files, folders of them, or patterns', restoring.run)
    restoring.add_arguments(restore)
    text = 'write a network for other programs, as ONNX or for torch.export, for pictures of any size'
    export.add_arguments(_add(commands, 'export', text, export.run))
    demo.add_arguments(_add(commands, 'demo', 'open a page on this machine to try a network on pictures', demo.run))
    text = 'measure what networks cost, the share of CEA, or a CEA layer alone, and print tables'
    profiling.add_arguments(_add(commands, 'profile', text, profiling.run))
    _add(commands, 'doctor', 'say what is installed, what is not right, and what to do about it', doctor.run)
    info = _add(commands, 'info', 'say what a file of weights holds', doctor.show_weights)
    info.add_argument('file', help='.pth or .safetensors')
    return parser


def _add(
    commands: argparse._SubParsersAction, name: str, text: str, call: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(call=call, needs_basicsr=False)
    return command


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument('-opt', required=True, help='option YAML file')
    command.add_argument('--root', default='.', help='folder that holds experiments/ and results/ (default: this one)')
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
    check = _add(commands, 'check', text, _check)
    _add_options(check)
    check.add_argument('--steps', type=int, default=2, help='how many steps to take; 0: none')
    check.add_argument('--processes', type=int, default=1, help='of the launcher, for batch and epochs')
    check.add_argument('--allow-missing', action='store_true', help='exit with 0 though data or weights are missing')
    text = 'train a CEAIR and its ablations, as the paper names them, for several seeds, and compare'
    study = _add(commands, 'study', text, lambda args: importlib.import_module('cea_arch.training.study').run(args))
    _add_options(study)
    study.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], help='one training of each variant for each')
    study.add_argument(
        '--variants',
        nargs='+',
        default=None,
        help='ablations: cea (as the file says), none, q, k, v, qk, qkv, ffn, mixer, mixed, fuse, static, pooled, '
        'topk, static_topk, no_rank_norm, r4, r16, scale, none_scale (default: none static pooled topk cea)',
    )
    study.add_argument('--match', action='store_true', help='equal parameters, by wider or narrower feed-forwards')
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
    score.add_argument('--output', required=True, help='folder for results.md, .csv, .json and the pictures')


def _add_report(commands: argparse._SubParsersAction) -> None:
    report = _add(commands, 'report', 'put result files side by side, on request beside published figures', _report)
    report.add_argument('results', nargs='*', help='results.json files of train, test or score')
    report.add_argument('--published', metavar='BENCHMARK', help='add the published rows: aio3, aio5 or cdd11')


def _run_pipeline(args: argparse.Namespace) -> int:
    return importlib.import_module('cea_arch.training.pipeline').run(args)


def _check(args: argparse.Namespace) -> int:
    return importlib.import_module('cea_arch.training.check').run(args)


def _schema(args: argparse.Namespace) -> None:
    print(json.dumps(importlib.import_module('cea_arch.training.option_rules').options_schema(), indent=1))


def _score(args: argparse.Namespace) -> None:
    saved_images = importlib.import_module('cea_arch.metrics.saved_images')
    report = saved_images.score_saved_images(args.sets, args.protocol, args.output)
    print(f'{report.markdown()}\nWritten to {report.folder}.')


def _report(args: argparse.Namespace) -> None:
    comparison = importlib.import_module('cea_arch.metrics.comparison')
    methods = comparison.published(args.published) if args.published else []
    methods += [comparison.read_results(path) for path in args.results]
    if not methods:
        raise UserError('name result files, or a benchmark with --published.')
    print(comparison.side_by_side(methods), end='')


def _modules(args: argparse.Namespace) -> None:
    """Print each module's name, class, channels and layout, or why it cannot be a target."""
    options = importlib.import_module('cea_arch.training.options')
    modules = find_sites(options.read_network(args.opt, base=True))
    widths = [max(len(word) for word in words) for words in zip(*((name, m.kind) for name, m in modules.items()))]
    for name, module in modules.items():
        mark = ' ' if module.problem else '*'
        said = module.problem or f'{module.layout} {module.dim} -> {module.dim_out}'
        print(f'{mark} {name:<{widths[0]}}  {module.kind:<{widths[1]}}  {said}')
    print('Those with * can be targets: bchw are images, bnc tokens; channels in and out.')


def _merge(args: argparse.Namespace) -> None:
    count = merge(args.base, args.cea, args.out)
    print(f'{args.out}: {count} weights.')


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, its own, 2 for a user's mistake, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    if not HAS_BASICSR and args.needs_basicsr:
        print(f'cea {args.command}: {REMEDY}', file=sys.stderr)
        return 2
    try:
        return args.call(args) or 0
    except UserError as error:
        print(f'cea {args.command}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = (
            ' The same command with --auto_resume goes on from the last checkpoint.' if args.command == 'train' else ''
        )
        print(f'\ncea {args.command}: interrupted.{hint}', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
