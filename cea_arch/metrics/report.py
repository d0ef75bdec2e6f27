"""What scoring leaves behind: a markdown table, CSV and JSON with a row an image, and comparison pictures."""

import csv
import io
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np

from cea_arch.files import as_json, written_beside
from cea_arch.metrics.protocols import PROTOCOLS
from cea_arch.metrics.psnr_ssim_metric import uint8_bgr

PANELS = ('degraded', 'restored', 'clean')
PANEL_SIZE = (320, 480)  # at most, height and width in pixels
BAND = 26  # pixels for the words above a panel


@dataclass
class SetResult:
    """Scores of one validation set.

    Attributes:
        benchmark: Sets of one benchmark share a mean.
        group: So do sets of one group, such as ``single``, ``double`` and ``triple`` degradations.
        rows: For each image, its name and its scores by column, such as ``psnr`` and ``psnr_input``.
        picture: The first image's panels, BGR uint8.
        maps: Its routing by CEA layer, BGR uint8.
    """

    benchmark: str
    group: str | None = None
    rows: list[dict[str, str | float]] = field(default_factory=list)
    picture: np.ndarray | None = None
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """Mean over the images, by column."""
        columns = [name for name in self.rows[0] if name != 'image']
        return {name: float(np.mean([row[name] for row in self.rows])) for name in columns}


