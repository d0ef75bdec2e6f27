"""`cea restore` of clips."""

import struct
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.restoring.restorer import Restorer
from cea_arch.restoring.video import ENCODERS, clip_size, restore_clip

av = pytest.importorskip('av', reason='needs the extra: pip install -e ".[video]"')
pytestmark = pytest.mark.usefixtures('one_thread')
FRAMES = 6


def write_clip(path, size=(48, 64), rate=12, colour_range='MPEG', sound=True, photograph=None):
    """A clip of a photograph that moves, with a tone; returns its frames, RGB."""
    pictures = [photograph[i * 2 : i * 2 + size[0], 60 : 60 + size[1]] for i in range(FRAMES)]
    kind, encoder = ENCODERS[path.suffix]
    with av.open(str(path), 'w', format=kind) as out:
        video = out.add_stream(encoder, rate=rate, options={'crf': '5'})
        video.width, video.height = size[1], size[0]
        video.pix_fmt = 'yuv444p' if size[0] % 2 or size[1] % 2 else 'yuv420p'
        video.codec_context.color_range = av.video.reformatter.ColorRange[colour_range]
        video.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        audio = out.add_stream('libopus' if path.suffix == '.webm' else 'aac', rate=48000) if sound else None
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')
            out.mux(
                video.encode(
                    frame.reformat(
                        format=video.pix_fmt,
                        dst_colorspace=video.codec_context.colorspace,
                        dst_color_range=video.codec_context.color_range,
                    )
                )
            )
        out.mux(video.encode(None))
        if sound:
            tone = np.sin(np.arange(24000) / 20, dtype=np.float32)[None]
            frame = av.AudioFrame.from_ndarray(np.repeat(tone, 2, 0), format='fltp', layout='stereo')
            frame.sample_rate = 48000
            out.mux([*audio.encode(frame), *audio.encode(None)])
    return read_clip(path)[0]


def read_clip(path):
    """Frames, RGB; their times; what the stream says; the packets of the sound."""
    with av.open(str(path)) as clip:
        video = clip.streams.video[0]
        said = (video.average_rate, video.codec_context.color_range, video.codec_context.colorspace)
        frames, times, sound = [], [], []
        for packet in clip.demux():
            if packet.stream is not video:
                sound += [bytes(packet)] * (packet.dts is not None)
                continue
            for frame in packet.decode():
                frames.append(frame.to_ndarray(format='rgb24'))
                times.append(float(frame.time))
    return np.stack(frames).astype(int), times, said, sound


@pytest.mark.parametrize(
    ('suffix', 'size', 'colour_range'),
    [('.mp4', (48, 64), 'MPEG'), ('.mp4', (48, 64), 'JPEG'), ('.mkv', (33, 45), 'MPEG'), ('.webm', (48, 64), 'MPEG')],
)
def test_times_colours_and_sound_stay(tmp_path, photograph, suffix, size, colour_range):
    source, target = tmp_path / f'a{suffix}', tmp_path / f'b{suffix}'
    write_clip(source, size, colour_range=colour_range, photograph=photograph)
    seen = []
    restore_clip(source, target, Restorer(nn.Identity(), 'cpu'), lambda done, total: seen.append((done, total)))
    before, after = read_clip(source), read_clip(target)
    assert after[0].shape == (FRAMES, *size, 3)
    assert np.abs(after[0] - before[0]).mean() < 3  # codecs lose a little, a wrong range 10 levels
    assert abs((after[0] - before[0]).mean()) < 1
    assert after[1] == pytest.approx(before[1], abs=1e-3)
    assert after[2] == before[2]
    assert after[3] == before[3] != []
    assert [done for done, _ in seen] == [1, 2, 3, 4, 5, 6]


