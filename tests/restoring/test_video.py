"""`cea restore` of clips."""

import numpy as np
import pytest
import torch
from torch import nn

from cea_arch.cli import main
from cea_arch.errors import UserError
from cea_arch.restoring.restorer import Restorer
from cea_arch.restoring.video import ENCODERS, restore_clip

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
    assert '--compare and --maps are for pictures' in capsys.readouterr().err


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
