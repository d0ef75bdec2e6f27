"""The ``cea`` command: it parses, and then imports what the command needs."""

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cea_arch.compat import REMEDY, has_basicsr
from cea_arch.errors import Notice, UserError, told
from cea_arch.parser import build_parser

SPIN = '10000'  # how often a thread of libgomp looks for work before it sleeps; see docs/costs.md


def schema(args: argparse.Namespace) -> None:
    print(json.dumps(importlib.import_module('cea_arch.training.option_rules').editors_schema(), indent=1))


def score(args: argparse.Namespace) -> None:
    saved_images = importlib.import_module('cea_arch.metrics.saved_images')
    report = saved_images.score_saved_images(args.sets, args.protocol, args.output, args.lpips)
    print(f'{report.markdown()}\nWritten to {report.folder}.')


def report(args: argparse.Namespace) -> None:
    comparison = importlib.import_module('cea_arch.metrics.comparison')
    study_tables = importlib.import_module('cea_arch.metrics.study_tables')
    studies = {path: content for path in args.results if (content := study_tables.read_study(path))}
    if studies:
        others = [comparison.read_results(path) for path in args.results if path not in studies]
        if others or args.published:
            raise UserError(f'{next(iter(studies))} is a study.json, which only others of its kind may stand beside.')
        print('\n'.join(map(study_tables.tables, study_tables.merged([*studies.values()]))), end='')
        return
    methods = comparison.published(args.published) if args.published else []
    methods += [comparison.read_results(path) for path in args.results]
    if not methods:
        raise UserError('name result files, or a benchmark with --published.')
    print(comparison.side_by_side(methods), end='')


def modules(args: argparse.Namespace) -> None:
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


def merge(args: argparse.Namespace) -> None:
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
    except (FileExistsError, NotADirectoryError) as error:  # of folders that are to be made
        print(f'cea {args.command}: {error.filename}: expected a folder, but there is a file.', file=sys.stderr)
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
            with importlib.import_module('tqdm').tqdm.external_write_mode(sys.stderr):  # above a progress bar
                if issubclass(kind, Notice):
                    print(f'cea {command}: {message}', file=sys.stderr)
                else:
                    show(message, kind, *words)

        warnings.simplefilter('always', Notice)
        warnings.showwarning = show_notice
        yield


if __name__ == '__main__':
    sys.exit(main())
