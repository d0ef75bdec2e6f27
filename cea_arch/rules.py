"""Rules for the values of options, as JSON schema: checked here, in sentences, and given to editors as they are.

Only the keywords that appear below are known.
"""

import inspect
import math
import operator
import os
import re
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from cea_arch.errors import UserError, raise_all, suggest

Rule = dict[str, Any]
TEXT: Rule = {'type': 'string'}
FLAG: Rule = {'type': 'boolean'}
NULL: Rule = {'type': 'null'}
ABSENT = 'absent'
ANY: Rule = {}
_TYPES = {'string': (str, os.PathLike), 'boolean': bool, 'integer': int, 'number': (int, float), 'null': type(None)}
_TYPES |= {'array': (list, tuple), 'object': dict}
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    'minimum': ('of at least', operator.ge),
    'exclusiveMinimum': ('above', operator.gt),
    'maximum': ('up to', operator.le),
    'exclusiveMaximum': ('below', operator.lt),
}
_MANY = 8  # names; beyond, the hint comes before them
_ANNOTATIONS = {int: {'type': 'integer'}, float: {'type': 'number'}, bool: FLAG, str: TEXT, type(None): NULL}


def whole(least: int = 1, most: int | None = None) -> Rule:
    return {'type': 'integer', 'minimum': least} | ({} if most is None else {'maximum': most})


def number(**bounds: float) -> Rule:
    """A number within JSON schema's ``minimum``, ``exclusiveMinimum``, ``maximum``, ``exclusiveMaximum``."""
    return {'type': 'number', **bounds}


def one_of(*words: str) -> Rule:
    return {'enum': list(words)}


def either(*rules: Rule) -> Rule:
    return {'anyOf': list(rules)}


def list_of(item: Rule, least: int = 1, most: int | None = None) -> Rule:
    return {'type': 'array', 'items': item, 'minItems': least} | ({} if most is None else {'maxItems': most})


def section(properties: Mapping[str, Rule], required: Iterable[str] = (), closed: bool = True) -> Rule:
    """A mapping of known keys, and of others too if it is not ``closed``."""
    return {
        'type': 'object',
        'properties': dict(properties),
        'required': list(required),
        'additionalProperties': not closed,
    }


def typed(rules: Mapping[str, Rule], key: str = 'type', hint: str = '') -> Rule:
    """A mapping whose entry ``key`` chooses one of ``rules`` for all of it; ``hint`` is said where it is another."""
    cases = [{'if': {'properties': {key: {'const': name}}}, 'then': rule} for name, rule in rules.items()]
    words = one_of(*rules) | ({'description': hint} if hint else {})
    return {'type': 'object', 'properties': {key: words}, 'required': [key], 'allOf': cases}


def arguments(
    target: Callable, table: Mapping[str, Rule] = types.MappingProxyType({}), given: Collection[str] = ()
) -> Rule:
    """The rule for a mapping of keyword arguments.

    Args:
        target: A class or function; its annotations say which kinds of values it takes, and nothing where it has none.
        table: Better rules for some arguments; for names that it does not have, too.
        given: Arguments that do not come from the mapping.
    """
    properties, required, closed = {'type': TEXT}, [], True
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD and is_foreign(target):
            closed = False  # it decides itself; those of basicsr take any word and do nothing with it
        if name in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        properties[name] = table.get(name, _of_annotation(parameter.annotation))
        if parameter.default is parameter.empty:
            required.append(name)
    return section(properties, required, closed)


def is_foreign(target: Callable) -> bool:
    """Whether a class or function is neither basicsr's nor ours."""
    return not target.__module__.startswith(('basicsr.', 'cea_arch.'))


def _of_annotation(annotation: Any) -> Rule:
    origin = get_origin(annotation) or annotation
    parts = get_args(annotation)
    if origin in (Union, types.UnionType):
        rules = [_of_annotation(part) for part in parts]
        return ANY if ANY in rules else either(*rules)
    if origin is Literal:
        return one_of(*parts)
    if isinstance(origin, type) and issubclass(origin, Sequence) and origin is not str:
        return {'type': 'array', 'items': _of_annotation(parts[0]) if parts else ANY}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {'type': 'object'}
    return _ANNOTATIONS.get(annotation, ANY)


