"""What another package for BasicSR may register: a network of windows and a model that reads its options late."""

import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, MODEL_REGISTRY
from torch import nn


@ARCH_REGISTRY.register()
class StandInNet(nn.Module):
    """Sees its image as windows, and lays them out in Python, as SwinIR does."""

    def __init__(self, dim=8, window_size=4, **kwargs):
        super().__init__()
        self.window_size = window_size
        self.first = nn.Conv2d(3, dim, 3, padding=1)
        self.body = nn.ModuleList([nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.ReLU())])
        self.mix = nn.Linear(dim, dim)
        self.last = nn.Conv2d(dim, 3, 3, padding=1)

    def forward(self, x):
        size, features = self.window_size, self.body[0](self.first(x))
        b, c, h, w = features.shape
        rows, columns = h // size, w // size
        windows = features.view(b, c, rows, size, columns, size).permute(0, 2, 4, 3, 5, 1).reshape(-1, size, size, c)
        windows = self.mix(windows)
        batch = int(windows.shape[0] / (h * w / size / size))
        places = windows.view(batch, rows, columns, size, size, c).permute(0, 5, 1, 3, 2, 4)
        features = places.reshape(batch, c, h, w)
        return x + self.last(features)


@MODEL_REGISTRY.register()
class StandInModel(SRModel):
    """Pads images to its network's window, as SwinIRModel and HATModel do."""

    def test(self):
        size = self.opt['network_g']['window_size']
        lq, (high, wide) = self.lq, self.lq.shape[-2:]
        self.lq = nn.functional.pad(lq, (0, -wide % size, 0, -high % size), 'reflect')
        super().test()
        self.lq, self.output = lq, self.output[..., :high, :wide]


@DATASET_REGISTRY.register()
class StandInDataset(torch.utils.data.Dataset):
    """Reads an option that no other does."""

    def __init__(self, opt):
        self.opt, self.count = opt, opt['how_many']

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        clean = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(index))
        return {'lq': clean * 0.5, 'gt': clean, 'lq_path': f'{index}.png', 'gt_path': f'{index}.png'}
