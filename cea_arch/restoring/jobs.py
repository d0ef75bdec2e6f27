"""What ``cea restore`` is to do: which files it reads, and what each is called in the output folder."""

import glob
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from cea_arch.data.image_store import walk_images
from cea_arch.data.pictures import FORMAT_OF
from cea_arch.restoring.video import ENCODERS

EXTRAS = ('compare', 'maps')


@dataclass(frozen=True)
class Job:
    """One picture: where it is, its path below the output folder, and the format to write if it is another one.

    Attributes:
        stem: How the names of what is written beside the result begin.
    """

    source: Path
    target: Path
    format: str | None = None
    stem: str = ''

    def extra(self, word: str) -> Path:
        """Path of the comparison or the maps."""
        return self.target.with_name(f'{self.stem or self.target.stem}_{word}.png')


@dataclass(frozen=True)
class Naming:
    """What is put at the end of names, and the extension of pictures, ``auto`` for their own."""

    suffix: str = ''
    ext: str = 'auto'

    def job(self, source: Path, target: Path) -> Job:
        """The job of a file that would be written to ``target`` under its own name; clips keep their extension."""
        keep = self.ext == 'auto' or target.suffix.lower() in ENCODERS
        ext = target.suffix if keep else f'.{self.ext}'
        return Job(source, target.with_name(f'{target.stem}{self.suffix}{ext}'), None if keep else FORMAT_OF[ext])


@dataclass
class Plan:
    """What :func:`find_jobs` found.

    Attributes:
        jobs: What to restore.
        failures: For each input that gives nothing, why.
        passed_over: How many pictures are left out since they are results of earlier runs.
    """

    jobs: list[Job]
    failures: list[str]
    passed_over: int = 0


def find_jobs(inputs: list[str], output: Path, recursive: bool, naming: Naming = Naming()) -> Plan:
    """What to restore: files by their names, the pictures of folders, and what patterns match."""
    jobs: dict[Path, Job] = {}
    plan = Plan([], [])
    for text in inputs:
        try:
            matches = [text] if Path(text).exists() else sorted(glob.glob(text))  # noqa: PTH207  Path's takes no absolute
        except OSError as error:
            plan.failures.append(f'{text}: {error.strerror}.')
            continue
        if not matches:
            plan.failures.append(f'{text} does not exist.')
        for path in map(Path, matches):
            found = _in_folder(path, output, recursive, naming, plan) if path.is_dir() else [(path, Path(path.name))]
            if not found:
                more = '' if recursive else '; -r looks into the folders below it'
                plan.failures.append(f'{path} holds no pictures{more}.')
            for source, relative in found:
                job = naming.job(source, output / relative)
                other = jobs.setdefault(job.target, job)
                if other.source != source:
                    plan.failures.append(f'{source}: {other.source} is written to {job.target} already.')
    # a.jpg and a.png are restored to two files, so what stands beside each is called after all of its name
    alike = Counter(target.with_suffix('') for target in jobs)
    plan.jobs = [
        replace(job, stem=job.target.name.replace('.', '_')) if alike[job.target.with_suffix('')] > 1 else job
        for job in jobs.values()
    ]
    return plan


def _in_folder(folder: Path, output: Path, recursive: bool, naming: Naming, plan: Plan) -> list[tuple[Path, Path]]:
    """Picture files in ``folder``, each with its path relative to it; not those that are results."""
    real = output.resolve()
    inside = folder.resolve() in real.parents
    closed: list[Path] = []
    paths = [
        p for p in walk_images(folder, recursive, closed) if not (inside and p.parent.resolve().is_relative_to(real))
    ]
    plan.failures += [f'{path} cannot be read: no permission, or a link to nowhere.' for path in closed]
    relative = {path: path.relative_to(folder) for path in paths}
    results = set()
    for path, below in relative.items():
        job = naming.job(path, output / below)
        places = [job.target] * bool(naming.suffix) + [job.extra(word) for word in EXTRAS]
        results |= {place.resolve() for place in places} - {path.resolve()}
    own = [(path, below) for path, below in relative.items() if path.resolve() not in results]
    plan.passed_over += len(relative) - len(own)
    return own