def write_odd_clip(path, photograph, shape=None, kind='yuv420p', encoder='libx264', transfer=None):
    """A clip of pixels that are not square, of another pixel format, with metadata, a chapter and subtitles."""
    with av.open(str(path), 'w', format=ENCODERS[path.suffix][0]) as out:
        video = out.add_stream(encoder, rate=12, options={'crf': '5', 'qp': '0'})
        video.width, video.height, video.pix_fmt = 64, 48, kind
        if shape:
            video.codec_context.sample_aspect_ratio = shape
        if transfer:
            video.codec_context.color_trc = transfer
        out.metadata.update({'title': 'Zoë 山田', 'creation_time': '2024-05-06T07:08:09.000000Z'})
        audio = out.add_stream('aac', rate=48000)
        audio.metadata['language'] = 'deu'
        spoken = path.with_suffix('.srt')
        spoken.write_text('1\n00:00:00,100 --> 00:00:00,400\nGuten Tag, Zoë\n', 'utf-8')
        words = av.open(str(spoken)) if path.suffix == '.mkv' else None  # MP4 has subtitles of its own kind alone
        subtitles = out.add_stream_from_template(words.streams.subtitles[0]) if words else None
        second = Fraction(1, 1000)
        out.set_chapters([{'id': 1, 'start': 0, 'end': 300, 'time_base': second, 'metadata': {'title': 'first'}}])
        for i in range(FRAMES):
            picture = np.ascontiguousarray(photograph[i * 2 : i * 2 + 48, 60:124])
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint16) * 257, format='rgb48le')
            out.mux(video.encode(frame.reformat(format=kind)))
        out.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 24000), np.float32), format='fltp', layout='stereo')
        frame.sample_rate = 48000
        out.mux([*audio.encode(frame), *audio.encode(None)])
        for packet in words.demux() if words else ():
            if packet.dts is not None:
                packet.stream = subtitles
                out.mux(packet)


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_what_a_clip_says_of_itself_stays(tmp_path, photograph, suffix):
    source, target = tmp_path / f'a{suffix}', tmp_path / f'b{suffix}'
    write_odd_clip(source, photograph, Fraction(32, 27))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        restore_clip(source, target, Restorer(nn.Identity(), 'cpu'))
    with av.open(str(source)) as before, av.open(str(target)) as after:
        assert after.streams.video[0].sample_aspect_ratio == Fraction(32, 27)
        for name in ('title', 'creation_time'):
            found = {key.lower(): text for key, text in after.metadata.items()}
            assert found[name] == {key.lower(): text for key, text in before.metadata.items()}[name]
        assert after.streams.audio[0].language == 'deu'
        assert [chapter['metadata']['title'] for chapter in after.chapters()] == ['first']
        assert [c['end'] * c['time_base'] for c in after.chapters()] == [Fraction(3, 10)]
        if suffix == '.mkv':
            spoken = [bytes(packet) for packet in after.demux(subtitles=0) if packet.dts is not None]
            assert spoken == ['Guten Tag, Zoë'.encode()]
    frames, height, width = clip_size(target)
    assert FRAMES <= frames <= FRAMES + 1  # Matroska says but how long it is, its sound included
    assert (height, width) == (48, 64)


@pytest.mark.parametrize('kind', ['yuv420p10le', 'gbrp', 'yuv444p'])
def test_pixel_formats_of_clips(tmp_path, photograph, kind):
    source, target = tmp_path / 'a.mkv', tmp_path / 'b.mkv'
    encoder = 'libx264rgb' if kind == 'gbrp' else 'libx264'
    write_odd_clip(source, photograph, kind='rgb24' if kind == 'gbrp' else kind, encoder=encoder)
    restore_clip(source, target, Restorer(nn.Identity(), 'cpu'))
    (before, _, _, _), (after, _, said, _) = read_clip(source), read_clip(target)
    assert np.abs(after - before).mean() < 4
    assert np.abs((after - before).mean(axis=(0, 1, 2))).max() < 2  # reading rounds down
    with av.open(str(target)) as clip:
        assert clip.streams.video[0].format.name == ('yuv420p' if kind == 'gbrp' else kind)
    assert said[2] == (1 if kind == 'gbrp' else 2)  # BT.709, and unspecified


MATRICES = {
    'as it is': (1, 0, 0, 1),
    'mirrored': (-1, 0, 0, 1),
    'upside down and mirrored': (1, 0, 0, -1),
    '90': (0, 1, -1, 0),
    '180': (-1, 0, 0, -1),
    '270': (0, -1, 1, 0),
    'transposed': (0, 1, 1, 0),
    'other diagonal': (0, -1, -1, 0),
}


def with_matrix(path, matrix):
    """The MP4 with another display matrix in its track's header."""
    data = bytearray(path.read_bytes())
    at = data.index(b'tkhd') + 44
    a, b, c, d = (round(value * 2**16) for value in matrix)
    data[at : at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize('matrix', MATRICES.values(), ids=MATRICES)
def test_clips_are_turned_and_mirrored_as_players_do(tmp_path, photograph, matrix):
    before = write_clip(tmp_path / 'a.mp4', sound=False, photograph=photograph)[0]
    with_matrix(tmp_path / 'a.mp4', matrix)
    restore_clip(tmp_path / 'a.mp4', tmp_path / 'b.mp4', Restorer(nn.Identity(), 'cpu'))
    after = read_clip(tmp_path / 'b.mp4')[0][0]
    a, b, c, d = matrix
    rows, columns = np.mgrid[: before.shape[0], : before.shape[1]]
    x, y = a * columns + c * rows, b * columns + d * rows  # where a player shows each pixel
    shown = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1, 3), int)
    shown[y - y.min(), x - x.min()] = before
    assert after.shape == shown.shape
    assert np.abs(after - shown).mean() < 4
    with_matrix(tmp_path / 'a.mp4', (0.7071, 0.7071, -0.7071, 0.7071))
    with pytest.raises(UserError, match='an angle that is none of 90 degrees'):
        restore_clip(tmp_path / 'a.mp4', tmp_path / 'c.mp4', Restorer(nn.Identity(), 'cpu'))


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_damaged_clips_are_refused(tmp_path, photograph, suffix):
    source = tmp_path / f'a{suffix}'
    write_clip(source, sound=False, photograph=photograph)
    with av.open(str(source)) as clip:
        packets = [packet for packet in clip.demux(video=0) if packet.size]
        content = bytes(packets[0])
    data = source.read_bytes()
    at = data.index(content) + len(content) // 2
    source.write_bytes(data[:at] + bytes(255 - value for value in data[at : at + 20]) + data[at + 20 :])
    with pytest.raises(UserError, match=r'damaged: of 6 frames [1-6] are broken and 0 are missing'):
        restore_clip(source, tmp_path / f'b{suffix}', Restorer(nn.Identity(), 'cpu'))
    assert not (tmp_path / f'b{suffix}').exists()


