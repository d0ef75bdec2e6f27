"""``cea demo``: a page on this machine to try a network on one's own pictures, degraded further at will."""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cea_arch.data.degradations import TASKS, quantize, synthesize
from cea_arch.data.pictures import read_picture
from cea_arch.errors import UserError, need
from cea_arch.restoring.maps import RoutingMaps, draw_maps
from cea_arch.restoring.restorer import Restorer, enlarged, restore
from cea_arch.restoring.tiling import keep_freed_memory
from cea_arch.restoring.writing import as_rgb8, write_picture

CHOICES = [(name.replace('_', ' '), name) for name in TASKS]
MAPS_NOTE = (
    'Routing: a panel for each component of the last CEA layer; red pixels take it, blue ones with the opposite sign.'
)


def run(args: argparse.Namespace) -> None:
    """Serve the page until interrupted."""
    keep_freed_memory()
    restorer = Restorer(args.model, args.device, network_g=args.network_g)
    with tempfile.TemporaryDirectory(prefix='cea_demo_') as folder:
        page = serve(build_page(restorer, Path(folder)), args.host, args.port)
        print(f'The page is at {page.local_url} ({restorer.device}); Ctrl-C ends it.', flush=True)
        page.block_thread()


def serve(page: Any, host: str = '127.0.0.1', port: int | None = None) -> Any:
    """Open the page for browsers, without a public link; returns it.

    Raises:
        UserError: The address or port cannot be had.
    """
    try:
        # its own fonts alone: the default theme asks a font server
        theme = need('gradio', 'demo', 'the page').themes.Default(font='sans-serif', font_mono='monospace')
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            theme=theme,
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
        )
    except OSError as error:
        raise UserError(f'the page cannot be served on {host}: {error}') from error
    return page


def build_page(restorer: Restorer, folder: Path) -> Any:
    """The page, a ``gradio.Blocks``; results to download are written below ``folder``.

    Raises:
        UserError: gradio is absent.
    """
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # read at import, too
    gradio = need('gradio', 'demo', 'the page')

    def answer(path: str | None, tasks: list[str], seed: int, strength: float, keep_tones: bool) -> tuple:
        restorer.strength, restorer.keep_tones = strength, keep_tones
        try:
            before, after, maps, file = restore_upload(restorer, path, tasks, int(seed or 0), folder)
        except UserError as error:
            raise gradio.Error(str(error)) from error
        button = gradio.DownloadButton(value=str(file), interactive=True)
        return (before, after), maps, button

    with gradio.Blocks(title='CEA', analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown('# CEA: restore a picture\nEverything stays on the machine that serves this page.')
        with gradio.Row():
            with gradio.Column(scale=1):
                picture = gradio.Image(type='filepath', image_mode=None, sources=['upload'], label='picture')
                tasks = gradio.CheckboxGroup(CHOICES, label='degrade it first, by any mixture')
                seed = gradio.Number(0, precision=0, label='another number, another degradation')
                strength = gradio.Slider(0, 1, 1, label='strength: 0 is the picture as it is')
                keep_tones = gradio.Checkbox(label='keep its tones: neither haze nor low light is at fault')
                start = gradio.Button('Restore', variant='primary', elem_id='restore')
            with gradio.Column(scale=2):
                slider = gradio.ImageSlider(label='before | after', elem_id='result', interactive=False)
                file = gradio.DownloadButton('Download', interactive=False, elem_id='download')
                gradio.Markdown(MAPS_NOTE)
                maps = gradio.Image(show_label=False, buttons=['fullscreen'], interactive=False, elem_id='maps')
        start.click(answer, [picture, tasks, seed, strength, keep_tones], [slider, maps, file])
    return page


def restore_upload(
    restorer: Restorer, path: str | None, tasks: list[str], seed: int, folder: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, Path]:
    """Restore a picture file, degraded first by ``tasks`` of :data:`cea_arch.data.degradations.TASKS` if there are any.

    Returns:
        The picture before and after, RGB uint8 of equal size; the sheet of routing maps, ``None`` for a network
        that has none to draw; and a PNG below ``folder`` with the result in its own depth.

    Raises:
        UserError: No picture was given, or as :func:`cea_arch.data.pictures.read_picture`.
    """
    if not path:
        raise UserError('choose a picture first.')
    picture = read_picture(Path(path))
    pixels = picture.pixels
    if tasks:
        pixels = quantize(synthesize(as_rgb8(pixels) / 255.0, tasks, np.random.default_rng(seed)))
    try:
        restorer.maps = RoutingMaps(restorer.net)
    except UserError:  # a network without a layer whose routing has a plan
        restorer.maps = None
    restored = restore(pixels, restorer)
    file = Path(tempfile.mkdtemp(dir=folder)) / f'{Path(path).stem}_restored.png'
    write_picture(file, replace(picture, pixels=restored, format='PNG'))
    before = enlarged(as_rgb8(pixels), restorer.fit.scale)
    return before, as_rgb8(restored), draw_maps(restorer.maps.maps) if restorer.maps else None, file
