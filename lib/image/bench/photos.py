"""Makes the photos of `cargo bench -p clip-image`, and times the reference on them.

    python photos.py make FOLDER      synthetic photos, the same every time
    python photos.py time FILE...     JSON lines: CPU seconds on one thread of the
                                      reference and of Pillow's decoder alone

The reference is CLIP's own preprocessing: decode, torchvision's `Resize` and
`CenterCrop`, RGB, `ToTensor`, `Normalize`. Where PyTorch or torchvision is missing
it ends with RGB (the resize is Pillow's either way; its size rules are written out
in `../conformance.py`).
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

try:
    import torch
    from torchvision import transforms
except ImportError:
    transforms = None

SIZE = 224
REPEATS = 15


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
        "2.4mp-progressive.jpg": (1789, 1342, {"quality": 85, "progressive": True}),
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


def decode(data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()


def pillow(data: bytes) -> None:
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized_long = int(SIZE * long / short)
    resized = (SIZE, resized_long) if width <= height else (resized_long, SIZE)
    image.resize(resized, Image.Resampling.BICUBIC).crop(box_of(resized, SIZE)).convert("RGB").tobytes()


def clip_transform():
    """CLIP's preprocessing, and its name."""
    if transforms is None:
        return pillow, "Pillow"
    torch.set_num_threads(1)
    steps = transforms.Compose(
        [
            transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    return lambda data: steps(Image.open(io.BytesIO(data))), "torchvision"


def least(work, data: bytes) -> float:
    """The least CPU seconds of several runs."""
    best = float("inf")
    for _ in range(REPEATS):
        started = time.process_time()
        work(data)
        best = min(best, time.process_time() - started)
    return best


def main() -> None:
    if sys.argv[1] == "make":
        make(sys.argv[2])
        return
    reference, name = clip_transform()
    for path in sys.argv[2:]:
        with open(path, "rb") as file:
            data = file.read()
        times = {"seconds": least(reference, data), "decode": least(decode, data)}
        print(json.dumps({"path": path, "reference": name, **times}), flush=True)


if __name__ == "__main__":
    main()
