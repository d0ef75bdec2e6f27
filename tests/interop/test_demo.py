"""`cea demo`: the page's functions, and the page itself in a browser."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from torch import nn

from cea_arch.cli import main
from cea_arch.data.pictures import Picture, read_picture
from cea_arch.errors import UserError
from cea_arch.interop import demo
from cea_arch.restoring.restorer import Restorer, restore
from cea_arch.restoring.writing import write_picture

pytestmark = pytest.mark.usefixtures('one_thread')
BROWSER, DRIVER = (shutil.which(name) for name in ('chromium', 'chromedriver'))


@pytest.fixture
def upload(tmp_path, photograph):
    write_picture(tmp_path / 'cat.png', Picture(np.ascontiguousarray(photograph[60:180, 100:260]), 'PNG'))
    return tmp_path / 'cat.png'


def test_a_picture_is_restored_as_the_library_does(small_net, upload, tmp_path):
    restorer = Restorer(small_net, 'cpu')
    before, after, maps, file = demo.restore_upload(restorer, str(upload), [], 0, tmp_path)
    source = read_picture(upload).pixels
    assert np.array_equal(before, source)
    assert np.array_equal(after, restore(source, Restorer(small_net, 'cpu')))
    assert np.array_equal(read_picture(file).pixels, after)
    assert file.name == 'cat_restored.png'
    assert maps.shape == (3 * 128, 3 * 168, 3)


def test_degradations_mix_and_repeat(small_net, upload, tmp_path):
    restorer = Restorer(small_net, 'cpu')

    def before(tasks, seed):
        return demo.restore_upload(restorer, str(upload), tasks, seed, tmp_path)[0].astype(int)

    source, noisy, again, other, hazy = (
        before(*words) for words in (([], 0), (['noise'], 1), (['noise'], 1), (['noise'], 2), (['noise', 'haze'], 1))
    )
    assert np.array_equal(noisy, again)
    assert 2 < np.abs(noisy - source).mean() < 60
    assert np.abs(noisy - other).mean() > 2
    assert hazy.std() < noisy.std()


def test_other_networks_and_mistakes(upload, tmp_path, monkeypatch, capsys):
    restorer = Restorer(nn.Upsample(scale_factor=2), 'cpu')
    before, after, maps, _ = demo.restore_upload(restorer, str(upload), [], 0, tmp_path)
    assert before.shape == after.shape == (240, 320, 3)
    assert maps is None
    with pytest.raises(UserError, match='choose a picture first'):
        demo.restore_upload(restorer, None, [], 0, tmp_path)
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[demo\]"'):
        demo.build_page(restorer, tmp_path)
    assert main(['demo']) == 2
    assert 'pip install -e ".[demo]"' in capsys.readouterr().err


def test_the_page_in_a_browser(small_net, upload, tmp_path):
    pytest.importorskip('gradio', reason='needs the extra: pip install -e ".[demo]"')
    webdriver = pytest.importorskip('selenium.webdriver', reason='needs selenium: pip install selenium')
    if not (BROWSER and DRIVER):
        pytest.skip('needs chromium and chromedriver, Debian packages chromium and chromium-driver')
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    page = demo.serve(demo.build_page(Restorer(small_net, 'cpu'), tmp_path))
    assert page.local_url.startswith('http://127.0.0.1:')
    assert page.share_url is None
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for word in ('--headless=new', '--no-sandbox', '--window-size=1300,1300', '--disable-dev-shm-usage'):
        options.add_argument(word)
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        browser.get(page.local_url)
        wait = WebDriverWait(browser, 90)
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, 'input[type=file]'))[0].send_keys(str(upload))
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, 'img[src*="cat.png"]'))
        next(e for e in browser.find_elements(By.CSS_SELECTOR, 'label') if e.text == 'noise').click()
        browser.find_element(By.ID, 'restore').click()
        wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, '#result img[src]')) == 2)
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, '#maps img[src]'))
        wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, '#download:not([disabled])'))
        script = 'return [...document.querySelectorAll("#result img, #maps img")].every(i => i.naturalWidth > 0)'
        wait.until(lambda b: b.execute_script(script))
        asked = browser.execute_script('return performance.getEntriesByType("resource").map(e => new URL(e.name).host)')
        browser.save_screenshot(str(tmp_path / 'page.png'))
    finally:
        browser.quit()
        page.close()
    assert set(asked) <= {page.local_url.split('/')[2], ''}, 'the page asks other machines'
    (written,) = tmp_path.glob('*/cat_restored.png')
    with Image.open(written) as found:
        assert found.size == (160, 120)
    with Image.open(tmp_path / 'page.png') as shot:
        assert np.asarray(shot.convert('L')).std() > 10
