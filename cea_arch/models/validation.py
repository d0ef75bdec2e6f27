"""Validation of a model: shared by its processes, in float, with a table, pictures and the best weights at its end."""

import json
import os
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from cea_arch import distributed
from cea_arch.files import as_json
from cea_arch.metrics.protocols import score
from cea_arch.metrics.psnr_ssim_metric import uint8_bgr
from cea_arch.metrics.report import PANELS, SetResult, compare, write_beside, write_picture
from cea_arch.restoring.maps import RoutingMaps, draw_maps
from cea_arch.restoring.tiling import spans


class ValidatedModel(SRModel):
    """SRModel with a validation of its own; needs ``protocol``, ``metrics`` and ``report``, and ``save_weights``."""

    @property
    def tested(self) -> nn.Module:
        """The network that is validated: the average, if there is one.

        Never DDP, whose processes would wait for each other: they have different numbers of images.
        """
        return getattr(self, 'net_g_ema', self.get_bare_model(self.net_g))

    def test(self) -> None:
        """Restore ``lq``."""
        trains = self.tested.training
        self.tested.eval()
        with torch.no_grad():
            self.output = self.tested(self.lq)
        self.tested.train(trains)

    def validation(
        self, dataloader: DataLoader, current_iter: int | None, tb_logger: SummaryWriter | None, save_img: bool = False
    ) -> None:
        """Validate one set, unless this iteration's results are there: BasicSR's loop validates the last one twice.

        Of several processes each takes its share of the images.
        """
        # in a test BasicSR gives the run's name instead of a number
        current_iter = min(current_iter, int(self.opt['train']['total_iter'])) if self.is_train else None
        dataset = dataloader.dataset
        name = dataset.opt['name']
        if self.report.has(name, current_iter):
            return
        result = SetResult(dataset.opt.get('benchmark', self.opt['name']), dataset.opt.get('group'))
        shares = distributed.gather(self._validate_share(dataset, result, current_iter, save_img))
        result.rows = [row for rows in zip_longest(*shares) for row in rows if row]
        if result.rows[0].keys() != {'image'}:
            self._log_means(name, result.means(), current_iter, tb_logger)
        self.report.add(name, current_iter, result)
        self._write_report(current_iter)
        if tb_logger:
            for tag, img in {'comparison': result.picture, **result.maps}.items():
                tb_logger.add_image(f'{name}/{tag}', img[..., ::-1].copy(), current_iter, dataformats='HWC')

    def _validate_share(
        self, dataset: Dataset, result: SetResult, current_iter: int | None, save_img: bool
    ) -> list[dict[str, str | float]]:
        """Restore and score this process's images, every n-th one; the first one's picture goes into ``result``."""
        name, rows = dataset.opt['name'], []
        mine = Subset(dataset, range(distributed.rank(), len(dataset), distributed.size()))
        off = None if distributed.rank() == 0 else True
        for data in tqdm(DataLoader(mine), desc=f'validating {name}', unit='image', leave=False, disable=off):
            self.feed_data(data)
            if not rows:
                result.maps = self._test_with_maps()
            else:
                self.test()
            images = self.current_images()
            scores = score(images, self.metrics) if 'clean' in images else {}
            row = {'image': os.path.splitext(os.path.basename(data['lq_path'][0]))[0], **scores}
            rows.append(row)
            if save_img:
                self.save_image(images['restored'], name, row['image'], current_iter)
            if result.picture is None:
                result.picture = compare(images, row)
            self.lq = self.gt = self.output = None
        return rows

    def _test_with_maps(self) -> dict[str, np.ndarray]:
        """Restore ``lq``, and draw the routing of the layers of ``val.maps``, BGR uint8."""
        chosen = self.opt['val'].get('maps') or []
        records = [RoutingMaps(self.tested, name) for name in ([None] if chosen is True else chosen)]
        with ExitStack() as recording:
            for record in records:
                recording.enter_context(record.recording())
            self.test()
        height, width = self.lq.shape[-2:]
        for record in records:
            record.place(spans(height, height, 0)[0], spans(width, width, 0)[0], (height, width))
        return {record.name: draw_maps(record.maps)[..., ::-1] for record in records}

    @master_only
    def _write_report(self, current_iter: int | None) -> None:
        self.report.write()
        if len(self.report.sets) == sum(phase != 'train' for phase in self.opt['datasets']):
            get_root_logger().info(f'{self.report.markdown()}\nWritten to {self.report.folder}.')
            if self.is_train:
                self._keep_best(current_iter)

    def _keep_best(self, current_iter: int) -> None:
        """Save the weights if the mean of the first metric over all sets is the best yet."""
        metric = next(iter(self.metrics), None)
        means = [result.means().get(metric) for result in self.report.sets.values()]
        if None in means:
            return
        mean, lower = float(np.mean(means)), self.metrics[metric].get('better') == 'lower'
        file = Path(self.opt['path']['models'], 'best.json')
        best = json.loads(file.read_text()) if file.is_file() else None
        if best is None or (mean < float(best['mean']) if lower else mean > float(best['mean'])):
            self.save_weights('best')
            write_beside(file, as_json({'iteration': current_iter, 'metric': metric, 'mean': mean}).encode())

    def current_images(self) -> dict[str, np.ndarray]:
        """The latest degraded, restored and, if any, clean image: RGB float32 ``(H, W, 3)``, clipped to [0, 1]."""
        tensors = zip(PANELS, (self.lq, self.output, self.gt), strict=True)
        return {
            name: t[0].detach().float().clamp(0, 1).permute(1, 2, 0).cpu().numpy()
            for name, t in tensors
            if t is not None
        }

    def save_image(self, img: np.ndarray, set_name: str, image_name: str, current_iter: int | None) -> None:
        """Write one restored image; each set has its own folder, so that equal names do not overwrite each other."""
        suffix = current_iter if self.is_train else self.opt['val'].get('suffix') or self.opt['name']
        folder = self.report.folder / 'visualization' / set_name
        write_picture(folder / f'{image_name}_{suffix}.png', uint8_bgr(img))

    def _log_means(
        self, name: str, means: dict[str, float], current_iter: int | None, tb_logger: SummaryWriter | None
    ) -> None:
        name = f'{name} ({self.protocol})' if self.protocol else name
        self._initialize_best_metric_results(name)
        self.metric_results = {metric: means[metric] for metric in self.metrics}
        for metric, value in self.metric_results.items():
            self._update_best_metric_result(name, metric, value, current_iter)
        self._log_validation_metric_values(current_iter, name, tb_logger)
