"""The two views of MoCo v3 by other libraries, at the same draws' distribution: what mocov3.data is compared with.

Each maker returns a function bytes → two views. ``reference`` follows the paper's description (arXiv 2104.02057, §4,
and BYOL, appendix B) on torchvision's v1 transforms and Pillow, down to normalised float tensors, which is where that
pipeline's loader processes end. The others stop at uint8, as ours does.
"""

import io
import random
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageFilter, ImageOps

Pipeline = Callable[[bytes], Any]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLUR, SOLARIZE = (1.0, 0.1), (0.0, 0.2)


def reference(size: int, crop_min: float) -> Pipeline:
    """torchvision v1 on Pillow images."""
    from torchvision import transforms as T

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    views = [
        T.Compose(
            [
                T.RandomResizedCrop(size, scale=(crop_min, 1.0)),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.RandomApply([T.Lambda(blur)], p=BLUR[view]),
                T.RandomApply([T.Lambda(ImageOps.solarize)], p=SOLARIZE[view]),
                T.RandomHorizontalFlip(),
                T.ToTensor(),
                T.Normalize(MEAN, STD),
            ]
        )
        for view in range(2)
    ]

    def run(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return views[0](image), views[1](image)

    return run


def torchvision_v2(size: int, crop_min: float) -> Pipeline:
    """torchvision v2 on uint8 tensors, decoded by torchvision; a blur of the same reach (13 pixels)."""
    import torch
    from torchvision import io as tio
    from torchvision.transforms import v2

    views = [
        v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=(crop_min, 1.0), antialias=True),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=BLUR[view]),
                v2.RandomSolarize(128, p=SOLARIZE[view]),
                v2.RandomHorizontalFlip(),
            ]
        )
        for view in range(2)
    ]

    def run(data: bytes) -> Any:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = tio.decode_image(buffer, mode=tio.ImageReadMode.RGB)
        return views[0](image), views[1](image)

    return run


def albumentations(size: int, crop_min: float) -> Pipeline:
    """albumentations, its resize set to the one of OpenCV's that antialiases (area), decoded by simplejpeg."""
    import albumentations as A
    import cv2
    import numpy as np
    import simplejpeg

    views = [
        A.Compose(
            [
                A.RandomResizedCrop((size, size), scale=(crop_min, 1.0), interpolation=cv2.INTER_AREA),
                A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=BLUR[view]),
                A.Solarize((0.5, 0.5), p=SOLARIZE[view]),
                A.HorizontalFlip(p=0.5),
            ]
        )
        for view in range(2)
    ]

    def run(data: bytes) -> Any:
        if data[:2] == b"\xff\xd8":
            image = simplejpeg.decode_jpeg(data)
        else:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        return views[0](image=image)["image"], views[1](image=image)["image"]

    return run
