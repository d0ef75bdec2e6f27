"""Find image sets in folders by looking at what lies where."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from cea_arch.data.benchmarks import ImageSet, Layout, path_patterns
from cea_arch.data.image_store import walk_files, walk_images
from cea_arch.data.pictures import SUFFIXES
from cea_arch.errors import UserError

ABOVE = 3
ARCHIVES = ('.zip', '.tar', '.tar.gz', '.tgz', '.tar.xz', '.tar.bz2', '.7z', '.rar', '.part1', '.001')
_TEST = re.compile('(?:^|/)test/')


@dataclass
class Found:
    """A set and the files that were recognised as its own.

    Attributes:
        layout: None where nothing was found.
        files: By role and name, without suffix.
        copies: ``(another file, the one in files)`` of one role and name.
        others: Other layouts in which images were found; they are left aside.
    """

    image_set: ImageSet
    layout: Layout | None = None
    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    copies: list[tuple[Path, Path]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    @property
    def expected(self) -> int:
        return (self.layout and self.layout.expected) or self.image_set.expected

    @property
    def store(self) -> str:
        return (self.layout and self.layout.store) or self.image_set.store

    @property
    def title(self) -> str:
        return f'{self.image_set.name} ({self.image_set.split})'


@dataclass
class Places:
    """What lies below the folders that were given.

    Attributes:
        images: The image files by the path of their folder, with a ``/`` at its end.
        archives: Files that are not unpacked.
        closed: Folders that may not be read.
    """

    images: dict[str, list[Path]] = field(default_factory=dict)
    archives: list[Path] = field(default_factory=list)
    closed: list[Path] = field(default_factory=list)


def scan(folders: Iterable[Path]) -> Places:
    """Look what lies below ``folders``.

    The paths of folders begin with the names of the given folder and of those above it, ``ABOVE`` in all: so a set is
    recognised from within, too. What is hidden is passed over, and links are followed, see
    :func:`cea_arch.data.image_store.walk_files`.

    Raises:
        UserError: A folder does not exist.
    """
    places, seen = Places(), set()  # of resolved folders: two given ones may overlap
    for root in folders:
        if not root.is_dir():
            raise UserError(f'folder {str(root)!r} does not exist (looked for {root.absolute()}).')
        root = root.resolve()
        for path in walk_files(root, seen=seen, closed=places.closed):
            if path.name.lower().endswith(ARCHIVES):
                places.archives.append(path)
            elif path.suffix.lower() in SUFFIXES:
                place = Path(*root.parts[1:][-ABOVE:], path.parent.relative_to(root)).as_posix() + '/'
                places.images.setdefault(place, []).append(path)
    return places


def unclaimed(places: Places, claimed: set[Path], absent: list[ImageSet]) -> list[str]:
    """Folders with images that are of no set, each with the layout that it is nearest to, in sentences."""
    said = []
    wanted = {pattern: one for one in absent for layout in one.layouts for pattern in (layout.gt, layout.lq) if pattern}
    for place, paths in places.images.items():
        if any(path in claimed for path in paths):
            continue
        end = '/'.join(place.lower().rstrip('/').split('/')[-ABOVE:])
        near = difflib.get_close_matches(f'{end}/*', wanted, n=1, cutoff=0.5)
        hint = f'; nearest: {wanted[near[0]].name} ({wanted[near[0]].split}), looked for in {near[0]}' if near else ''
        gamma = '; the papers use the frames of blur, not these' if end.endswith('blur_gamma') else ''
        said.append(f'{paths[0].parent} holds {len(paths):,} images that fit no set{gamma or hint}')
    return said


def by_hand(image_set: ImageSet, gt: Path, lq: Path | None = None) -> Found:
    """The set whose folders a user has named."""
    found = Found(image_set, Layout('by hand', str(gt), str(lq or '')))
    if (lq is None) != (len(image_set.roles) == 1):
        raise UserError(f'--set {image_set.name}: its folders are those of {" and ".join(image_set.roles)}.')
    for role, folder in zip(image_set.roles, (gt, lq)):
        if not folder.is_dir():
            raise UserError(f'--set {image_set.name}: folder {str(folder)!r} does not exist.')
        found.files[role] = _by_key(found, ((path.stem, path) for path in walk_images(folder)))
    return found


def recognise(image_set: ImageSet, places: Places) -> Found:
    """The layout of ``image_set`` that the most files fit, first of all in the most roles."""
    candidates = [_collect(image_set, layout, places.images) for layout in image_set.layouts]
    candidates = [found for found in candidates if found.files]
    if not candidates:
        return Found(image_set)
    best = max(candidates, key=lambda found: (len(found.files), sum(map(len, found.files.values()))))
    best.others = [found.layout.name for found in candidates if found is not best and _holds_more(found, best)]
    return best


def _holds_more(found: Found, best: Found) -> bool:
    taken = {path for names in best.files.values() for path in names.values()}
    taken |= {path for path, _ in best.copies}
    return any(path not in taken for names in found.files.values() for path in names.values())


def _collect(image_set: ImageSet, layout: Layout, places: dict[str, list[Path]]) -> Found:
    found = Found(image_set, layout)
    for role in image_set.roles:
        folder, name = path_patterns(layout.gt if role == image_set.roles[0] else layout.lq, role)
        fitting = (place for place in places if folder.fullmatch(place) and _may_hold(image_set, layout, place))
        paths = (path for place in fitting for path in places[place] if name.fullmatch(path.stem))
        names = _by_key(found, ((_key(path, layout), path) for path in paths))
        if names:
            found.files[role] = names
    return found


def _key(path: Path, layout: Layout) -> str:
    return f'{path.parent.parent.name}_{path.stem}' if layout.nested else path.stem


def _by_key(found: Found, files: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """The first file of each key; others of the same key become copies."""
    names: dict[str, Path] = {}
    for key, path in files:
        if names.setdefault(key, path) is not path:
            found.copies.append((path, names[key]))
    return names


def _may_hold(image_set: ImageSet, layout: Layout, place: str) -> bool:
    """Training sets are not below a folder ``test``, unless their layout says so."""
    return image_set.split == 'test' or 'test' in layout.gt or not _TEST.search(place.lower())
