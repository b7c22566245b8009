"""Makes the benchmark's images, the same on every machine: gradients, shapes and noise, as JPEG.

photos.py FOLDER mixed|web|small|giant COUNT

mixed: 0.3 to 20 megapixels, 5 on average, every ninth progressive; web: at most 1024 pixels; small: 64 to 128 pixels;
giant: 100 megapixels.
"""

import os
import sys

import numpy as np
from PIL import Image

SIZES = {
    "mixed": (
        [(640, 480)] * 3 + [(1024, 768)] * 4 + [(1600, 1200)] * 5 + [(1920, 1080)] * 8 + [(2048, 1536)] * 6
        + [(2592, 1944)] * 5 + [(3264, 2448)] * 5 + [(4000, 3000)] * 4 + [(5184, 3456)] * 2 + [(5472, 3648)]
    ),
    "web": [(1024, 768), (1024, 683), (800, 600), (1024, 640)],
    "small": [(64, 64), (96, 72), (128, 96)],
    "giant": [(11547, 8660)],
}


def photo(width, height, seed):
    random = np.random.default_rng(seed)
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    # One grey plane of noise at two scales, which is what makes a JPEG cost what a photo costs.
    coarse = random.integers(80, 176, (height // 4 + 1, width // 4 + 1), dtype=np.uint8)
    coarse = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC))
    fine = random.integers(-8, 9, (height, width), dtype=np.int8)
    pixels = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        a, b, phase = random.uniform(0.5, 6, 3)
        plane = 70 * np.sin(a * x * 6 + phase) * np.cos(b * y * 6 + phase)
        for _ in range(10):
            left, top, side = random.uniform(0, 0.8), random.uniform(0, 0.8), random.uniform(0.02, 0.2)
            rows = slice(int(top * height), int((top + side) * height))
            columns = slice(int(left * width), int((left + side) * width))
            plane[rows, columns] += random.uniform(-40, 40)
        plane += coarse
        plane += fine
        pixels[..., channel] = np.clip(plane, 0, 255)
    return Image.fromarray(pixels)


def main():
    folder, kind, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.makedirs(folder, exist_ok=True)
    sizes = SIZES[kind]
    for index in range(count):
        path = f"{folder}/{kind}-{index:05}.jpg"
        if not os.path.exists(path):
            width, height = sizes[index % len(sizes)]
            photo(width, height, index).save(path, quality=85, progressive=kind == "mixed" and index % 9 == 4)


if __name__ == "__main__":
    main()