def changes(rule: Rule, prefix: str) -> Rule:
    """The rule for what is merged into a mapping of ``rule``: nothing is required, and null removes.

    Args:
        rule: A rule of the functions above.
        prefix: Put before the names of definitions, for theirs.
    """
    if '$ref' in rule:
        head, slash, name = rule['$ref'].rpartition('/')
        return {'$ref': f'{head}{slash}{prefix}{name}'}
    loose = {key: value for key, value in rule.items() if key != 'required'}
    for key in ('properties', 'patternProperties'):
        if key in rule:
            loose[key] = {name: either(changes(inner, prefix), NULL) for name, inner in rule[key].items()}
    if isinstance(rule.get('additionalProperties'), dict):
        loose['additionalProperties'] = either(changes(rule['additionalProperties'], prefix), NULL)
    if 'anyOf' in rule:
        loose['anyOf'] = [changes(choice, prefix) for choice in rule['anyOf']]
    if 'allOf' in rule:  # no case applies where the entry that chooses is not there
        loose['allOf'] = [
            {'if': case['if'] | {'required': list(case['if']['properties'])}, 'then': changes(case['then'], prefix)}
            for case in rule['allOf']
        ]
    return loose


class Checker:
    """Checks values by rules.

    Args:
        definitions: The rules that ``$ref`` names.
        homes: For keys that stand in the wrong section, the right one.
        unread: By top section, '' for the whole file, unknown keys that do no harm.

    Attributes:
        passed_over: Labels of the unread keys that were found.
    """

    def __init__(
        self,
        definitions: Mapping[str, Rule] | None = None,
        homes: Mapping[str, str] | None = None,
        unread: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.definitions = definitions or {}
        self.homes = homes or {}
        self.unread = unread or {}
        self.passed_over: list[str] = []

    def check(self, value: Any, rule: Rule, label: str) -> None:
        """Raise UserError if ``value`` breaks ``rule``; it names ``label``, what was expected and what was found.

        Where it does so in several places they are :class:`UserErrors`.
        """
        mistakes: dict[str | None, UserError] = {}
        for error in self._mistakes(value, rule, label):
            mistakes.setdefault(error.label, error)
        raise_all(list(mistakes.values()))

    def _mistakes(self, value: Any, rule: Rule, label: str) -> Iterator[UserError]:
        rule = self._resolve(rule)
        choices = [self._resolve(choice) for choice in rule.get('anyOf', [rule])]
        fitting = next((choice for choice in choices if _fits(value, choice)), None)
        if fitting is None:
            yield UserError(f'{label or "the option file"}{_complaint(value, choices)}', label)
        elif isinstance(value, (list, tuple)):
            for place, item in enumerate(value):
                yield from self._mistakes(item, fitting.get('items', ANY), f'{label}[{place}]')
        elif isinstance(value, dict):
            yield from self._mistakes_of_section(value, fitting, label)

    def _resolve(self, rule: Rule) -> Rule:
        return self.definitions[rule['$ref'].rpartition('/')[2]] | rule if '$ref' in rule else rule

    def _mistakes_of_section(self, value: dict[str, Any], rule: Rule, label: str) -> Iterator[UserError]:
        known, others = rule.get('properties', {}), rule.get('additionalProperties', True)
        prefix = f'{label}.' if label else ''
        patterns = rule.get('patternProperties', {}) | ({'': others} if isinstance(others, dict) else {})
        wrong: list[str] = []
        if not others:
            unknown = [key for key in value if key not in known and _matching(key, patterns) is None]
            harmless = [key for key in unknown if key in self.unread.get(label.partition('.')[0], ())]
            self.passed_over += [f'{prefix}{key}' for key in harmless]
            wrong = [key for key in unknown if key not in harmless]
            for key in wrong:
                said, home = f'{label or "options"}: unknown key {key!r}', self.homes.get(key)
                hint = f' It belongs in {home}.' if home and home != label else suggest(key, sorted(known))
                words = f'.{hint} Known: {", ".join(sorted(known))}.' if key is wrong[0] else f'.{hint}'
                words = f': {rule["description"]}.' if 'description' in rule else words
                yield UserError(f'{said}{words}', f'{prefix}{key}')
        for key in () if wrong else rule.get('required', ()):  # what is missing may be there under a wrong name
            if value.get(key) is None:
                yield UserError(f'{prefix}{key} is missing.', f'{prefix}{key}')
        for key, item in value.items():
            found = known[key] if key in known else _matching(key, patterns) or ANY
            yield from self._mistakes(item, found, f'{prefix}{key}')
        for case in rule.get('allOf', ()):
            if all(value.get(key) == choice['const'] for key, choice in case['if']['properties'].items()):
                yield from self._mistakes_of_section(value, case['then'], label)


def describe(rule: Rule) -> str:
    """The rule in words."""
    if 'anyOf' in rule:
        return ' or '.join(describe(choice) for choice in rule['anyOf'] if choice != NULL)
    if 'enum' in rule:
        return f'{"one of " if len(rule["enum"]) > 1 else ""}{", ".join(map(str, rule["enum"]))}'
    kind = rule.get('type')
    if kind in ('integer', 'number'):
        said = [f'{word} {rule[bound]}' for bound, (word, _) in _BOUNDS.items() if bound in rule]
        return ' '.join(['a whole number' if kind == 'integer' else 'a number', ' and '.join(said)]).rstrip()
    if kind == 'array':
        least, most = rule.get('minItems', 0), rule.get('maxItems')
        size = f' of {most} values' if least == most else ' that is not empty' if least else ''
        return f'a list{size}' + (f', each {describe(rule["items"])}' if rule.get('items') else '')
    if kind == 'object':
        return 'a mapping of at least one name to its options' if rule.get('minProperties') else 'a mapping'
    return {'string': 'text', 'boolean': 'true or false', 'null': 'null'}[kind]


def _complaint(value: Any, choices: list[Rule]) -> str:
    words = [word for choice in choices for word in choice.get('enum', ())]
    names = sorted({str(word).removesuffix('_basicsr') for word in words})
    hint = suggest(value, names) if isinstance(value, str) else ''
    hint += ''.join(f' {choice["description"]}' for choice in choices if 'description' in choice)
    if len(names) > _MANY:
        return f': {_shown(value)} is not known.{hint} Known: {", ".join(names)}.'
    return f' must be {describe(either(*choices))}, got {_shown(value)}.{hint}'


def _fits(value: Any, rule: Rule) -> bool:
    """Whether a value is of the rule's kind and within its bounds; what is inside of it is not looked at."""
    if 'enum' in rule:
        return not isinstance(value, (bool, list, dict)) and value in rule['enum']
    kind = rule.get('type')
    if kind is None:
        return True
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != 'boolean'):
        return False
    if kind == 'array':
        return rule.get('minItems', 0) <= len(value) <= rule.get('maxItems', math.inf)
    if kind == 'object':
        return len(value) >= rule.get('minProperties', 0)
    return all(holds(value, rule[bound]) for bound, (_, holds) in _BOUNDS.items() if bound in rule)


def _matching(key: object, patterns: Mapping[str, Rule]) -> Rule | None:
    return next((rule for pattern, rule in patterns.items() if re.search(pattern, str(key))), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'


def differences(before: Mapping[str, Any], now: Mapping[str, Any], label: str = '') -> Iterator[str]:
    """Each option that is not as it was: ``train.total_iter: 200 (was 100)``."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, ABSENT), now.get(key, ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f'{label}{key}.')
        elif old != new:
            yield f'{label}{key}: {new} (was {old})'
