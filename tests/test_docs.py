"""README and docs: short enough, links that lead somewhere, commands that the program takes."""

import re
import shlex

import pytest

from cea_arch.cli import build_parser
from tests.conftest import ROOT

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]
INSTALL = 'python3 -m venv .venv'  # README's two commands are one line each, to be pasted


def commands():
    """The lines of shell blocks that call ``cea``, continued lines joined."""
    for page in PAGES:
        for block in re.findall(r'```sh\n(.*?)```', page.read_text('utf-8'), re.S):
            for line in block.replace('\\\n', ' ').splitlines():
                words = shlex.split(line.partition(' > ')[0], comments=True)
                if words[:1] == ['cea']:
                    yield pytest.param(words[1:], id=f'{page.name}: {line[:60]}')


def test_readme_is_short():
    lines = [line for line in PAGES[0].read_text('utf-8').splitlines() if not line.startswith(INSTALL)]
    assert len(lines) <= 158
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\((?!https?:)([^)#]+)', page.read_text('utf-8'))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize('words', list(commands()))
def test_commands_parse(words):
    build_parser().parse_args(words)


def test_option_files_that_are_named_exist():
    for page in PAGES:
        named = set(re.findall(r'\boptions/[\w/]+\.yml', page.read_text('utf-8')))
        assert [name for name in named if not (ROOT / name).is_file()] == [], page.name