def test_a_clip_cut_in_two_is_refused(tmp_path, photograph):
    source = tmp_path / '12:30.mkv'
    write_odd_clip(source, photograph)
    restore_clip(source, tmp_path / 'b.mkv', Restorer(nn.Identity(), 'cpu'))
    with av.open(str(source)) as clip:
        second = bytes([packet for packet in clip.demux(video=0) if packet.size][1])
    data = source.read_bytes()
    source.write_bytes(data[: data.index(second) + len(second)])
    with pytest.raises(UserError, match=r'damaged: of [67] frames 0 are broken and [345] are missing'):
        restore_clip(source, tmp_path / 'c.mkv', Restorer(nn.Identity(), 'cpu'))


def test_what_a_clip_loses_is_said(tmp_path, photograph):
    write_odd_clip(tmp_path / 'a.mkv', photograph, kind='yuv420p10le', transfer=16)
    with pytest.warns(UserWarning, match=r'a\.mkv: its values are PQ; they are restored as if they were sRGB'):
        restore_clip(tmp_path / 'a.mkv', tmp_path / 'b.mkv', Restorer(nn.Identity(), 'cpu'))
    with av.open(str(tmp_path / 'b.mkv')) as clip:
        assert clip.streams.video[0].codec_context.color_trc == 16
    (tmp_path / 'c.mkv').write_bytes((tmp_path / 'a.mkv').read_bytes())
    with pytest.warns(UserWarning, match=r'c\.mkv') as said:
        restore_clip(tmp_path / 'c.mkv', tmp_path / 'd.webm', Restorer(nn.Identity(), 'cpu'))
    words = [str(warning.message) for warning in said]
    assert f'{tmp_path}/c.mkv: its 10 bits become 8, which is all that the encoder of this container has.' in words
    assert f'{tmp_path}/c.mkv: 2 of its streams cannot be copied, and are dropped.' in words


def test_frames_are_restored_and_enlarged(tmp_path, photograph):
    class Darker(nn.Module):
        def forward(self, x):
            return nn.functional.interpolate(x * 0.5, scale_factor=2)

    before = write_clip(tmp_path / 'a.mp4', sound=False, photograph=photograph)
    restore_clip(tmp_path / 'a.mp4', tmp_path / 'b.mp4', Restorer(Darker(), 'cpu'))
    after = read_clip(tmp_path / 'b.mp4')[0]
    assert after.shape == (FRAMES, 96, 128, 3)
    assert np.abs(after[:, ::2, ::2] - before / 2).mean() < 4


def test_the_command_restores_clips_beside_pictures(model, tmp_path, photograph, capsys):
    write_clip(tmp_path / 'a.mp4', photograph=photograph)
    (tmp_path / 'cut.mp4').write_bytes((tmp_path / 'a.mp4').read_bytes()[:300])
    clips = [str(tmp_path / name) for name in ('a.mp4', 'cut.mp4')]
    words = ['-m', model, '-o', str(tmp_path / 'out'), '--device', 'cpu']
    assert main(['restore', *clips, *words]) == 1
    said = capsys.readouterr()
    assert 'cut.mp4: not a clip, or damaged' in said.err
    assert '1 restored to' in said.out
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['a.mp4']
    assert np.abs(read_clip(tmp_path / 'out' / 'a.mp4')[0] - read_clip(clips[0])[0]).mean() > 4
    assert main(['restore', clips[0], *words]) == 1
    assert 'a.mp4 exists; --overwrite replaces it' in capsys.readouterr().err
    assert main(['restore', clips[0], *words, '--maps']) == 1
    assert '--compare, --maps and --adapt are for pictures' in capsys.readouterr().err


def test_mistakes_are_named(tmp_path, monkeypatch):
    with av.open(str(tmp_path / 'a.mp4'), 'w') as out:
        audio = out.add_stream('aac', rate=48000)
        frame = av.AudioFrame.from_ndarray(torch.zeros(1, 4800).numpy(), format='fltp', layout='mono')
        frame.sample_rate = 48000
        out.mux([*audio.encode(frame), *audio.encode(None)])
    with pytest.raises(UserError, match='has no pictures'):
        restore_clip(tmp_path / 'a.mp4', tmp_path / 'b.mp4', Restorer(nn.Identity(), 'cpu'))
    monkeypatch.setitem(__import__('sys').modules, 'av', None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[video\]"'):
        restore_clip(tmp_path / 'a.mp4', tmp_path / 'b.mp4', Restorer(nn.Identity(), 'cpu'))
