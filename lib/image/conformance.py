"""The reference's crops, for `clip-image conformance`.

Reads paths from standard input, one a line, and makes of each what OpenAI's
CLIP preprocessing makes of it before it becomes a tensor: open, resize of the
shorter side (bicubic), centre crop, RGB. Crop N goes to `N.reference.rgb` in
the folder given as the first argument; a JSON line with the outcome goes to
standard output. The second argument is the side of the crop.

Only Pillow is needed: the size rules are torchvision's `Resize` and
`CenterCrop`, written out.
"""

import json
import os
import signal
import sys
import time
import warnings

from PIL import Image, ImageOps

# A file on which Pillow itself hangs has no reference.
SECONDS_PER_FILE = 60

warnings.simplefilter("ignore")


def crop(path: str, size: int, orient: bool = False) -> tuple[Image.Image, str, str]:
    """The crop, and the format and mode that Pillow saw."""
    image = Image.open(path)
    seen = image.format
    if orient:
        image = ImageOps.exif_transpose(image)
    mode = image.mode
    width, height = image.size
    short, long = (width, height) if width <= height else (height, width)
    resized_long = int(size * long / short)
    resized = (size, resized_long) if width <= height else (resized_long, size)
    box = box_of(resized, size)
    if resized[0] * resized[1] > 20_000_000:
        # The same pixels as resizing the whole: only the crop's rows and columns
        # are kept, which Pillow gives for a box of the source, if it is exact.
        raise MemoryError("the resized strip is too large for a reference")
    image = image.resize(resized, Image.Resampling.BICUBIC).crop(box)
    return image.convert("RGB"), seen, mode


def box_of(resized: tuple[int, int], size: int) -> tuple[int, int, int, int]:
    top = int(round((resized[1] - size) / 2.0))
    left = int(round((resized[0] - size) / 2.0))
    return left, top, left + size, top + size


def main() -> None:
    folder, size = sys.argv[1], int(sys.argv[2])

    def too_slow(*_):
        raise TimeoutError("Pillow took too long")

    signal.signal(signal.SIGALRM, too_slow)
    for index, line in enumerate(sys.stdin):
        path = line.rstrip("\n")
        started = time.process_time()
        outcome = {"index": index}
        signal.alarm(SECONDS_PER_FILE)
        try:
            image, seen, mode = crop(path, size)
            signal.alarm(0)
            with open(os.path.join(folder, f"{index}.reference.rgb"), "wb") as file:
                file.write(image.tobytes())
            outcome.update(ok=True, format=seen, mode=mode)
        except (Exception, MemoryError) as error:  # whatever Pillow raises is a refusal
            signal.alarm(0)
            outcome.update(ok=False, error=f"{type(error).__name__}: {error}")
        outcome["seconds"] = time.process_time() - started
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
