"""Makes the photos of `cargo bench -p clip-image`, and times Pillow on them.

    python photos.py make FOLDER      synthetic photos, the same every time
    python photos.py time FILE...     JSON lines: CPU seconds of Pillow for each file

Timed is what the reference does on one thread: decode, then torchvision's
`Resize` and `CenterCrop` (written out in `../conformance.py` where torchvision is
not installed; the pixels and the cost are Pillow's either way), then RGB.
"""

import io
import json
import os
import random
import sys
import time

from PIL import Image, ImageChops

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from conformance import box_of  # noqa: E402

SIZE = 224
REPEATS = 7


def photo(width: int, height: int) -> Image.Image:
    """Noise with the spectrum of photos: as much of it at every scale."""
    rng = random.Random(width)
    image = Image.new("RGB", (width, height), (128, 128, 128))
    for octave in range(1, 10):
        small = (max(2, width >> octave), max(2, height >> octave))
        noise = Image.frombytes("RGB", small, rng.randbytes(small[0] * small[1] * 3))
        image = Image.blend(image, noise.resize((width, height), Image.Resampling.BICUBIC), 0.12 + 0.03 * octave)
    # As much grain as makes files of the size that cameras write.
    grain = Image.effect_noise((width, height), 5)
    return ImageChops.overlay(image, Image.merge("RGB", (grain, grain, grain)))


def make(folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    wanted = {
        "2.4mp.jpg": (1789, 1342, {"quality": 85}),
        "12mp.jpg": (4000, 3000, {"quality": 85}),
        "12mp-progressive.jpg": (4000, 3000, {"quality": 85, "progressive": True}),
        "web.jpg": (1024, 640, {"quality": 85}),
        "web.png": (1024, 640, {}),
        "web.webp": (1024, 640, {"quality": 80}),
    }
    for name, (width, height, options) in wanted.items():
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            photo(width, height).save(path, **options)


def prepare(data: bytes) -> None:
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(SIZE * long / short)
    resized = (SIZE, resized_long) if width <= height else (resized_long, SIZE)
    image.resize(resized, Image.Resampling.BICUBIC).crop(box_of(resized, SIZE)).convert("RGB").tobytes()


def main() -> None:
    if sys.argv[1] == "make":
        make(sys.argv[2])
        return
    for path in sys.argv[2:]:
        with open(path, "rb") as file:
            data = file.read()
        best = float("inf")
        for _ in range(REPEATS):
            started = time.process_time()
            prepare(data)
            best = min(best, time.process_time() - started)
        print(json.dumps({"path": path, "seconds": best}), flush=True)


if __name__ == "__main__":
    main()
