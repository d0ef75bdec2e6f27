"""The probes' queries follow one picture, by a loss that needs no clean one: ``cea restore --adapt``. Our choice.

What a pixel shows cannot be told from its neighbours where it is noise. So some pixels are hidden, each behind one
near it, and the queries R of all layers learn from the picture itself what was there (masked pixels, as Noise2Void has
it). That undoes what a network does wrongly to a picture unlike those of its training; and since the loss knows nothing
but the picture, it also undoes what is right where light or haze are at fault.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cea_arch.errors import UserError

CROP, CROPS = 128, 2  # pixels a side, and how many a step
HIDDEN = 0.02  # of the pixels
REACH = 2  # pixels to the one that is shown instead
RATE = 1e-2


@contextmanager
def adapted(
    net: nn.Module,
    run: Callable[[Tensor], Tensor],
    read: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
    steps: int,
) -> Iterator[None]:
    """Let the queries of ``net`` follow a picture for ``steps`` steps, and be what they were after the block.

    Args:
        net: Network with CEA layers whose factors are dynamic or pooled.
        run: What the network makes of images ``(B, 3, H, W)`` of any size, of the same size.
        read: Gives rows and columns of the picture, ``(1, 3, h, w)``.
        size: Its height and width.
        steps: How many; 0 does nothing.

    Raises:
        UserError: There are no queries.
    """
    if not steps:
        yield
        return
    queries = [p for name, p in net.named_parameters() if name.rpartition('.')[2] == 'queries']
    if not queries:
        raise UserError('adapt: the network has no queries that could follow a picture.')
    trained = {p: p.requires_grad for p in net.parameters()}
    kept = [q.detach().clone() for q in queries]
    try:
        net.requires_grad_(False)
        for q in queries:
            q.requires_grad_(True)
        with torch.enable_grad():
            _follow(queries, run, read, size, steps)
        net.requires_grad_(False)
        yield
    finally:
        with torch.no_grad():
            for q, before in zip(queries, kept, strict=True):
                q.copy_(before)
        for p, flag in trained.items():
            p.requires_grad_(flag)


def _follow(
    queries: list[nn.Parameter],
    run: Callable[[Tensor], Tensor],
    read: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
    steps: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(queries, RATE)

    def draw(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    for _ in range(steps):
        crops = []
        for _ in range(CROPS):
            top, left = (draw(max(length - CROP, 0) + 1) for length in size)
            crops.append(read(slice(top, top + CROP), slice(left, left + CROP)))
        shown = torch.cat(crops)
        hidden = torch.rand(len(shown), 1, *shown.shape[2:], generator=generator) < HIDDEN
        aside = draw(2 * REACH) + 1
        near = torch.roll(shown, (draw(2 * REACH + 1) - REACH, aside if aside <= REACH else REACH - aside), (2, 3))
        device = queries[0].device
        restored = run(torch.where(hidden, near, shown).to(device))
        error = (restored - shown.to(device)).square() * hidden.to(device)
        optimizer.zero_grad()
        (error.sum() / hidden.sum().clamp_min(1)).backward()
        optimizer.step()
