"""The ``cea`` command."""

import argparse
import sys

import cea_arch
from cea_arch.checkpoints import merge
from cea_arch.compat import HAS_BASICSR, REMEDY
from cea_arch.errors import UserError
from cea_arch.layers import survey_modules

COMMANDS = {
    'train': 'train a network as an option file says; results go to experiments/<name> and tb_logger/<name>',
    'test': 'score trained weights on the data sets of an option file; results go to results/<name>',
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='cea', description='Continuous Expert Assembly for image restoration.')
    parser.add_argument('--version', action='version', version=f'cea_arch {cea_arch.__version__}')
    commands = parser.add_subparsers(dest='command', required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument('-opt', required=True, help='option YAML file')
        command.add_argument(
            '--root', default='.', help='folder that holds experiments/ and results/ (default: this one)'
        )
        command.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='job launcher')
        command.add_argument('--local_rank', '--local-rank', type=int, default=0, help='given by launchers, not by you')
        command.add_argument(
            '--force_yml', nargs='+', metavar='A:B=C', help='set options, such as train:total_iter=100'
        )
        if name == 'train':
            command.add_argument('--auto_resume', action='store_true', help='go on from the last training state')
            command.add_argument('--debug', action='store_true', help='validate and save every 8 iterations')
    text = (
        'list the modules of network_g, or of its base, with output shape and layout: which can be targets of WithCEA'
    )
    command = commands.add_parser('modules', help=text, description=text)
    command.add_argument('-opt', required=True, help='option YAML file')
    text = 'make a whole checkpoint from a base network and the CEA layers that a run with freeze_base saved'
    command = commands.add_parser('merge', help=text, description=text)
    for name in ('base', 'cea', 'out'):
        command.add_argument(name, metavar=f'{name}.pth')
    return parser


def list_modules(args: argparse.Namespace) -> None:
    """Print each module's name, class, output shape for two images, and layout or why it cannot be a target."""
    from cea_arch.options import read_base_network

    modules = survey_modules(read_base_network(args.opt))
    widths = [max(len(word) for word in words) for words in zip(*((name, m.kind) for name, m in modules.items()))]
    for name, module in modules.items():
        mark = ' ' if module.problem else '*'
        said = module.problem or f'{module.layout} {module.shape}'
        print(f'{mark} {name:<{widths[0]}}  {module.kind:<{widths[1]}}  {said}')
    print('Those with * can be targets; shapes are for two images.')


def merge_checkpoints(args: argparse.Namespace) -> None:
    count = merge(args.base, args.cea, args.out)
    print(f'{args.out}: {count} weights.')


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    args = build_parser().parse_args(argv)
    if not HAS_BASICSR:
        print(f'cea {args.command}: {REMEDY}', file=sys.stderr)
        return 2
    from cea_arch.pipeline import run

    runs = {'modules': list_modules, 'merge': merge_checkpoints}
    try:
        runs.get(args.command, run)(args)
    except UserError as error:
        print(f'cea {args.command}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = (
            ' The same command with --auto_resume goes on from the last checkpoint.' if args.command == 'train' else ''
        )
        print(f'\ncea {args.command}: interrupted.{hint}', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
