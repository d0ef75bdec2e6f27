"""Clips in and out, frame by frame, with their sound. Needs PyAV, an extra."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cea_arch.errors import Notice, UserError, need
from cea_arch.files import written_beside
from cea_arch.restoring.restorer import Restorer, restore

# container and encoder by suffix
ENCODERS = {
    '.mp4': ('mp4', 'libx264'),
    '.mov': ('mov', 'libx264'),
    '.mkv': ('matroska', 'libx264'),
    '.webm': ('webm', 'libvpx-vp9'),
}
WIDE = '10le'  # the end of names of pixel formats of more than 8 bits, as encoders have them
CRF = '16'  # near the point where more bytes show nothing
CONVERSION = (
    4 | 0x40000 | 0x2000
)  # bicubic, accurate rounding, full chroma: the default makes pictures darker by a level
COLOUR_TAGS = ('color_primaries', 'color_trc')
RGB, BT709, LIMITED = 0, 1, 1  # of FFmpeg's matrices and ranges
FAR_FROM_SRGB = {16: 'PQ', 18: 'HLG'}  # of FFmpeg's transfer characteristics
PLAIN_KEYS = {  # of metadata that MP4 has by itself
    *('title', 'artist', 'album_artist', 'composer', 'album', 'date', 'comment', 'genre', 'copyright', 'description'),
    *('encoder', 'creation_time', 'major_brand', 'minor_version', 'compatible_brands', 'synopsis', 'show', 'lyrics'),
    *('language', 'handler_name', 'keywords', 'grouping', 'track'),
}
OF_THE_CONTAINER = ('major_brand', 'minor_version', 'compatible_brands', 'encoder')  # metadata that is written anew


def restore_clip(
    source: Path, target: Path, restorer: Restorer, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Restore each frame of a clip by itself.

    Times, shape of pixels, colour tags, sound, subtitles, chapters and metadata stay, and more than 8 bits where the
    encoder has them; rotation is applied. What cannot stay is said in a warning.

    Args:
        source, target: Paths whose suffix is one of ``ENCODERS``; ``target`` is written beside and renamed.
        restorer: Restores the frames.
        progress: Called after each frame with the number of frames done and of all, 0 where the file does not say.

    Raises:
        UserError: PyAV is absent, or ``source`` is no clip with pictures, or is damaged.
    """
    container, encoder = ENCODERS[target.suffix.lower()]
    with _opened(source) as clip:
        target.parent.mkdir(parents=True, exist_ok=True)
        keys = {} if all(key in PLAIN_KEYS for key in clip.metadata) else {'movflags': 'use_metadata_tags'}
        options = keys if container in ('mp4', 'mov') else {}
        with (
            written_beside(target) as aside,
            av().open(str(aside.absolute()), 'w', format=container, options=options) as out,
        ):
            transcoding = _Transcoding(clip, out, encoder, restorer)
            for note in transcoding.run(progress):
                warnings.warn(f'{source}: {note}.', Notice, stacklevel=2)


def clip_size(source: Path) -> tuple[int, int, int]:
    """Number of frames, 0 where the file does not say, height and width of a clip. Errors as :func:`restore_clip`."""
    with _opened(source) as clip:
        video = clip.streams.video[0]
        frames = video.frames or round(float((clip.duration or 0) / 1e6 * (video.average_rate or 0)))
        return frames, video.height, video.width


def av() -> Any:
    """PyAV, an extra."""
    return need('av', 'video', 'clips')


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    try:
        # bytes that are no UTF-8 stay as they are; PyAV 19 does so by itself
        odd = {'metadata_errors': 'surrogateescape'} if int(av().__version__.split('.')[0]) < 19 else {}
        # its whole path: FFmpeg takes `12:30.mp4` for an address
        with av().open(str(source.absolute()), **odd) as clip:
            if not clip.streams.video:
                raise UserError(f'{source} has no pictures.')
            if clip.streams.video[0].format is None:
                raise UserError(f'{source}: damaged: it has no frame that could be read.')
            yield clip
    except av().FFmpegError as error:
        raise UserError(f'{source}: not a clip, or damaged: {error.strerror}.') from error


