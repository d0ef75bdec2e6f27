"""Trees that imitate the layouts in which people have the public sets, and what plants and reads them."""

from cea_arch.data import prepare
from cea_arch.data.image_store import decode

SEQUENCE = 'GOPR0372_07_00'


def both(gt, lq):
    """Paths of ground truths and degraded images, as two lists."""
    return gt.split(), lq.split()


# by set and split: the layout's name, ground truths, degraded images; all in the names that are published
RAW = {
    ('BSD400', 'train'): ('raw', both('BSD400/8068.jpg BSD400/117025.jpg', '')),
    ('WED', 'train'): ('raw', both('exploration_database_and_code/pristine_images/00001.bmp', '')),
    ('CBSD68', 'test'): ('raw', both('CBSD68/original_png/3096.png CBSD68/original_png/101085.png', '')),
    ('Kodak24', 'test'): ('raw', both('Kodak24/kodim01.png', '')),
    ('Urban100', 'test'): ('raw', both('Urban100/img_001.png', '')),
    ('RainTrainL', 'train'): (
        'raw, one folder',
        both('RainTrainL/norain-1.png RainTrainL/norain-10.png', 'RainTrainL/rain-1.png RainTrainL/rain-10.png'),
    ),
    ('Rain100L', 'test'): (
        'raw, one folder',
        both(
            'Rain100L/norain-001.png Rain100L/norain-002.png', 'Rain100L/rainy/rain-001.png Rain100L/rainy/rain-002.png'
        ),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'raw',
        both('OTS_BETA/clear/0025.jpg', 'OTS_BETA/hazy/part1/0025_0.8_0.04.jpg OTS_BETA/hazy/part4/0025_1_0.2.jpg'),
    ),
    ('SOTS-outdoor', 'test'): (
        'MoCE-IR, raw',
        both('SOTS/outdoor/gt/0001.png', 'SOTS/outdoor/hazy/0001_0.8_0.2.jpg SOTS/outdoor/hazy/0001_0.9_0.1.jpg'),
    ),
    ('GoPro', 'train'): (
        'raw',
        both(
            'GOPRO_Large/train/GOPR0372_07_00/sharp/000047.png GOPRO_Large/train/GOPR0374_11_00/sharp/000047.png',
            'GOPRO_Large/train/GOPR0372_07_00/blur/000047.png GOPRO_Large/train/GOPR0374_11_00/blur/000047.png',
        ),
    ),
    ('GoPro', 'test'): (
        'raw',
        both('GOPRO_Large/test/GOPR0384_11_00/sharp/000001.png', 'GOPRO_Large/test/GOPR0384_11_00/blur/000001.png'),
    ),
    ('LOL-v1', 'train'): ('raw', both('LOL/our485/high/2.png', 'LOL/our485/low/2.png')),
    ('LOL-v1', 'test'): ('raw', both('LOL/eval15/high/1.png', 'LOL/eval15/low/1.png')),
}
PROMPTIR = {
    ('BSD400', 'train'): ('PromptIR, AdaIR, DFPIR', both('Train/Denoise/a8068.jpg Train/Denoise/a117025.jpg', '')),
    ('WED', 'train'): ('PromptIR, AdaIR, DFPIR', both('Train/Denoise/00001.bmp Train/Denoise/04744.bmp', '')),
    ('CBSD68', 'test'): ('PromptIR, AdaIR, DFPIR', both('test/denoise/bsd68/3096.jpg', '')),
    ('RainTrainL', 'train'): (
        'PromptIR, AdaIR, DFPIR',
        both('Train/Derain/gt/norain-1.png', 'Train/Derain/rainy/rain-1.png'),
    ),
    ('Rain100L', 'test'): (
        'PromptIR, AdaIR, DFPIR',
        both('test/derain/Rain100L/target/1.png', 'test/derain/Rain100L/input/1.png'),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'PromptIR, AdaIR, DFPIR',
        both(
            'Train/Dehaze/original/0025.png',
            'Train/Dehaze/synthetic/part1/0025_0.8_0.04.jpg Train/Dehaze/synthetic/part2/0025_1_0.2.jpg',
        ),
    ),
    ('SOTS-outdoor', 'test'): (
        'PromptIR, AdaIR, DFPIR',
        both('test/dehaze/target/0001.png', 'test/dehaze/input/0001_0.8_0.2.jpg'),
    ),
    ('GoPro', 'train'): (
        'AdaIR',
        both('Train/Deblur/sharp/GOPR0372_07_00_000047.png', 'Train/Deblur/blur/GOPR0372_07_00_000047.png'),
    ),
    ('GoPro', 'test'): (
        'AdaIR',
        both('test/deblur/gopro/target/GOPR0384_11_00_000001.png', 'test/deblur/gopro/input/GOPR0384_11_00_000001.png'),
    ),
    ('LOL-v1', 'train'): ('AdaIR', both('Train/Enhance/gt/2.png', 'Train/Enhance/low/2.png')),
    ('LOL-v1', 'test'): ('AdaIR', both('test/enhance/lol/target/1.png', 'test/enhance/lol/input/1.png')),
}
MOCE = {
    ('BSD400', 'train'): ('MoCE-IR', both('denoising/BSD400/8068.jpg', '')),
    ('WED', 'train'): ('MoCE-IR', both('denoising/WaterlooED/00001.bmp', '')),
    ('CBSD68', 'test'): ('MoCE-IR', both('denoising/cBSD68/original_png/0000.png', '')),
    ('RainTrainL', 'train'): (
        'MoCE-IR',
        both('deraining/RainTrainL/gt/norain-1.png', 'deraining/RainTrainL/rainy/rain-1.png'),
    ),
    ('Rain100L', 'test'): (
        'MoCE-IR',
        both('deraining/Rain100L/gt/norain-001.png', 'deraining/Rain100L/rainy/rain-001.png'),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'MoCE-IR',
        both('dehazing/RESIDE/clear/0025.jpg', 'dehazing/RESIDE/part1/0025_0.8_0.04.jpg'),
    ),
    ('SOTS-outdoor', 'test'): (
        'MoCE-IR, raw',
        both('dehazing/SOTS/outdoor/gt/0001.png', 'dehazing/SOTS/outdoor/hazy/0001_0.8_0.2.jpg'),
    ),
    ('GoPro', 'train'): (
        'MoCE-IR, Restormer (crops)',
        both(
            'deblurring/GoPro/crop/train/target_crops/GOPR0372_07_00_000047-1.png',
            'deblurring/GoPro/crop/train/input_crops/GOPR0372_07_00_000047-1.png',
        ),
    ),
    ('GoPro', 'test'): (
        'MoCE-IR, Restormer',
        both(
            'deblurring/GoPro/test/target/GOPR0384_11_00_000001.png',
            'deblurring/GoPro/test/input/GOPR0384_11_00_000001.png',
        ),
    ),
    ('LOL-v1', 'train'): ('MoCE-IR', both('llie/LOLv1/Train/target/2.png', 'llie/LOLv1/Train/input/2.png')),
    ('LOL-v1', 'test'): ('MoCE-IR', both('llie/LOLv1/Test/target/1.png', 'llie/LOLv1/Test/input/1.png')),
}
DFPIR = {
    ('Rain100L', 'test'): (
        'PromptIR, AdaIR, DFPIR',
        both('test/derain/Rain100L/target/norain-001.png', 'test/derain/Rain100L/input/rain-001.png'),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'PromptIR, AdaIR, DFPIR',
        both('Train/Dehaze/original/0025.jpg', 'Train/Dehaze/synthetic/0025_0.8_0.04.jpg'),
    ),
    ('GoPro', 'train'): (
        'DFPIR',
        both('GOPRO_Large/train/sharp/GOPR0372_07_00_000047.png', 'GOPRO_Large/train/blur/GOPR0372_07_00_000047.png'),
    ),
    ('GoPro', 'test'): (
        'DFPIR',
        both('GOPRO_Large/test/sharp/GOPR0384_11_00_000001.png', 'GOPRO_Large/test/blur/GOPR0384_11_00_000001.png'),
    ),
    ('LOL-v1', 'train'): ('DFPIR', both('train485/high/2.png', 'train485/low/2.png')),
    ('LOL-v1', 'test'): ('DFPIR', both('test15/high/1.png', 'test15/low/1.png')),
}

