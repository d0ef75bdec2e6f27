import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from cea_arch.compat import HAS_BASICSR  # noqa: E402  before any test imports basicsr

if not HAS_BASICSR:  # Python 3.13 and later: layers and networks alone
    collect_ignore = [f'test_{name}.py' for name in ('data', 'degradations', 'metrics', 'options', 'training')]

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope='module')
def one_thread():
    """For images so small that threads wait longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session')
def photographs():
    """Colour photographs that scikit-image carries: file bytes by name."""
    from importlib import resources

    folder = resources.files('skimage') / 'data'
    return {name: (folder / name).read_bytes() for name in ('astronaut.png', 'chelsea.png', 'coffee.png')}


@pytest.fixture(scope='session')
def photograph(photographs):
    """chelsea, RGB uint8 (300, 451, 3)."""
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(photographs['chelsea.png'], np.uint8), 1), cv2.COLOR_BGR2RGB)


@pytest.fixture
def image_folder(tmp_path, photograph):
    """Writes crops of a photograph as PNGs: ``image_folder('gt', ['a', 'b'], (48, 64))`` returns the folder."""

    def make(name, keys, size=(48, 64)):
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, key in enumerate(keys):
            crop = photograph[number * 8 :, number * 8 :][: size[0], : size[1]]
            (folder / key).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / f'{key}.png'), crop[..., ::-1])
        return folder

    return make


@pytest.fixture(scope='session')
def shared_data():
    """Real photographs and pairs beside the checkout; tests that need them skip where they are absent."""
    folder = ROOT.parent / 'shared' / 'data'
    if not folder.is_dir():
        pytest.skip('needs the development pictures in ../shared/data')
    return folder
