"""The weights of the package: what they restore, and that they leave alone what needs nothing."""

from importlib import resources

import cv2
import numpy as np
from PIL import Image

from cea_arch.data.degradations import quantize

SIDE = 224  # pixels


def shipped(name: str, top: int = 0, left: int = 0) -> np.ndarray:
    """A part of a picture that scikit-image carries, RGB uint8."""
    pixels = np.array(Image.open(resources.files('skimage') / 'data' / name).convert('RGB'))
    return pixels[top : top + SIDE, left : left + SIDE]


def drawing() -> np.ndarray:
    """Shapes of strong colours on white, with lines and words."""
    img = np.full((SIDE, SIDE, 3), 255, np.uint8)
    cv2.circle(img, (70, 80), 50, (230, 30, 30), -1, cv2.LINE_AA)
    cv2.rectangle(img, (120, 40), (200, 130), (20, 120, 230), -1)
    cv2.fillPoly(img, [np.array([[40, 200], [110, 140], [180, 210]])], (250, 220, 20), cv2.LINE_AA)
    cv2.line(img, (0, 10), (223, 180), (0, 0, 0), 2, cv2.LINE_AA)
    cv2.putText(img, 'CEA 123', (90, 215), cv2.FONT_HERSHEY_SIMPLEX, 0.8, (10, 130, 40), 2, cv2.LINE_AA)
    return img


def pictures() -> dict[str, np.ndarray]:
    hues = np.stack(np.meshgrid(np.linspace(0, 179, SIDE), np.linspace(255, 60, SIDE)), -1)
    hues = np.dstack([hues, np.full((SIDE, SIDE), 220)]).astype(np.uint8)
    ramp = np.linspace(0, 255, SIDE)[None].repeat(SIDE, 0)
    photo, cup = shipped('astronaut.png', 0, 130), shipped('coffee.png', 120, 200)
    return {
        'photograph': photo,
        'strong colours': cup,
        'cat': shipped('chelsea.png', 40, 120),
        'night': shipped('rocket.jpg', 100, 200),
        'stars': shipped('hubble_deep_field.jpg', 100, 100),
        'red': shipped('retina.jpg', 500, 500),
        'grey photograph': shipped('camera.png', 60, 130),
        'dark photograph': quantize(photo / 255 * 0.25),
        'pale photograph': quantize(photo / 255 * 0.3 + 0.65),
        'page': shipped('page.png', 0, 60),
        'words': shipped('text.png', 0, 150),
        'drawing': drawing(),
        'hues': cv2.cvtColor(hues, cv2.COLOR_HSV2RGB),
        'gradient': np.dstack([ramp, ramp.T, 255 - ramp]).astype(np.uint8),
        'grey gradient': np.dstack([ramp] * 3).astype(np.uint8),
        **{f'flat {level}': np.full((SIDE, SIDE, 3), level, np.uint8) for level in (0, 32, 64, 128, 192, 255)},
    }