class Report:
    """Results of the latest validation, set by set; the files are complete whenever they are there.

    Args:
        folder: Where ``results.md``, ``.csv`` and ``.json``, ``comparison.png``, ``comparison/<set>.png`` and, if
            there are any, ``maps/<set>/<layer>.png`` go.
        title: First line of the table.
        metrics: Each metric's name and options, to be stated below the table.
        protocol: Name of the protocol of scoring, to be stated with the numbers.
    """

    def __init__(self, folder: str | Path, title: str, metrics: dict[str, dict], protocol: str | None = None) -> None:
        self.folder = Path(folder)
        self.title = title
        self.metrics = metrics
        self.protocol = protocol
        self.iteration: int | None = None
        self.sets: dict[str, SetResult] = {}

    def has(self, name: str, iteration: int | None) -> bool:
        """Whether the set's results of this iteration are there."""
        return iteration == self.iteration and name in self.sets

    def add(self, name: str, iteration: int | None, result: SetResult) -> None:
        """Take in one set's results, dropping those of other iterations."""
        if iteration != self.iteration:
            self.iteration, self.sets = iteration, {}
        self.sets[name] = result

    def write(self) -> None:
        """Write the files anew."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_beside(self.folder / 'results.md', self.markdown().encode())
        write_beside(self.folder / 'results.csv', self.csv().encode())
        write_beside(self.folder / 'results.json', self.json().encode())
        pictures = {name: result.picture for name, result in self.sets.items() if result.picture is not None}
        for name, picture in pictures.items():
            write_picture(self.folder / 'comparison' / f'{name}.png', picture)
        if pictures:
            write_picture(self.folder / 'comparison.png', stack(list(pictures.values())))
        for name, result in self.sets.items():
            for layer, sheet in result.maps.items():
                write_picture(self.folder / 'maps' / name / f'{layer}.png', sheet)

    def markdown(self) -> str:
        """The table: a row a set, a mean a group and a benchmark; and below it which pictures were made worse."""
        columns = list(dict.fromkeys(column for result in self.sets.values() for column in result.means()))
        protocol = f' ({self.protocol})' if self.protocol else ''
        lines = [f'# {self.title}, iteration {self.iteration}' if self.iteration is not None else f'# {self.title}', '']
        lines.append('| set | images | ' + ' | '.join(f'{c.replace("_", " ")}{protocol}' for c in columns) + ' |')
        lines.append('|---|---:|' + '---:|' * len(columns))
        lines += [_row(name, [result], columns) for name, result in self.sets.items()]
        for attribute in ('group', 'benchmark'):
            for title in dict.fromkeys(getattr(result, attribute) for result in self.sets.values()):
                members = [result for result in self.sets.values() if getattr(result, attribute) == title]
                lines += [_row(f'**mean of {title}**', members, columns)] if title else []
        lines += ['', '`input`: the degraded image scored in the same way. Means of sets, not of images.', '']
        lines += _harm(self.sets)
        if self.protocol:
            lines.append(f'Protocol {self.protocol}: {PROTOCOLS[self.protocol].text}.\n')
        for name, options in self.metrics.items():
            lines.append(f'- {name}: ' + ', '.join(f'{key} {value}' for key, value in options.items()))
        return '\n'.join(lines) + '\n'

    def json(self) -> str:
        """Everything in one object; ``cea report`` reads it. The PSNR of equal images is the text ``inf``."""
        sets = {}
        for name, result in self.sets.items():
            content = asdict(replace(result, picture=None, maps={}))
            sets[name] = {key: content[key] for key in ('benchmark', 'group', 'rows')} | {'means': result.means()}
        head = {'name': self.title, 'iteration': self.iteration, 'protocol': self.protocol, 'metrics': self.metrics}
        return as_json(head | {'sets': sets}, indent=1) + '\n'

    def csv(self) -> str:
        """One line an image: set, image, scores."""
        rows = [{'set': name, **row} for name, result in self.sets.items() for row in result.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _row(name: str, members: list[SetResult], columns: list[str]) -> str:
    """A row of the mean over sets, for the columns that all of them have."""
    means = [result.means() for result in members]
    cells = [_format(c, float(np.mean([m[c] for m in means]))) if all(c in m for m in means) else '' for c in columns]
    return f'| {name} | {sum(len(result.rows) for result in members)} | ' + ' | '.join(cells) + ' |'


def _harm(sets: dict[str, SetResult]) -> list[str]:
    """A table of how many pictures of each set have a lower PSNR than before, and of the one that gained least.

    Of pictures that were clean, whose PSNR was infinite, it is the one that is farthest from that.
    """
    lines = []
    for name, result in sets.items():
        if not all({'psnr', 'psnr_input'} <= row.keys() for row in result.rows):
            continue
        gains = [(_gain(row['psnr_input'], row['psnr']), row['psnr'], row['image']) for row in result.rows]
        change, psnr, image = min(gains)
        worse = sum(gain < 0 for gain, *_ in gains)
        change = 'clean' if math.isinf(change) else f'{change:+.2f}'
        lines.append(f'| {name} | {worse} of {len(gains)} | {image} | {psnr:.2f} | {change} |')
    head = ['| set | made worse | least gain | its psnr | change |', '|---|---:|---|---:|---:|']
    return [*head, *lines, ''] if lines else []


def _gain(before: float, after: float) -> float:
    return 0.0 if before == after else after - before


def _format(column: str, value: float) -> str:
    return f'{value:.2f}' if 'psnr' in column else f'{value:.4f}'


def compare(images: dict[str, np.ndarray], scores: dict[str, str | float]) -> np.ndarray:
    """Panels degraded | restored | clean, from RGB images in [0, 1], with the scores of the first two; BGR uint8."""
    captions = {name: [name] for name in images}
    for column, value in scores.items():
        panel = 'degraded' if column.endswith('_input') else 'restored'
        if isinstance(value, float) and panel in captions:
            captions[panel].append(f'{column.removesuffix("_input")} {value:.2f}')
    shown = [name for name, img in images.items() if img.shape == images['restored'].shape]
    return panels([uint8_bgr(images[name]) for name in shown], [', '.join(captions[name]) for name in shown])


def panels(images: list[np.ndarray], captions: list[str]) -> np.ndarray:
    """Put images side by side, each below its caption; large ones are centre-cropped.

    Args:
        images: BGR uint8 ``(H, W, 3)``, of one size.
        captions: One an image.
    """
    columns = []
    for img, caption in zip(images, captions, strict=True):
        top, left = (max(size - most, 0) // 2 for size, most in zip(img.shape[:2], PANEL_SIZE, strict=True))
        img = img[top : top + PANEL_SIZE[0], left : left + PANEL_SIZE[1]]
        band = np.full((BAND, img.shape[1], 3), 255, np.uint8)
        cv2.putText(band, caption, (4, BAND - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        columns.append(np.vstack([band, img]))
    return np.hstack(columns)


def stack(pictures: list[np.ndarray]) -> np.ndarray:
    """Put pictures below one another, filled up with white to one width."""
    width = max(picture.shape[1] for picture in pictures)
    fill = [((0, 0), (0, width - picture.shape[1]), (0, 0)) for picture in pictures]
    return np.vstack([np.pad(picture, f, constant_values=255) for picture, f in zip(pictures, fill, strict=True)])


def write_picture(path: Path, img: np.ndarray) -> None:
    """Write BGR uint8 as PNG, beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, cv2.imencode('.png', img)[1].tobytes())


def write_beside(path: Path, data: bytes) -> None:
    """Write a file so that the path never holds half of it."""
    with written_beside(path) as aside:
        aside.write_bytes(data)
