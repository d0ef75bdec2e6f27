import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r"__version__ = '(.+)'", (HERE / 'cea_arch/__init__.py').read_text('utf-8'))[1]
EXPORT = ['onnx', 'onnxscript', 'onnxruntime']

setup(
    name='cea-arch',
    version=VERSION,
    description='Continuous Expert Assembly for all-in-one image restoration, as a plugin for BasicSR',
    long_description=(HERE / 'README.md').read_text('utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['cea_arch', 'cea_arch.*']),
    package_data={'cea_arch': ['weights/*'], 'cea_arch.metrics': ['published/*.csv']},
    python_requires='>=3.10',
    install_requires=[
        # its source does not build by itself on Python 3.13 and later, where `cea setup` installs it
        'basicsr==1.4.2; python_version < "3.13"',
        'torch>=2.4',
        'lmdb',
        'opencv-python',
        'addict',
        'pyyaml',
        'future',
        'numpy',
        'packaging',
        'pillow',
        'scikit-image',
        'tifffile',
        'tqdm',
    ],
    extras_require={
        'export': EXPORT,
        'safetensors': ['safetensors'],
        'spandrel': ['spandrel'],
        'demo': ['gradio>=6'],
        'video': ['av>=17'],
        'lpips': ['lpips'],
        'dev': [
            'av>=17',
            'imagecodecs',
            'jsonschema',
            'lpips',
            'pytest',
            'ruff',
            'safetensors',
            'spandrel',
            'wandb',
            *EXPORT,
        ],
    },
    entry_points={'console_scripts': ['cea = cea_arch.cli:main']},
    classifiers=[
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 15)),
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
)
