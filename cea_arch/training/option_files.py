"""Option files as they are written: read safely, with what they inherit and what was set; each key's place is kept."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from cea_arch.errors import UserError, UserErrors, suggest
from cea_arch.files import written_beside
from cea_arch.plugins import load_plugins, loaded_plugins

_EXPONENT = re.compile(r'^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$')
_HINTS = {  # to what PyYAML says
    "expected ':'": 'a colon wants a space after it',
    'mapping values are not allowed': 'the colon of the line before may want a space after it',
    'expected <block end>': 'its indentation fits none of the lines above',
    'could not determine a constructor': 'plain YAML alone is read',
}
_FLOAT = 'tag:yaml.org,2002:float'


class OptionLoader(yaml.SafeLoader):
    """Safe YAML (no Python tags), no key twice; ``1e-3`` is the number that everybody means, as in YAML 1.2."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    problem = f'the key {key.value!r} stands in line {lines[key.value]} already'
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """A float; of whole numbers with an exponent or no point, such as ``!!float 5e3`` iterations, an int."""
        value = super().construct_yaml_float(node)
        exact = 'e' in node.value.lower() or '.' not in node.value
        return int(value) if exact and value.is_integer() else value


class OptionDumper(yaml.SafeDumper):
    """Writes what :class:`OptionLoader` reads back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


OptionLoader.add_constructor(_FLOAT, OptionLoader.construct_yaml_float)
for _class in (OptionLoader, OptionDumper):
    _class.add_implicit_resolver(_FLOAT, _EXPONENT, list('-+.0123456789'))


class Options(dict):
    """Options, and the places that said them.

    Args:
        file: The option file.
        said: What was read, later over earlier: its name, and by the label of each key its line, ``None`` in a setting.
    """

    def __init__(self, file: str, said: list[tuple[str, dict[str, int | None]]]) -> None:
        super().__init__()
        self.file = file
        self.said = said

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Let errors about an option begin with the file and line, or the setting, that said it."""
        try:
            yield
        except UserErrors as error:
            raise UserErrors([self._placed(each) for each in error.each]) from error
        except UserError as error:
            raise self._placed(error) from error

    def _placed(self, error: UserError) -> UserError:
        return error if error.label is None else UserError(f'{self.place(error.label)}: {error}')

    def place(self, label: str) -> str:
        """Of the option, or of the section around it that was said."""
        while label:
            for name, lines in reversed(self.said):
                if label in lines:
                    return f'{name}, line {lines[label]}' if lines[label] else name
            label = label[: max(label.rfind('.'), label.rfind('['), 0)]
        return self.file


def load_options(path: str, inherited_by: tuple[str, ...] = ()) -> Options:
    """Read an option file and, below it, those that ``inherits`` names, later over earlier.

    Mappings are merged key by key, everything else takes the place of what was inherited, and ``~`` removes it.

    Args:
        path: The file; those that it inherits, and files of plugins, are looked for from its folder.
        inherited_by: The files that led to it.

    Raises:
        UserError: Names file and line, what was expected and what was found.
    """
    path = os.path.normpath(path)
    content, lines = _read(path)
    if not isinstance(content, dict):
        raise UserError(
            f'{path}: name is missing.' if content is None else f'{path} must hold a mapping, got {content!r}.'
        )
    names = content.pop('inherits', None) or []
    names = names if isinstance(names, list) else [names]
    if isinstance(plugins := content.get('plugins'), list):
        folder = Path(path).parent.absolute()
        content['plugins'] = [str(folder / p) if str(p).endswith('.py') else p for p in plugins]
    opt = Options(path, [])
    where = f'{path}, line {lines["inherits"]}' if names else path
    for name in names:
        if not isinstance(name, str):
            raise UserError(f'{where}: inherits must name option files, got {name!r}.')
        file = os.path.normpath(Path(path).parent / name)
        if Path(file).resolve() in [Path(other).resolve() for other in (path, *inherited_by)]:
            raise UserError(
                f'{where}: {file} inherits itself, by {" and ".join(dict.fromkeys((path, *inherited_by)))}.'
            )
        if not Path(file).is_file():
            raise UserError(f'{where}: inherits {name!r}, but there is no {file}.{_hint(file)}')
        base = load_options(file, (path, *inherited_by))
        _merge(opt, base)
        opt.said += base.said
    _merge(opt, content) if names else opt.update(content)
    opt.said.append((path, lines))
    return opt


def network_section(path: str) -> dict[str, Any]:
    """What an option file says of its ``network_g``, with its plugins imported; the rest of it is not checked.

    Raises:
        UserError: As :func:`load_options`, or there is no such section.
    """
    opt = load_options(path)
    with opt.placing():
        import_plugins(opt)
        if not isinstance(opt.get('network_g'), dict):
            found = f', got {opt["network_g"]!r}' if 'network_g' in opt else ': it is missing'
            raise UserError(f'network_g must be a mapping with a type{found}.', 'network_g')
    return opt['network_g']


