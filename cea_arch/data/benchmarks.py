"""The image sets of AIO-3, AIO-5 and CDD-11: counts, names and folders, where to be had, under which licence.

Counts and folder names are those of the sets as published and of the layouts that PromptIR, AdaIR, DFPIR and MoCE-IR
ask for. Licences are given to the best of our knowledge; the page of the set decides.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

CDD11_CLASSES = (
    *('low', 'haze', 'rain', 'snow'),
    *('low_haze', 'low_rain', 'low_snow', 'haze_rain', 'haze_snow'),
    *('low_haze_rain', 'low_haze_snow'),
)


@dataclass(frozen=True)
class Layout:
    """Where the images of a set lie, in one of the ways in which people have it.

    Attributes:
        name: Whose layout it is.
        gt, lq: Patterns over the end of a path without its suffix, letter case aside: ``*`` and ``?`` stay within a
            folder, ``**/`` crosses folders, ``{a,b}`` are alternatives, ``[0-9]`` a class, ``<role>`` is the role.
        nested: An image's name is made of the folder two above and its file: ``GOPR0372_07_00/blur/000047``.
        expected, store: Other than the set's.
    """

    name: str
    gt: str
    lq: str = ''
    nested: bool = False
    expected: int | None = None
    store: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """A published set of images or pairs.

    Attributes:
        name, split: As in the check's table; the split is ``train`` or ``test``.
        expected: Pairs of each degraded role, or images where there is no degraded role.
        store: The LMDB below the output folder, without its suffix; ``<role>`` stands for the role.
        source, licence: Where it is to be had, and on which terms.
        layouts: The first one wins where two hold as many images.
        roles: The ground truth, then the degraded versions.
        shares_gt: Several degraded images belong to one ground truth, which is stored once, under its own name.
        optional: Nothing is missing where it is absent.
        scenes: How many ground truths the published pairs have, where fewer than pairs.
        releases: Other counts that were published, and what they are.
        task: What the degraded images suffer from: ``rain``, ``haze``, ``blur`` or ``low``; else the role says it.
    """

    name: str
    split: str
    expected: int
    store: str
    source: str
    licence: str
    layouts: tuple[Layout, ...]
    roles: tuple[str, ...] = ('gt', 'lq')
    shares_gt: bool = False
    optional: bool = False
    scenes: int | None = None
    task: str = ''
    releases: dict[int, str] = field(default_factory=dict)

    def stored_keys(self, lq: str, gt: str) -> tuple[str, str]:
        """Keys of a pair in the LMDBs of degraded images and ground truths; equal where pairs are one to one."""
        if self.shares_gt:
            return lq, gt
        return (gt, gt) if len(self.roles) > 2 else (lq, lq)


@cache
def path_patterns(glob: str, role: str) -> tuple[re.Pattern, re.Pattern]:
    """Compile a pattern of :class:`Layout`: for folders, which end in ``/``, and for names of files without suffix."""
    folder, slash, name = glob.rpartition('/')
    folder, name = (
        ''.join(map(_translate, _SPECIAL.split(part.replace('<role>', role)))) for part in (folder + slash, name)
    )
    return re.compile('(?:.*/)?' + folder, re.IGNORECASE), re.compile(name, re.IGNORECASE)


def _translate(part: str) -> str:
    if part.startswith('{'):
        return '(?:' + '|'.join(re.escape(word) for word in part[1:-1].split(',')) + ')'
    if part.startswith('['):
        return part
    return {'**/': '(?:.*/)?', '*': '[^/]*', '?': '[^/]'}.get(part, re.escape(part))


_SPECIAL = re.compile(r'(\*\*/|\*|\?|\[[^]]*\]|\{[^}]*\})')
_BSD_LICENCE = 'non-commercial research and education'
_NO_LICENCE = 'none stated that we know of: research use, cite the authors'
_RAIN_SOURCE = 'https://www.icst.pku.edu.cn/struct/Projects/joint_rain_removal.html'
_RESIDE_SOURCE = 'https://sites.google.com/view/reside-dehaze-datasets/reside-%CE%B2'
_RESIDE_LICENCE = 'academic use; see its page'
_GOPRO_SOURCE, _GOPRO_LICENCE = 'https://seungjunnah.github.io/Datasets/gopro', 'CC BY 4.0'
_LOL_SOURCE = 'https://daooshee.github.io/BMVC2018website/'
_GT_ONLY = ('gt',)

BSD400 = ImageSet(
    *('BSD400', 'train', 400, 'aio/train/bsd400_wed'),
    source='https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/resources.html (train and test)',
    licence=_BSD_LICENCE,
    roles=_GT_ONLY,
    layouts=(
        Layout('MoCE-IR', 'denoising/bsd400/*'),
        Layout('PromptIR, AdaIR, DFPIR', 'denoise/{a,}[1-9]*'),
        Layout('BSDS500', 'bsds500/data/images/{train,test}/*'),
        Layout('raw', '{bsd400,bsds400,cbsd400}/*'),
    ),
)
WED = ImageSet(
    *('WED', 'train', 4744, 'aio/train/bsd400_wed'),
    source='https://ece.uwaterloo.ca/~k29ma/exploration/ (Waterloo Exploration Database)',
    licence='research use, cite the authors; see its page',
    roles=_GT_ONLY,
    layouts=(
        Layout('MoCE-IR', 'denoising/waterlooed/*'),
        Layout('PromptIR, AdaIR, DFPIR', 'denoise/0????'),
        Layout('raw', '{exploration_database_and_code/pristine_images,pristine_images,wed,waterlooed}/*'),
    ),
)
CBSD68 = ImageSet(
    *('CBSD68', 'test', 68, 'aio/test/cbsd68'),
    source='https://github.com/clausmichele/CBSD68-dataset',
    licence=_BSD_LICENCE,
    roles=_GT_ONLY,
    layouts=(
        Layout('MoCE-IR', 'denoising/cbsd68/original_png/*'),
        Layout('PromptIR, AdaIR, DFPIR', 'denoise/{bsd68,cbsd68}/*'),
        Layout('raw', 'cbsd68{,-dataset,-dataset-master,-dataset/cbsd68,-dataset-master/cbsd68}/original_png/*'),
        Layout('raw, flat', '{cbsd68,bsd68}/*'),
        Layout('raw, JPEG', '{cbsd68,bsd68}/original/*'),
        Layout('AirNet', 'test/denoise/*'),
    ),
)
KODAK24 = ImageSet(
    *('Kodak24', 'test', 24, 'aio/test/kodak24'),
    source='http://r0k.us/graphics/kodak/',
    licence='released by Kodak for unrestricted use',
    roles=_GT_ONLY,
    optional=True,
    layouts=(Layout('raw', '{kodak24,kodak}/*'),),
)
URBAN100 = ImageSet(
    *('Urban100', 'test', 100, 'aio/test/urban100'),
    source='https://github.com/jbhuang0604/SelfExSR',
    licence='Creative Commons photographs; see its page',
    roles=_GT_ONLY,
    optional=True,
    layouts=(Layout('raw', 'urban100/*'), Layout('raw, HR', 'urban100/{hr,gt,original}/*')),
)
RAINTRAINL = ImageSet(
    *('RainTrainL', 'train', 200, 'aio/train/raintrainl_<role>'),
    source=_RAIN_SOURCE,
    licence=_NO_LICENCE,
    task='rain',
    releases={1800: 'the newer release of 1,800 and 200 pairs; papers train on the older 200'},
    layouts=(
        Layout('MoCE-IR', 'deraining/raintrainl/gt/*', 'deraining/raintrainl/rainy/*'),
        Layout('PromptIR, AdaIR, DFPIR', 'derain/gt/*', 'derain/rainy/*'),
        Layout('raw, one folder', '{raintrainl,train100l}/norain-*', '{raintrainl,train100l}/rain-*'),
        Layout('raw', 'rain_data_train_light/norain/*', 'rain_data_train_light/rain/**/*'),
        Layout(
            'raw, two folders',
            '{raintrainl,train100l,rain100l/train}/{gt,norain,target}/*',
            '{raintrainl,train100l,rain100l/train}/{rainy,rain,input}/*',
        ),
        Layout('Kaggle', 'rain100l/train/clean/*', 'rain100l/train/{rainy,rain}/*'),
    ),
)
RAIN100L = ImageSet(
    *('Rain100L', 'test', 100, 'aio/test/rain100l_<role>'),
    source=_RAIN_SOURCE,
    licence=_NO_LICENCE,
    task='rain',
    releases={200: 'the newer release of 1,800 and 200 pairs; papers test on the older 100'},
    layouts=(
        Layout('MoCE-IR', 'deraining/rain100l/gt/*', 'deraining/rain100l/rainy/*'),
        Layout('PromptIR, AdaIR, DFPIR', 'derain/rain100l/target/*', 'derain/rain100l/input/*'),
        Layout('raw, one folder', 'rain100l/norain-*', 'rain100l/**/rain-*'),
        Layout('raw', 'rain_data_test_light/norain/*', 'rain_data_test_light/rain/**/*'),
        Layout('raw, two folders', 'rain100l/{test/,}{gt,norain,target}/*', 'rain100l/{test/,}{rainy,rain,input}/*'),
        Layout('AirNet', 'test/derain/target/*', 'test/derain/input/*'),
    ),
)
OTS = ImageSet(
    *('RESIDE-beta OTS', 'train', 72135, 'aio/train/ots_<role>'),
    source=f'{_RESIDE_SOURCE} (OTS with 72,135 images, not the older one with 313,950)',
    licence=_RESIDE_LICENCE,
    shares_gt=True,
    task='haze',
    scenes=2061,
    releases={313950: 'the larger release; papers train on 72,135'},
    layouts=(
        Layout('MoCE-IR', 'reside/clear/*', 'reside/part[1-4]/*'),
        Layout('PromptIR, AdaIR, DFPIR', 'dehaze/original/*', 'dehaze/synthetic/**/*'),
        Layout(
            'raw', '{ots,ots_beta}/{clear,gt}/**/*', '{ots,ots_beta}/**/{part1,part2,part3,part4,hazy,haze}/**/*_*_*'
        ),
        Layout(
            'RESIDE-outdoor', 'reside-out{,door}/train/{gt,clear}/**/*', 'reside-out{,door}/train/{hazy,haze}/**/*_*_*'
        ),
    ),
)
SOTS = ImageSet(
    *('SOTS-outdoor', 'test', 500, 'aio/test/sots_<role>'),
    source=_RESIDE_SOURCE,
    licence=_RESIDE_LICENCE,
    shares_gt=True,
    task='haze',
    scenes=492,
    layouts=(
        Layout('MoCE-IR, raw', 'sots/outdoor/{gt,clear}/*', 'sots/outdoor/hazy/*'),
        Layout('PromptIR, AdaIR, DFPIR', 'dehaze/target/*', 'dehaze/input/*'),
        Layout('InstructIR', 'sots{/,-}{outdoor/,}gt/*', 'sots{/,-}{outdoor/,}in/*'),
        Layout('RESIDE-outdoor', 'reside-out{,door}/test/{gt,clear}/*', 'reside-out{,door}/test/hazy/*'),
        Layout('Kaggle', '{sots-outdoor,outdoor}/{gt,clear}/*', '{sots-outdoor,outdoor}/hazy/*'),
    ),
)
GOPRO_TRAIN = ImageSet(
    *('GoPro', 'train', 2103, 'aio/train/gopro_<role>'),
    source=_GOPRO_SOURCE,
    licence=_GOPRO_LICENCE,
    task='blur',
    layouts=(
        Layout('raw', 'train/gopr*/sharp/*', 'train/gopr*/blur/*', nested=True),
        Layout('AdaIR', 'deblur/sharp/*', 'deblur/blur/*'),
        Layout('DFPIR', 'gopro{,_large}/train/sharp/*', 'gopro{,_large}/train/blur/*'),
        Layout('flat', '{gopro/train,train/gopro}/target/*', '{gopro/train,train/gopro}/input/*'),
        Layout(
            'MoCE-IR, Restormer (crops)',
            '{gopro/crop/train,train/gopro,gopro/train}/target_crops/*',
            '{gopro/crop/train,train/gopro,gopro/train}/input_crops/*',
            expected=16824,
            store='aio/train/gopro_crops_<role>',
        ),
        Layout(
            'NAFNet (crops)',
            '{gopro/train,train/gopro}/sharp_crops/*',
            '{gopro/train,train/gopro}/blur_crops/*',
            expected=16824,
            store='aio/train/gopro_crops_<role>',
        ),
    ),
)
GOPRO_TEST = ImageSet(
    *('GoPro', 'test', 1111, 'aio/test/gopro_<role>'),
    source=_GOPRO_SOURCE,
    licence=_GOPRO_LICENCE,
    task='blur',
    layouts=(
        Layout('raw', 'test/gopr*/sharp/*', 'test/gopr*/blur/*', nested=True),
        Layout('AdaIR', 'deblur/gopro/target/*', 'deblur/gopro/input/*'),
        Layout('DFPIR', 'gopro{,_large}/test/sharp/*', 'gopro{,_large}/test/blur/*'),
        Layout('MoCE-IR, Restormer', '{gopro/test,test/gopro}/target/*', '{gopro/test,test/gopro}/input/*'),
    ),
)
LOL_TRAIN = ImageSet(
    *('LOL-v1', 'train', 485, 'aio/train/lol_<role>'),
    source=_LOL_SOURCE,
    licence=_NO_LICENCE,
    task='low',
    layouts=(
        Layout('raw', 'our485/high/*', 'our485/low/*'),
        Layout('AdaIR', 'enhance/gt/*', 'enhance/low/*'),
        Layout('DFPIR', 'train485/high/*', 'train485/low/*'),
        Layout('MoCE-IR', 'lol{v1,-v1,_v1,}/train/target/*', 'lol{v1,-v1,_v1,}/train/input/*'),
        Layout('Kaggle', 'lol{v1,-v1,_v1,dataset,}/train/high/*', 'lol{v1,-v1,_v1,dataset,}/train/low/*'),
    ),
)
LOL_TEST = ImageSet(
    *('LOL-v1', 'test', 15, 'aio/test/lol_<role>'),
    source=_LOL_SOURCE,
    licence=_NO_LICENCE,
    task='low',
    layouts=(
        Layout('raw', 'eval15/high/*', 'eval15/low/*'),
        Layout('AdaIR', 'enhance/lol/target/*', 'enhance/lol/input/*'),
        Layout('DFPIR', 'test15/high/*', 'test15/low/*'),
        Layout('MoCE-IR', 'lol{v1,-v1,_v1,}/test/target/*', 'lol{v1,-v1,_v1,}/test/input/*'),
        Layout('Kaggle', 'lol{v1,-v1,_v1,dataset,}/test/high/*', 'lol{v1,-v1,_v1,dataset,}/test/low/*'),
    ),
)


def _cdd11(split: str, expected: int) -> ImageSet:
    return ImageSet(
        *('CDD-11', split, expected, f'cdd11/{split}/<role>'),
        source='https://huggingface.co/datasets/gy65896/CDD-11',
        licence=_NO_LICENCE,
        roles=('clear', *CDD11_CLASSES),
        layouts=(
            Layout('raw', f'cdd-11_{split}/clear/*', f'cdd-11_{split}/<role>/*'),
            Layout('MoCE-IR', f'{{cdd11,cdd-11,cdd}}/{split}/clear/*', f'{{cdd11,cdd-11,cdd}}/{split}/<role>/*'),
            Layout('BioIR', f'cdd/{split}/{{clear,target}}/*', f'cdd/{split}/input/<role>_[0-9]*'),
        ),
    )


_AIO3 = (BSD400, WED, RAINTRAINL, OTS, CBSD68, RAIN100L, SOTS, KODAK24, URBAN100)
BENCHMARKS: dict[str, Iterable[ImageSet]] = {
    'AIO-3': _AIO3,
    'AIO-5': (*_AIO3[:4], GOPRO_TRAIN, LOL_TRAIN, *_AIO3[4:7], GOPRO_TEST, LOL_TEST, *_AIO3[7:]),
    'CDD-11': (_cdd11('train', 1183), _cdd11('test', 200)),
}
LEAKS_BY_ID = (OTS.name, SOTS.name)  # known in the literature, which keeps both sets as they are
KNOWN_LEAKS = ({*LEAKS_BY_ID}, {BSD400.name, RAIN100L.name})


def stored_in(root: str) -> tuple[str, int] | None:
    """The benchmark whose preparation writes an LMDB of this path, and the number of images that it has as published.

    None where there is none.
    """
    for benchmark, sets in BENCHMARKS.items():
        for one in sets:
            for role in one.roles:
                counts = {layout.store or one.store: layout.expected or one.expected for layout in one.layouts}
                for store, count in counts.items():
                    if f'{root}'.endswith(f'{store.replace("<role>", role)}.lmdb'):
                        truths = one.scenes if role == one.roles[0] and one.scenes else count
                        return benchmark, BSD400.expected + WED.expected if store == WED.store else truths
    return None
