"""Who may import whom: a folder of the package imports from those below it, never from those above."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / 'cea_arch'
# modules that several rooms stand on
GROUND = ('errors', 'importing', 'files', 'rules', 'distributed', 'compat', 'checkpoints', 'plugins', 'threads')
FLOORS = (
    ('layers', *GROUND),
    ('networks',),
    ('data', 'losses'),
    ('metrics', 'restoring'),
    ('models', 'interop'),
    ('archs',),
    ('training',),
    ('profiling',),
    ('doctor',),
    ('parser',),
    ('cli',),
    ('train', 'test', '__init__'),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path) -> set[str]:
    """Rooms of the package that a file imports from, at its top, within functions, or by name."""
    text = path.read_text('utf-8')
    names = set(re.findall(r"import_module\('cea_arch\.(\w+)", text))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == 'cea_arch':
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('cea_arch.'):
            names.add(node.module.split('.')[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split('.')[1] for alias in node.names if alias.name.startswith('cea_arch.')}
    return names


@pytest.mark.parametrize('path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_from_below(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    above = {name for name in imported(path) - {room} if FLOOR[name] > FLOOR[room]}
    beside = {name for name in imported(path) - {room, *GROUND} if FLOOR[name] == FLOOR[room] and room not in GROUND}
    assert not above, f'{room} is below {above}'
    assert not beside, f'{room} is beside {beside}'
