"""Clips in and out, frame by frame, with their sound. Needs PyAV, an extra."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cea_arch.errors import UserError, need
from cea_arch.files import written_beside
from cea_arch.restoring.restorer import Restorer, restore

# container and encoder by suffix
ENCODERS = {
    '.mp4': ('mp4', 'libx264'),
    '.mov': ('mov', 'libx264'),
    '.mkv': ('matroska', 'libx264'),
    '.webm': ('webm', 'libvpx-vp9'),
}
CRF = '16'  # near the point where more bytes show nothing
CONVERSION = (
    4 | 0x40000 | 0x2000
)  # bicubic, accurate rounding, full chroma: the default makes pictures darker by a level
COLOUR_TAGS = ('color_range', 'colorspace', 'color_primaries', 'color_trc')


def restore_clip(
    source: Path, target: Path, restorer: Restorer, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Restore each frame of a clip by itself, in 8 bits; times, colour tags and sound stay, rotation is applied.

    Args:
        source, target: Paths whose suffix is one of ``ENCODERS``; ``target`` is written beside and renamed.
        restorer: Restores the frames.
        progress: Called after each frame with the number of frames done and of all, 0 where the file does not say.

    Raises:
        UserError: PyAV is absent, or ``source`` is no clip with pictures, or is damaged.
    """
    av = need('av', 'video', 'clips')
    try:
        with av.open(str(source)) as clip:
            if not clip.streams.video:
                raise UserError(f'{source} has no pictures.')
            target.parent.mkdir(parents=True, exist_ok=True)
            with (
                written_beside(target) as aside,
                av.open(str(aside), 'w', format=ENCODERS[target.suffix.lower()][0]) as out,
            ):
                _transcode(clip, out, ENCODERS[target.suffix.lower()][1], restorer, progress)
    except av.FFmpegError as error:
        raise UserError(f'{source}: not a clip, or damaged: {error.strerror}.') from error


def _transcode(clip: Any, out: Any, encoder: str, restorer: Restorer, progress: Callable[[int, int], None]) -> None:
    video = clip.streams.video[0]
    # sound before the first frame: a container wants all streams declared, and the size is known with that frame
    sound = {stream: out.add_stream_from_template(stream) for stream in clip.streams.audio}
    stream = out.add_stream(encoder, rate=video.average_rate, options={'crf': CRF})
    waiting, done = [], 0
    for packet in clip.demux(video, *sound):
        if packet.stream in sound:
            if packet.dts is not None:
                packet.stream = sound[packet.stream]
                waiting.append(packet)
            continue
        for frame in packet.decode():
            restored = _restored(frame, restorer)
            if not done:
                _describe(stream, video, restored)
            out.mux(stream.encode(restored))
            done += 1
            progress(done, video.frames)
        if done:
            out.mux(waiting)
            waiting = []
    if done:
        out.mux(stream.encode(None))
        out.mux(waiting)


def _restored(frame: Any, restorer: Restorer) -> Any:
    pixels = np.rot90(frame.reformat(format='rgb24', interpolation=CONVERSION).to_ndarray(), round(frame.rotation / 90))
    restored = type(frame).from_ndarray(np.ascontiguousarray(restore(pixels, restorer)), format='rgb24')
    odd = restored.width % 2 or restored.height % 2  # colour at half the size needs an even one
    restored = restored.reformat(
        format='yuv444p' if odd else 'yuv420p',
        dst_colorspace=frame.colorspace,
        dst_color_range=frame.color_range,
        interpolation=CONVERSION,
    )
    restored.pts, restored.time_base = frame.pts, frame.time_base
    return restored


def _describe(stream: Any, video: Any, frame: Any) -> None:
    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
    stream.time_base = stream.codec_context.time_base = video.time_base
    for tag in COLOUR_TAGS:
        setattr(stream.codec_context, tag, getattr(video.codec_context, tag))
