"""CEA-IR: the paper's U-shaped network for all-in-one restoration, and a small one of ours for CPUs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cea_arch.layers import CEABlock, ConvBlock, HyperAdapter
from cea_arch.layers.blocks import check_targets, project

NUM_LEVELS = 4
STAGES = ('encoder', 'latent', 'decoder', 'refinement')
BLOCKS = {'attention': CEABlock, 'conv': ConvBlock}
FFN_EXPANSION_FACTOR = 2.0
_PAPER = {
    'block': 'attention',
    'num_blocks': (4, 6, 6, 8),
    'num_dec_blocks': (2, 4, 4),
    'num_refinement_blocks': 4,
    'up_kernel': 3,
    'bias': False,
    'pooled_scale': False,
    'modulate': ('q', 'k'),
    'cea_stages': ('decoder',),
    'cea_width': None,
    'cea_heads': 4,
    'cea_strides': (2, 2, 2, 2),
}
SIZES = {
    'base': _PAPER | {'dim': 48},
    'S': _PAPER | {'dim': 32},
    'T': {
        'block': 'conv',
        'dim': 20,
        'num_blocks': (1, 1, 2, 4),
        'num_dec_blocks': (1, 1, 1),
        'num_refinement_blocks': 1,
        'up_kernel': 1,
        'bias': True,
        'pooled_scale': False,
        'modulate': ('mixed', 'fuse'),
        'cea_stages': STAGES,
        'cea_width': 20,
        'cea_heads': 2,
        'cea_strides': (4, 4, 4, 2),
    },
}


class CEAIR(nn.Module):
    """Restore an image of unknown, mixed, spatially varying degradation: a U-Net with CEA in its decoder.

    ``base`` (CEA-IR) and ``S`` (CEA-IR-S) are the paper's networks, with its numbers of parameters to the unit: blocks
    of :class:`cea_arch.layers.CEABlock`, three downsampling steps, skips concatenated and reduced by 1x1 convolutions,
    the first convolution's features added before the refinement, CEA in the first, third, ... block of each decoder
    stage. ``T`` is ours, for CPUs: of :class:`cea_arch.layers.ConvBlock`, so that CEA is its only image-wide operation.

    Any H, W >= 1, without padding the image: each level has the size that it needs, half the one above, rounded up. So
    no padded token exists that could enter what is read from the whole image. But patches of a training have no odd
    sizes, and weights may take what is done to an odd row for something else: restoring continues images to multiples
    of ``trained_multiple``.

    Args:
        num_in_ch: Channels of the input and output image.
        size: ``base``, ``S`` or ``T``: sets each of the following arguments that is left at ``None``.
        block: ``attention`` or ``conv``, the kind of all blocks.
        dim: Channels at full resolution, doubling from level to level.
        num_blocks: Blocks of the three encoder levels and of the latent one.
        num_dec_blocks: Blocks of the decoder, from full resolution down.
        num_refinement_blocks: Blocks at full resolution after the decoder.
        heads: Attention heads of the four levels, from full resolution down; conv blocks have none.
        ffn_expansion_factor: Hidden channels of the blocks, as a multiple of the level's.
        up_kernel: Kernel of the convolutions before pixel shuffles, 3 (as in Restormer) or 1.
        bias: Whether convolutions have biases.
        pooled_scale: Whether conv blocks have pooled channel attention.
        modulate: Projections that CEA adapts: of a block's ``q``, ``k``, ``v``, ``ffn``, or, in conv blocks, of its
            ``mixer``, ``mixed``, ``ffn``; ``fuse``, those that reduce the skips. None: the same network without CEA.
        cea_stages: Stages whose blocks have CEA, of ``encoder``, ``latent``, ``decoder``, ``refinement``: every other
            block of each, beginning with the first.
        cea_width: Channels of condensed context and queries, where a level has more; ``None``: the level's.
        cea_heads: Attention heads of the hyper-adapter.
        cea_strides: Strides of the condensed context at the four levels, from full resolution down.
        rank, factors, routing, rank_norm: Of :class:`cea_arch.layers.HyperAdapter`; the paper's contrasts.

    Raises:
        ValueError: An unknown word, or lists of the wrong length.

    Attributes:
        blocks: Patterns over the names of its blocks, for ``train.checkpoint_activations``.
    """

    blocks = ('encoder.*.*', 'latent.*', 'decoder.*.*', 'refinement.*')

    trained_multiple = 2 ** (NUM_LEVELS - 1)  # pixels

    def __init__(
        self,
        num_in_ch: int = 3,
        size: str = 'base',
        block: str | None = None,
        dim: int | None = None,
        num_blocks: Sequence[int] | None = None,
        num_dec_blocks: Sequence[int] | None = None,
        num_refinement_blocks: int | None = None,
        heads: Sequence[int] = (1, 2, 4, 8),
        ffn_expansion_factor: float = FFN_EXPANSION_FACTOR,
        up_kernel: int | None = None,
        bias: bool | None = None,
        pooled_scale: bool | None = None,
        modulate: Sequence[str] | None = None,
        cea_stages: Sequence[str] | None = None,
        cea_width: int | None = None,
        cea_heads: int | None = None,
        cea_strides: Sequence[int] | None = None,
        rank: int = 8,
        factors: str = 'dynamic',
        routing: str = 'signed',
        rank_norm: bool = True,
    ) -> None:
        super().__init__()
        chosen = {name: value for name, value in locals().items() if name in _PAPER | {'dim': None}}
        if size not in SIZES:
            raise ValueError(f'size must be one of {", ".join(SIZES)}, got {size!r}.')
        settings = SIZES[size] | {name: value for name, value in chosen.items() if value is not None}
        _check_settings(settings, heads)
        dim = settings['dim']
        bias, modulate = settings['bias'], settings['modulate']
        in_blocks = [target for target in modulate if target != 'fuse']
        cea = dict(rank=rank, factors=factors, routing=routing, rank_norm=rank_norm, heads=settings['cea_heads'])

        def cea_options(level: int, width: int) -> dict[str, Any]:
            return cea | {'width': min(width, settings['cea_width'] or width), 'stride': settings['cea_strides'][level]}

        def stage(name: str, level: int, num_blocks: int) -> nn.Sequential:
            width = dim * 2**level
            sizes, options = (width, ffn_expansion_factor), cea_options(level, width)

            def make(number: int) -> nn.Module:
                chosen = in_blocks if name in settings['cea_stages'] and number % 2 == 0 else ()
                if settings['block'] == 'conv':
                    return ConvBlock(*sizes, chosen, settings['pooled_scale'], bias, **options)
                return CEABlock(width, heads[level], ffn_expansion_factor, chosen, **options)

            return nn.Sequential(*map(make, range(num_blocks)))

        *encoder, latent = settings['num_blocks']
        decoder = settings['num_dec_blocks']
        levels = range(NUM_LEVELS - 1)
        self.embed = nn.Conv2d(num_in_ch, dim, 3, padding=1, bias=bias)
        self.encoder = nn.ModuleList(stage('encoder', level, encoder[level]) for level in levels)
        self.down = nn.ModuleList(Downsample(dim * 2**level, bias) for level in levels)
        self.latent = stage('latent', NUM_LEVELS - 1, latent)
        self.up = nn.ModuleList(_upsample(dim * 2 ** (level + 1), settings['up_kernel'], bias) for level in levels)
        self.fuse = nn.ModuleList(
            Fuse(dim * 2**level, bias, cea_options(level, dim * 2 ** (level + 1)) if 'fuse' in modulate else None)
            for level in levels
        )
        self.decoder = nn.ModuleList(stage('decoder', level, decoder[level]) for level in levels)
        self.refinement = stage('refinement', 0, settings['num_refinement_blocks'])
        self.output = nn.Conv2d(dim, num_in_ch, 3, padding=1, bias=bias)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)  # a fresh network is the identity (our choice)

    def forward(self, x: Tensor) -> Tensor:
        """Restore RGB images ``(B, C, H, W)`` in [0, 1]; same shape out, not clipped."""
        first = features = self.embed(x)
        skips = []
        for encoder, down in zip(self.encoder, self.down, strict=True):
            skips.append(encoder(features))
            features = down(skips[-1])
        features = self.latent(features)
        for level in reversed(range(NUM_LEVELS - 1)):
            skip = skips.pop()
            features = _crop(self.up[level](features), *skip.shape[-2:])
            features = self.decoder[level](self.fuse[level](features, skip))
        return x + self.output(self.refinement(features + first))


def named_size(weights: Mapping[str, Tensor]) -> str | None:
    """The named size whose weights have these names and shapes; ``None`` if there is none."""
    for size in SIZES:
        with torch.device('meta'):
            expected = CEAIR(size=size).state_dict()
        if {name: v.shape for name, v in expected.items()} == {name: v.shape for name, v in weights.items()}:
            return size
    return None


class Downsample(nn.Module):
    """Half the size, rounded up, and twice the channels; an odd last row or column is repeated to fill its cells."""

    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim // 2, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, 2C, ceil(H/2), ceil(W/2))``."""
        x = self.conv(x)
        height, width = x.shape[-2:]
        row, column = (height + 1) // 2 * 2 - height, (width + 1) // 2 * 2 - width
        # an exported program serves odd and even sizes, so it must not depend on which one was traced
        if _is_exporting() or row or column:
            x = F.pad(x, (0, column, 0, row), mode='replicate')
        return F.pixel_unshuffle(x, 2)