KAGGLE = {
    ('RainTrainL', 'train'): ('Kaggle', both('Rain100L/train/clean/1.png', 'Rain100L/train/rainy/1.png')),
    ('SOTS-outdoor', 'test'): ('Kaggle', both('outdoor/clear/0001.png', 'outdoor/hazy/0001_0.8_0.2.jpg')),
    ('GoPro', 'train'): (
        'NAFNet (crops)',
        both(
            'GoPro/train/sharp_crops/GOPR0372_07_00_000047_s001.png',
            'GoPro/train/blur_crops/GOPR0372_07_00_000047_s001.png',
        ),
    ),
    ('LOL-v1', 'train'): ('Kaggle', both('LOLdataset/train/high/2.png', 'LOLdataset/train/low/2.png')),
    ('LOL-v1', 'test'): ('Kaggle', both('LOLdataset/test/high/1.png', 'LOLdataset/test/low/1.png')),
}
AIRNET = {
    ('CBSD68', 'test'): ('AirNet', both('test/denoise/101085.png test/denoise/00003.png', '')),
    ('Rain100L', 'test'): ('AirNet', both('test/derain/target/norain-001.png', 'test/derain/input/rain-001.png')),
    ('SOTS-outdoor', 'test'): (
        'RESIDE-outdoor',
        both('reside-outdoor/test/gt/0001.png', 'reside-outdoor/test/hazy/0001_0.8_0.2.jpg'),
    ),
    ('RESIDE-beta OTS', 'train'): (
        'RESIDE-outdoor',
        both('reside-outdoor/train/gt/0025.png', 'reside-outdoor/train/hazy/0025_0.8_0.04.jpg'),
    ),
}


def plant_tree(plant, tree):
    for _, (gt, lq) in tree.values():
        for path in gt:
            plant(path)
        for number, path in enumerate(lq):
            plant(path, gt[number] if len(gt) == len(lq) else gt[0], version=number + 1)


def read(path):
    return decode(path.read_bytes(), str(path))


def run(benchmark, tmp_path, *more):
    return prepare.main(benchmark, ['--raw', str(tmp_path / 'raw'), '--output', str(tmp_path / 'out'), *more])
