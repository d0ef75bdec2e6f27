"""Rules for the values of options, and the sentences that break them."""

import copy

import pytest
from basicsr.archs.swinir_arch import SwinIR

from cea_arch.errors import UserError
from cea_arch.rules import ANY, Checker, arguments, either, list_of, number, section, typed, whole


def test_rules_of_a_signature():
    def build(images, width: int, scale: float = 1.0, names: list[str | int] | str = 'x', *, extra=None):
        pass

    rule = arguments(build, {'extra': whole()}, ('images',))
    for good in ({'width': 1}, {'width': 1, 'scale': 2, 'names': ['a', 1], 'extra': 3}, {'width': 2, 'names': 'b'}):
        Checker().check(good, rule, 'x')
    bad = {
        'x.width is missing': {},
        'x.width must be a whole number, got 1.5': {'width': 1.5},
        'x.width must be a whole number, got True': {'width': True},
        r'x.names must be a list, each text or a whole number or text, got True': {'width': 1, 'names': True},
        r'x.names\[0\] must be text or a whole number, got 0.5': {'width': 1, 'names': [0.5]},
        'x.extra must be a whole number of at least 1, got 0': {'width': 1, 'extra': 0},
        "x: unknown key 'rest'": {'width': 1, 'rest': 0},
    }
    for message, options in bad.items():
        with pytest.raises(UserError, match=message):
            Checker().check(options, rule, 'x')


def test_what_takes_any_word_decides_itself():
    def foreign(width: int, **rest):
        pass

    Checker().check({'width': 1, 'rest': 0}, arguments(foreign), 'x')
    with pytest.raises(UserError, match="x: unknown key 'rest'"):
        Checker().check({'type': 'SwinIR', 'rest': 0}, arguments(SwinIR), 'x')


def test_rules_by_type():
    rule = typed({'a': section({'type': ANY, 'n': either(number(maximum=1), list_of(whole()))}), 'b': section({})})
    Checker().check({'type': 'a', 'n': [1, 2]}, rule, 'x')
    for value, message in (
        ({'type': 'a', 'n': 2}, 'x.n must be a number up to 1 or a list that is not empty, each a whole number'),
        ({'type': 'a', 'n': []}, 'x.n must be a number up to 1 or a list that is not empty'),
        ({'type': 'c'}, "x.type must be one of a, b, got 'c'"),
        ({}, 'x.type is missing'),
        ([], r'x must be a mapping, got \[\]'),
        ({'type': 'a', 'n': float('nan')}, 'x.n must be a number up to 1 or'),
    ):
        with pytest.raises(UserError, match=message):
            Checker().check(copy.deepcopy(value), rule, 'x')


def test_of_many_mistakes_some_are_said_and_the_others_counted():
    with pytest.raises(UserError) as caught:
        Checker().check(dict.fromkeys('abcdefghijklmno', 'x'), {'type': 'object', 'additionalProperties': whole()}, '')
    said = str(caught.value).splitlines()
    assert said[0] == '15 mistakes:'
    assert said[1] == "  a must be a whole number of at least 1, got 'x'."
    assert said[-1] == '  and 3 more.'
    assert len(said) == 14