class Fuse(nn.Module):
    """Reduce a skip and what comes from below to one map by a 1x1 convolution, which CEA may adapt to the image."""

    def __init__(self, dim: int, bias: bool, cea_options: dict[str, Any] | None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * dim, dim, 1, bias=bias)
        self.cea = HyperAdapter(2 * dim, dim, {'fuse': (0, dim)}, **cea_options) if cea_options is not None else None

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map two ``(B, C, H, W)`` to one."""
        return project(self.conv, self.cea, torch.cat([x, skip], dim=1))


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of ``(B, C, H, W)``."""
    if _is_exporting():  # a slice would bind the program to sizes that are odd, or even, as the traced one
        rows, columns = (torch.arange(length, device=x.device) for length in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[..., :height, :width]


def _is_exporting() -> bool:
    """Whether a program for any size is being traced; torch before 2.7 does not tell it from compiling."""
    return getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)()


def _upsample(dim: int, kernel: int, bias: bool) -> nn.Sequential:
    """Twice the size, half the channels."""
    return nn.Sequential(nn.Conv2d(dim, dim * 2, kernel, padding=kernel // 2, bias=bias), nn.PixelShuffle(2))


def _check_settings(settings: dict, heads: Sequence[int]) -> None:
    lists = {name: settings[name] for name in ('num_dec_blocks', 'num_blocks', 'cea_strides')} | {'heads': heads}
    for name, numbers in lists.items():
        length = NUM_LEVELS - (name == 'num_dec_blocks')
        if len(numbers) != length:
            raise ValueError(f'{name} must have {length} numbers, got {list(numbers)}.')
    if settings['block'] not in BLOCKS:
        raise ValueError(f'block must be one of {", ".join(BLOCKS)}, got {settings["block"]!r}.')
    check_targets(settings['modulate'], (*BLOCKS[settings['block']].targets, 'fuse'))
    unknown = [stage for stage in settings['cea_stages'] if stage not in STAGES]
    if unknown:
        raise ValueError(f'cea_stages may hold {", ".join(STAGES)}, got {unknown[0]!r}.')
