"""A training's curves: what TensorBoard is told of its speed, and a picture of losses and scores at its end."""

import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from basicsr.utils import MessageLogger, get_root_logger
from basicsr.utils.dist_util import master_only
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from cea_arch import distributed
from cea_arch.metrics.report import write_picture

Curve = tuple[np.ndarray, np.ndarray]
PANEL = (260, 480)  # height and width of a panel, in pixels
MARGINS = (30, 24, 70, 16)  # of its axes: top, bottom, left, right
COLOURS = [(180, 119, 31), (14, 127, 255), (44, 160, 44), (40, 39, 214), (189, 103, 148), (75, 86, 140)]  # BGR
TICKS = 4


class ProgressLogger(MessageLogger):
    """BasicSR's progress line; TensorBoard also gets ``lr``, ``speed/images_per_s`` and ``speed/data_wait``.

    The last is the share of a step's time that it waited for its batch. Both are means over up to 200 steps.
    """

    def __init__(self, opt: dict[str, Any], start_iter: int = 1, tb_logger: SummaryWriter | None = None) -> None:
        super().__init__(opt, start_iter, tb_logger)
        self.batch = opt['datasets']['train']['batch_size_per_gpu'] * distributed.devices(opt)

    @master_only
    def __call__(self, log_vars: dict[str, Any]) -> None:
        """Log one step's numbers, BasicSR's ``log_vars``."""
        if self.tb_logger:
            seconds, iteration = max(log_vars['time'], 1e-9), log_vars['iter']
            self.tb_logger.add_scalar('lr', log_vars['lrs'][0], iteration)
            self.tb_logger.add_scalar('speed/images_per_s', self.batch / seconds, iteration)
            self.tb_logger.add_scalar('speed/data_wait', min(log_vars['data_time'] / seconds, 1), iteration)
        super().__call__(log_vars)


@master_only
def open_tensorboard(folder: str, state: dict[str, Any] | None) -> SummaryWriter:
    """As BasicSR's, but what an interrupted run wrote after the state that it is resumed from is taken back."""
    return SummaryWriter(folder, purge_step=state['iter'] + 1 if state else None)


@master_only
def start_wandb(opt: dict[str, Any]) -> None:
    """As BasicSR's, which calls a function that wandb no longer has: what TensorBoard is told goes to wandb, too."""
    wandb = importlib.import_module('wandb')
    options = opt['logger']['wandb']
    resumed = {'id': options['resume_id'], 'resume': 'allow'} if options.get('resume_id') else {}
    if not wandb.patched['tensorboard']:
        wandb.tensorboard.patch(root_logdir=str(Path(opt['root_path'], 'tb_logger')))
    run = wandb.init(name=opt['name'], config=opt, project=options['project'], **resumed)
    get_root_logger().info('wandb run %s of project %s.', run.id, options['project'])


@master_only
def write_curves(root: str, name: str) -> None:
    """Write ``curves.png`` beside the table, of what TensorBoard was told, if it was."""
    events = Path(root, 'tb_logger', name)
    if events.is_dir():
        write_picture(Path(root, 'experiments', name, 'curves.png'), draw_curves(read_curves(events)))


def read_curves(folder: str | Path) -> dict[str, Curve]:
    """All scalars below a TensorBoard folder: iterations and values by tag, without what a resumed run took back."""
    events = EventAccumulator(str(folder), size_guidance={'scalars': 0})
    events.Reload()
    curves = {}
    for tag in events.Tags()['scalars']:
        points = {event.step: event.value for event in events.Scalars(tag)}
        curves[tag] = (np.array(list(points)), np.array(list(points.values())))
    return curves


def draw_curves(curves: dict[str, Curve]) -> np.ndarray:
    """Draw the learning rate, each loss, and each metric with a line a validation set; BGR uint8.

    Args:
        curves: By tags as CEAModel writes them: ``losses/l_pix``, ``metrics/<set>/<metric>``, ``lr``.
    """
    panels: dict[str, dict[str, Curve]] = defaultdict(dict)
    for tag, curve in curves.items():
        head, *rest = tag.split('/')
        if head == 'metrics':
            panels[rest[-1]]['/'.join(rest[:-1])] = curve
        elif head in ('losses', 'lr'):
            panels[tag][''] = curve
    drawn = [_panel(title, lines) for title, lines in panels.items()]
    drawn += [np.full_like(drawn[0], 255)] * (len(drawn) % 2)
    return np.vstack([np.hstack(pair) for pair in zip(drawn[::2], drawn[1::2], strict=True)])


def _panel(title: str, lines: dict[str, Curve]) -> np.ndarray:
    """One pair of axes with its lines, each named in its colour."""
    img = np.full((*PANEL, 3), 255, np.uint8)
    top, bottom, left, right = MARGINS
    corner = (PANEL[1] - right, PANEL[0] - bottom)
    steps, values = (np.concatenate([curve[axis] for curve in lines.values()]) for axis in (0, 1))
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    ranges = [(low, high if high > low else low + 1) for low, high in ((a.min(), a.max()) for a in (steps, values))]
    for share in np.linspace(0, 1, TICKS):
        x, y = round(left + share * (corner[0] - left)), round(corner[1] - share * (corner[1] - top))
        cv2.line(img, (left, y), (corner[0], y), (230, 230, 230), 1)
        said = [low + share * (high - low) for low, high in ranges]
        _write(img, f'{said[1]:.4g}', (4, y + 4))
        _write(img, f'{said[0]:.0f}', (max(x - 22, left), PANEL[0] - 8))
    _write(img, title, (4, 14))
    room = left + 40
    for number, (name, (steps, values)) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        kept = np.isfinite(values)
        x, y = (
            (points[kept] - low) / (high - low) for points, (low, high) in zip((steps, values), ranges, strict=True)
        )
        points = np.stack([left + x * (corner[0] - left), corner[1] - y * (corner[1] - top)], axis=1)
        cv2.polylines(img, [points.round().astype(np.int32)], False, colour, 1, cv2.LINE_AA)
        if len(points) == 1:
            cv2.circle(img, points[0].round().astype(int).tolist(), 2, colour, -1)
        _write(img, name, (room, 14), colour)
        room += cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, 0.38, 1)[0][0] + 14
    return img


def _write(img: np.ndarray, text: str, place: tuple[int, int], colour: tuple[int, int, int] = (0, 0, 0)) -> None:
    cv2.putText(img, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.38, colour, 1, cv2.LINE_AA)