class _Transcoding:
    """One clip on its way into another file."""

    def __init__(self, clip: Any, out: Any, encoder: str, restorer: Restorer) -> None:
        self.clip, self.out, self.restorer = clip, out, restorer
        self.video = clip.streams.video[0]
        self.notes: list[str] = []
        self.stream = out.add_stream(encoder, rate=self.video.average_rate, options={'crf': CRF})
        # other streams before the first frame: a container wants all declared, and the size is known with that frame
        self.copied = {stream: self._copy(stream) for stream in (*clip.streams.audio, *clip.streams.subtitles)}
        self.copied = {stream: copy for stream, copy in self.copied.items() if copy}
        chapters = len(clip.streams.data) if clip.chapters() else 0  # a track that MP4 keeps their titles in
        left = len(clip.streams) - 1 - len(self.copied) - chapters
        if left:
            self.notes.append(f'{left} of its streams cannot be copied, and are dropped')
        self._copy_metadata()
        self.encoded = {known.name for known in self.stream.codec_context.codec.video_formats}
        self.wide = self._is_wide()

    def run(self, progress: Callable[[int, int], None]) -> list[str]:
        """Restore all; returns what could not stay."""
        waiting, done, broken = [], 0, 0
        for packet in self.clip.demux(self.video, *self.copied):
            if packet.stream in self.copied:
                if packet.dts is not None:
                    packet.stream = self.copied[packet.stream]
                    waiting.append(packet)
                continue
            for frame in packet.decode():
                broken += frame.is_corrupt
                restored = self._restored(frame)
                if not done:
                    self._describe(restored, frame)
                elif (restored.width, restored.height) != (self.stream.width, self.stream.height):
                    raise UserError('its frames change their size.')
                self.out.mux(self.stream.encode(restored))
                done += 1
                progress(done, self.video.frames)
            if done:
                self.out.mux(waiting)
                waiting = []
        if done:
            self.out.mux(self.stream.encode(None))
            self.out.mux(waiting)
        missing = self._missing(done)
        if broken or missing:
            raise UserError(f'damaged: of {done + missing} frames {broken} are broken and {missing} are missing.')
        return self.notes

    def _missing(self, done: int) -> int:
        """How many frames there should be beyond ``done``; where the file says but how long it is, about."""
        if self.video.frames:
            return max(self.video.frames - done, 0)
        starts = [s.start_time * s.time_base for s in self.clip.streams if s.start_time is not None]
        length = self.video.duration or self.video.metadata.get('DURATION')
        if isinstance(length, str):
            hours, minutes, seconds = length.split(':')
            length = 3600 * int(hours) + 60 * int(minutes) + float(seconds) - float(min(starts, default=0))
        elif length is not None:
            length = float(length * self.video.time_base)
        about = round(length * float(self.video.average_rate or 0)) if length else done
        return about - done if about > 1.1 * done + 2 else 0

    def _copy(self, stream: Any) -> Any:
        try:
            copy = self.out.add_stream_from_template(stream)
        except (ValueError, av().FFmpegError):  # this container does not take it
            return None
        copy.metadata.update(stream.metadata)
        copy.disposition = stream.disposition
        return copy

    def _copy_metadata(self) -> None:
        for source, target in ((self.clip, self.out), (self.video, self.stream)):
            kept = {key: text for key, text in source.metadata.items() if key.lower() not in OF_THE_CONTAINER}
            target.metadata.update({key: text for key, text in kept.items() if key.upper() != 'DURATION'})
        if chapters := self.clip.chapters():
            self.out.set_chapters(chapters)

    def _is_wide(self) -> bool:
        """Whether frames go through 16 bits a channel, as they have more than 8."""
        if self.video.format.has_palette or any(part.is_alpha for part in self.video.format.components):
            self.notes.append('its transparency, or palette, is dropped')
        bits = max((part.bits for part in self.video.format.components), default=8)
        can = f'yuv420p{WIDE}' in self.encoded
        if bits > 8 and not can:
            self.notes.append(f'its {bits} bits become 8, which is all that the encoder of this container has')
        elif bits > 10:
            self.notes.append(f'its {bits} bits become 10')
        if (far := FAR_FROM_SRGB.get(self.video.codec_context.color_trc)) is not None:
            self.notes.append(f'its values are {far}; they are restored as if they were sRGB, and stay tagged so')
        return bits > 8 and can

    def _restored(self, frame: Any) -> Any:
        kind = 'rgb48le' if self.wide else 'rgb24'
        pixels = frame.reformat(format=kind, interpolation=CONVERSION).to_ndarray()
        pixels = np.ascontiguousarray(_turned(pixels, frame))
        restored = type(frame).from_ndarray(restore(pixels, self.restorer), format=kind)
        colour = self._colour_of(frame, restored)
        matrix, colour_range = self._tags(frame)
        restored = restored.reformat(
            format=colour + WIDE * self.wide,
            dst_colorspace=matrix,
            dst_color_range=colour_range,
            interpolation=CONVERSION,
        )
        restored.pts, restored.time_base = frame.pts, frame.time_base
        return restored

    def _colour_of(self, frame: Any, restored: Any) -> str:
        """Planes of colour as large as the clip has them; whole where half the size is none."""
        halves = [frame.format.chroma_width(8) < 8, frame.format.chroma_height(8) < 8]
        if _swaps_sides(frame):
            halves.reverse()
        kind = {(True, False): 'yuv422p', (False, False): 'yuv444p'}.get(tuple(halves), 'yuv420p')
        if frame.format.is_rgb:
            kind = 'yuv420p'
        if restored.width % 2 or restored.height % 2 or kind + WIDE * self.wide not in self.encoded:
            kind = 'yuv444p' if restored.width % 2 or restored.height % 2 else 'yuv420p'
        return kind

    def _describe(self, restored: Any, frame: Any) -> None:
        stream, context = self.stream, self.stream.codec_context
        stream.width, stream.height, stream.pix_fmt = restored.width, restored.height, restored.format.name
        stream.time_base = context.time_base = self.video.time_base
        for tag in COLOUR_TAGS:
            setattr(context, tag, getattr(self.video.codec_context, tag))
        context.colorspace, context.color_range = self._tags(frame)
        shape = self.video.sample_aspect_ratio
        if shape:
            context.sample_aspect_ratio = 1 / shape if _swaps_sides(frame) else shape

    def _tags(self, frame: Any) -> tuple[int, int]:
        """Matrix and range to code the result with: those of the clip; ours for one of RGB, which has none."""
        return (BT709, LIMITED) if frame.colorspace == RGB else (frame.colorspace, frame.color_range)


def _matrix(frame: Any) -> np.ndarray:
    """How a player shows the frame: the upper left of its display matrix, rounded to whole numbers."""
    data = frame.side_data.get('DISPLAYMATRIX')
    if data is None:
        return np.eye(2, dtype=int)
    matrix = np.frombuffer(bytes(data), np.int32).reshape(3, 3)[:2, :2] / 2**16
    rounded = np.round(matrix).astype(int)
    if np.abs(matrix - rounded).max() > 0.01 or abs(round(np.linalg.det(rounded))) != 1:
        raise UserError('it is shown turned by an angle that is none of 90 degrees.')
    return rounded


def _swaps_sides(frame: Any) -> bool:
    return not _matrix(frame)[0, 0]


def _turned(pixels: np.ndarray, frame: Any) -> np.ndarray:
    """Pixels ``(H, W, 3)`` as a player shows them: turned, or mirrored."""
    (a, b), (c, d) = _matrix(frame)
    if a:
        return pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1]
    return pixels.swapaxes(0, 1)[:: 1 if b > 0 else -1, :: 1 if c > 0 else -1]