def import_plugins(opt: dict[str, Any]) -> None:
    """Import what ``plugins`` names; what has been imported otherwise is added to it, so that it is stored."""
    plugins = opt.get('plugins') or []
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise UserError(f'plugins must be a list of modules or files, got {plugins!r}.', 'plugins')
    try:
        load_plugins(plugins, 'plugins')
    except UserError as error:
        raise UserError(str(error), 'plugins') from error
    if loaded := loaded_plugins():
        opt['plugins'] = loaded


def apply_setting(opt: Options, entry: str, separator: str) -> None:
    """Apply a setting such as ``train.total_iter=100``; whether its last key is known is for the rules to say."""
    path, equals, text = entry.partition('=')
    keys = [key.strip() for key in path.split(separator)]
    if not equals or not all(keys):
        raise UserError(f'setting {entry!r} must read like train{separator}total_iter=100.')
    try:
        value, lines = _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f'setting {entry!r}{_problem(error, text)}') from error
    place: Any = opt
    label = ''
    for depth, key in enumerate(keys):
        where = separator.join(keys[:depth]) or 'the option file'
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise UserError(f'setting {entry!r}: {where} has {len(place)} items, counted from 0; got {key!r}.')
            key, label = int(key), f'{label}[{key}]'
        else:
            label = f'{label}.{key}' if label else key
        if depth == len(keys) - 1:
            if value is None and isinstance(place, dict):
                _merge(place, {key: None})  # as in a file that inherits
            else:
                place[key] = value
        elif isinstance(place, dict) and not isinstance(place.get(key), (dict, list)):
            hint = suggest(key, place) if key not in place else ''
            raise UserError(f'setting {entry!r}: {where} has no section {key!r}.{hint}')
        else:
            place = place[key]
    inside = {f'{label}{"" if name[:1] == "[" else "."}{name}': None for name in lines}
    opt.said.append((f'setting {entry!r}', {label: None, **inside}))


def write_options(opt: dict[str, Any], path: str | os.PathLike, header: str) -> None:
    """Write options so that :func:`read_options` gives the same again, below ``header`` as a comment.

    In ASCII, as BasicSR reads it in the encoding of the place.
    """
    comment = ''.join(f'# {line}\n' for line in header.splitlines())
    text = yaml.dump(dict(opt), Dumper=OptionDumper, sort_keys=False, default_flow_style=None, width=120)
    with written_beside(path) as aside:
        aside.write_bytes((comment + text).encode('ascii', 'backslashreplace'))


def _read(path: str) -> tuple[Any, dict[str, int]]:
    file = Path(path)
    if not file.is_file():
        raise UserError(f'option file {path!r} does not exist.{_hint(path)}')
    data = file.read_bytes()
    try:
        text = data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b'\n') + 1
        raise UserError(
            f'{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8.'
        ) from error
    try:
        return _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f'{path}{_problem(error, text)}') from error


def _hint(path: str) -> str:
    folder = Path(path).parent
    return suggest(path, [str(p) for p in folder.glob('*.yml')] if folder.is_dir() else [])


def _parse(text: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML text, and the line of each key and item by its label."""
    loader = OptionLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        value = loader.construct_document(node)
        return value, dict(_lines(node, ''))
    finally:
        loader.dispose()


def _lines(node: yaml.Node, label: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f'{label}.{key.value}' if label else str(key.value)
            yield name, key.start_mark.line + 1
            yield from _lines(value, name)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield f'{label}[{number}]', item.start_mark.line + 1
            yield from _lines(item, f'{label}[{number}]')


def _merge(onto: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(onto.get(key), dict):
            _merge(onto[key], value)
        elif value is None and key in onto:
            del onto[key]
        else:
            onto[key] = deepcopy(value)


def _problem(error: yaml.YAMLError, text: str) -> str:
    """One sentence for what PyYAML says in several lines."""
    mark = getattr(error, 'problem_mark', None)
    if mark is None:
        return f': {" ".join(str(error).split())}.'
    problem = error.problem
    if "expected ':'" in problem and error.context_mark:
        mark = error.context_mark
    if text[mark.index : mark.index + 1] == '\t':
        problem = 'there is a tab; YAML is indented by spaces alone'
    problem = next((f'{problem}; {hint}' for said, hint in _HINTS.items() if said in problem), problem)
    line = text.splitlines()[mark.line].strip() if mark.line < len(text.splitlines()) else 'the end of the file'
    return f', line {mark.line + 1} ({line}): {problem}.'
