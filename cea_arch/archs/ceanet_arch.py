"""CEANet: a U-shaped transformer for all-in-one restoration whose blocks carry CEA layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cea_arch.compat import ARCH_REGISTRY
from cea_arch.layers import CEABlock, TransformerBlock

NUM_LEVELS = 4
STAGES = ('encoder', 'latent', 'decoder', 'refinement')
SIZES = {
    'base': {
        'dim': 48,
        'num_blocks': (3, 4, 6, 12),
        'num_dec_blocks': (2, 4, 6),
        'num_refinement_blocks': 2,
        'heads': (1, 2, 4, 8),
        'ffn_expansion_factor': 2.0,
        'cea_width': 32,
        'cea_heads': 2,
    },
    'S': {
        'dim': 24,
        'num_blocks': (2, 2, 4, 6),
        'num_dec_blocks': (1, 2, 4),
        'num_refinement_blocks': 1,
        'heads': (1, 2, 4, 8),
        'ffn_expansion_factor': 2.0,
        'cea_width': 16,
        'cea_heads': 2,
    },
    'T': {
        'dim': 16,
        'num_blocks': (1, 1, 2, 3),
        'num_dec_blocks': (1, 1, 1),
        'num_refinement_blocks': 1,
        'heads': (1, 2, 4, 8),
        'ffn_expansion_factor': 2.0,
        'cea_width': 12,
        'cea_heads': 1,
    },
}


@ARCH_REGISTRY.register()
class CEANet(nn.Module):
    """Restore an image of unknown, mixed, spatially varying degradation: U-Net of :class:`CEABlock`, global residual.

    Four levels; PixelUnshuffle and PixelShuffle between them, skips fused by 1x1 convolutions, channels doubling from
    level to level. Blocks as in Restormer; a CEA layer after each block of the stages named in ``cea_stages``. The
    architecture is our choice; its named sizes keep to the compute of the leanest peers.

    Any H, W >= 1, without padding the image: each level has the size that it needs, half the one above, rounded up. So
    no padded token exists that could enter the CEA layers' conditioning or the channel attention's statistics.

    Args:
        num_in_ch: Channels of the input and output image.
        size: ``base``, ``S`` or ``T``: sets each of the following arguments that is left at ``None``.
        dim: Channels at full resolution.
        num_blocks: Blocks of the three encoder levels and of the latent one.
        num_dec_blocks: Blocks of the decoder, from full resolution down.
        num_refinement_blocks: Blocks at full resolution after the decoder.
        heads: Attention heads of the four levels, from full resolution down.
        ffn_expansion_factor: Hidden channels of the feed-forward, as a multiple of the level's.
        cea_width, cea_heads: Width and heads of each CEA layer's hyper-adapter.
        rank: Components of each CEA layer.
        cea_stages: Stages with CEA layers, of ``encoder``, ``latent``, ``decoder``, ``refinement``; may be empty.
        conditioning, routing: As for :class:`cea_arch.layers.CEALayer`; contrasts for ablations.

    Raises:
        ValueError: An unknown word, or lists of the wrong length.

    Attributes:
        blocks: Patterns over the names of its blocks, for ``train.checkpoint_activations``.
    """

    blocks = ('encoder.*.*', 'latent.*', 'decoder.*.*', 'refinement.*')

    def __init__(
        self,
        num_in_ch: int = 3,
        size: str = 'base',
        dim: int | None = None,
        num_blocks: Sequence[int] | None = None,
        num_dec_blocks: Sequence[int] | None = None,
        num_refinement_blocks: int | None = None,
        heads: Sequence[int] | None = None,
        ffn_expansion_factor: float | None = None,
        cea_width: int | None = None,
        cea_heads: int | None = None,
        rank: int = 8,
        cea_stages: Sequence[str] = ('latent', 'decoder', 'refinement'),
        conditioning: str = 'cross_attention',
        routing: str = 'signed',
    ) -> None:
        super().__init__()
        chosen = dict(
            dim=dim,
            num_blocks=num_blocks,
            num_dec_blocks=num_dec_blocks,
            num_refinement_blocks=num_refinement_blocks,
            heads=heads,
            ffn_expansion_factor=ffn_expansion_factor,
            cea_width=cea_width,
            cea_heads=cea_heads,
        )
        if size not in SIZES:
            raise ValueError(f'size must be one of {", ".join(SIZES)}, got {size!r}.')
        settings = SIZES[size] | {name: value for name, value in chosen.items() if value is not None}
        _check_settings(settings, cea_stages)
        dim, heads = settings['dim'], settings['heads']
        cea_options = dict(
            rank=rank,
            width=settings['cea_width'],
            cea_heads=settings['cea_heads'],
            conditioning=conditioning,
            routing=routing,
        )

        def stage(name: str, level: int, num_blocks: int) -> nn.Sequential:
            sizes = (dim * 2**level, heads[level], settings['ffn_expansion_factor'])
            if name in cea_stages:
                return nn.Sequential(*(CEABlock(*sizes, **cea_options) for _ in range(num_blocks)))
            return nn.Sequential(*(TransformerBlock(*sizes) for _ in range(num_blocks)))

        *encoder, latent = settings['num_blocks']
        decoder = settings['num_dec_blocks']
        levels = range(NUM_LEVELS - 1)
        self.embed = nn.Conv2d(num_in_ch, dim, 3, padding=1, bias=False)
        self.encoder = nn.ModuleList(stage('encoder', level, encoder[level]) for level in levels)
        self.down = nn.ModuleList(Downsample(dim * 2**level) for level in levels)
        self.latent = stage('latent', NUM_LEVELS - 1, latent)
        self.up = nn.ModuleList(_upsample(dim * 2 ** (level + 1)) for level in levels)
        self.fuse = nn.ModuleList(nn.Conv2d(dim * 2 ** (level + 1), dim * 2**level, 1, bias=False) for level in levels)
        self.decoder = nn.ModuleList(stage('decoder', level, decoder[level]) for level in levels)
        self.refinement = stage('refinement', 0, settings['num_refinement_blocks'])
        self.output = nn.Conv2d(dim, num_in_ch, 3, padding=1, bias=False)
        nn.init.zeros_(self.output.weight)  # a fresh network is the identity

    def forward(self, x: Tensor) -> Tensor:
        """Restore RGB images ``(B, C, H, W)`` in [0, 1]; same shape out, not clipped."""
        features = self.embed(x)
        skips = []
        for encoder, down in zip(self.encoder, self.down, strict=True):
            skips.append(encoder(features))
            features = down(skips[-1])
        features = self.latent(features)
        for level in reversed(range(NUM_LEVELS - 1)):
            skip = skips.pop()
            features = _crop(self.up[level](features), *skip.shape[-2:])
            features = self.decoder[level](self.fuse[level](torch.cat([features, skip], dim=1)))
        return x + self.output(self.refinement(features))


class Downsample(nn.Module):
    """Half the size, rounded up, and twice the channels; an odd last row or column is repeated to fill its cells."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, 2C, ceil(H/2), ceil(W/2))``."""
        x = self.conv(x)
        height, width = x.shape[-2:]
        row, column = (height + 1) // 2 * 2 - height, (width + 1) // 2 * 2 - width
        # an exported program serves odd and even sizes, so it must not depend on which one was traced
        if _is_exporting() or row or column:
            x = F.pad(x, (0, column, 0, row), mode='replicate')
        return F.pixel_unshuffle(x, 2)


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns of ``(B, C, H, W)``."""
    if _is_exporting():  # a slice would bind the program to sizes that are odd, or even, as the traced one
        rows, columns = (torch.arange(length, device=x.device) for length in (height, width))
        return x.index_select(2, rows).index_select(3, columns)
    return x[..., :height, :width]


def _is_exporting() -> bool:
    """Whether a program for any size is being traced; torch before 2.7 does not tell it from compiling."""
    return getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)()


def _upsample(dim: int) -> nn.Sequential:
    """Twice the size, half the channels."""
    return nn.Sequential(nn.Conv2d(dim, dim * 2, 1, bias=False), nn.PixelShuffle(2))


def _check_settings(settings: dict, cea_stages: Sequence[str]) -> None:
    for name, length in (('num_blocks', NUM_LEVELS), ('num_dec_blocks', NUM_LEVELS - 1), ('heads', NUM_LEVELS)):
        if len(settings[name]) != length:
            raise ValueError(f'{name} must have {length} numbers, got {list(settings[name])}.')
    unknown = [stage for stage in cea_stages if stage not in STAGES]
    if unknown:
        raise ValueError(f'cea_stages may hold {", ".join(STAGES)}, got {unknown[0]!r}.')
