"""Renders the demo's sample images, all our own: small scenes drawn from a seed.

    python make.py [FOLDER]        (needs Pillow)

One scene per file, at least one file of each of the seven types. The images are
committed; this script is how they were made, and how to make others.
"""

import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter

WIDTH, HEIGHT = 480, 320


def gradient(top, bottom, size=(WIDTH, HEIGHT), power=1.0):
    """A sky or a floor: one colour turning into another, from top to bottom."""
    strip = Image.new("RGB", (1, size[1]))
    for y in range(size[1]):
        t = (y / (size[1] - 1)) ** power
        strip.putpixel((0, y), tuple(round(a + (b - a) * t) for a, b in zip(top, bottom)))
    return strip.resize(size)


def clouds(size, rng, octaves=5):
    """Soft noise in grey: sums of enlarged random fields."""
    total = Image.new("L", size, 0)
    for octave in range(octaves):
        cells = 3 * 2**octave
        small = Image.new("L", (cells, cells))
        small.putdata([rng.randrange(256) for _ in range(cells * cells)])
        layer = small.resize(size, Image.Resampling.BICUBIC)
        total = ImageChops.add(total, layer.point(lambda v, o=octave: v >> (o + 1)))
    return total


def ridge(rng, base, height, roughness):
    """The outline of a mountain range, by halving and shifting."""
    points = [(0, base), (WIDTH, base - height * 0.3)]
    spread = height
    while len(points) < 130:
        refined = []
        for (x1, y1), (x2, y2) in zip(points, points[1:]):
            refined += [(x1, y1), ((x1 + x2) / 2, (y1 + y2) / 2 + rng.uniform(-spread, spread))]
        points = refined + [points[-1]]
        spread *= roughness
    return points


def grain(image, rng, amount=10):
    """The noise of a sensor, so that nothing is perfectly flat."""
    noise = Image.effect_noise(image.size, amount * 2).convert("RGB")
    return ImageChops.add(image, noise, scale=1.0, offset=-128)


def mountains(rng):
    image = gradient((34, 60, 120), (250, 180, 120))
    sun = Image.new("RGB", image.size)
    ImageDraw.Draw(sun).ellipse((300, 120, 360, 180), fill=(255, 230, 170))
    image = ImageChops.add(image, sun.filter(ImageFilter.GaussianBlur(9)))
    for step, colour in enumerate([(120, 110, 140), (80, 76, 104), (44, 46, 66), (20, 24, 36)]):
        points = ridge(rng, 190 + step * 32, 70 - step * 10, 0.52)
        ImageDraw.Draw(image).polygon(points + [(WIDTH, HEIGHT), (0, HEIGHT)], fill=colour)
    return grain(image, rng, 6)


def city(rng):
    image = gradient((8, 10, 30), (70, 50, 80))
    draw = ImageDraw.Draw(image)
    horizon = 220
    x = 0
    while x < WIDTH:
        width, height = rng.randrange(22, 54), rng.randrange(50, 170)
        shade = rng.randrange(14, 34)
        draw.rectangle((x, horizon - height, x + width, horizon), fill=(shade, shade, shade + 12))
        for wy in range(horizon - height + 6, horizon - 6, 9):
            for wx in range(x + 4, x + width - 4, 8):
                if rng.random() < 0.45:
                    draw.rectangle((wx, wy, wx + 3, wy + 4), fill=rng.choice([(255, 214, 130), (255, 236, 190), (190, 210, 255)]))
        x += width + rng.randrange(0, 6)
    water = image.crop((0, 20, WIDTH, horizon)).transpose(Image.Transpose.FLIP_TOP_BOTTOM).resize((WIDTH, HEIGHT - horizon))
    water = ImageEnhance.Brightness(water.filter(ImageFilter.GaussianBlur(2))).enhance(0.6)
    image.paste(water, (0, horizon))
    return grain(image, rng, 5)


def forest(rng):
    image = gradient((190, 215, 220), (90, 120, 80))
    for depth in range(5):
        layer = ImageDraw.Draw(image)
        green = (max(10, 96 - depth * 20), max(30, 140 - depth * 22), max(12, 90 - depth * 18))
        for _ in range(14 - depth):
            x, foot = rng.randrange(-20, WIDTH + 20), 210 + depth * 26
            height = rng.randrange(70, 110) + depth * 22
            layer.rectangle((x - 3, foot - 20, x + 3, foot), fill=(70, 50, 34))
            for part in range(4):
                top, half = foot - height + part * height // 5, 10 + part * 8 + depth * 2
                layer.polygon([(x, top), (x - half, top + height // 3), (x + half, top + height // 3)], fill=green)
    return grain(image, rng, 8)


def flower(rng):
    image = gradient((60, 110, 60), (24, 60, 30), (320, 240))
    draw = ImageDraw.Draw(image)
    draw.line((160, 120, 150, 240), fill=(40, 130, 50), width=8)
    for petal in range(12):
        angle = petal * math.tau / 12
        cx, cy = 160 + 52 * math.cos(angle), 110 + 52 * math.sin(angle)
        draw.ellipse((cx - 28, cy - 28, cx + 28, cy + 28), fill=(236, 120 + rng.randrange(40), 60))
    draw.ellipse((130, 80, 190, 140), fill=(90, 50, 20))
    return image.filter(ImageFilter.GaussianBlur(1))


def beach(rng):
    image = gradient((90, 170, 235), (215, 240, 250), (300, 200))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 90, 300, 140), fill=(30, 120, 160))
    for wave in range(6):
        y = 96 + wave * 8
        draw.line([(x, y + 2 * math.sin(x / 9 + wave)) for x in range(300)], fill=(200, 230, 235), width=1)
    draw.polygon([(0, 140), (300, 128), (300, 200), (0, 200)], fill=(226, 204, 150))
    draw.polygon([(210, 150), (245, 96), (280, 150)], fill=(210, 50, 50))
    draw.line((245, 96, 245, 176), fill=(120, 90, 60), width=3)
    return grain(image, rng, 5)


def planet(rng):
    image = Image.new("RGB", (WIDTH, WIDTH), (4, 5, 12))
    draw = ImageDraw.Draw(image)
    for _ in range(260):
        x, y, light = rng.randrange(WIDTH), rng.randrange(WIDTH), rng.randrange(60, 255)
        draw.point((x, y), fill=(light, light, light))
    face = Image.merge("RGB", [clouds((260, 260), rng).point(lambda v, k=k: int(v * k)) for k in (1.0, 0.75, 0.5)])
    disc = Image.new("L", (260, 260), 0)
    ImageDraw.Draw(disc).ellipse((2, 2, 258, 258), fill=255)
    shade = gradient((255, 255, 255), (20, 20, 30), (260, 260)).rotate(50)
    image.paste(ImageChops.multiply(face, shade), (110, 100), disc.filter(ImageFilter.GaussianBlur(1)))
    return image


def street(rng):
    image = gradient((180, 190, 205), (150, 150, 150))
    draw = ImageDraw.Draw(image)
    draw.polygon([(200, 150), (280, 150), (470, 320), (10, 320)], fill=(66, 66, 70))
    for stripe in range(6):
        y = 160 + stripe * stripe * 6
        draw.rectangle((238 - stripe, y, 242 + stripe, y + 6 + stripe * 3), fill=(240, 236, 200))
    for side in (-1, 1):
        for house in range(4):
            near, far = 240 + side * (60 + house * 62), 240 + side * (60 + (house + 1) * 62)
            top = 130 - house * 34
            left, right = sorted((near, far))
            draw.rectangle((left, top, right, 190 + house * 30), fill=tuple(rng.randrange(110, 220) for _ in range(3)))
            for wy in range(top + 10, 180, 22):
                draw.rectangle((left + 14, wy, left + 26, wy + 12), fill=(70, 90, 120))
    draw.rectangle((258, 196, 330, 236), fill=(190, 30, 36))
    draw.rectangle((270, 180, 318, 200), fill=(150, 200, 220))
    draw.ellipse((264, 226, 284, 246), fill=(20, 20, 20))
    draw.ellipse((304, 226, 324, 246), fill=(20, 20, 20))
    return grain(image, rng, 7)


def fruit(rng):
    image = gradient((226, 214, 196), (150, 112, 76), (360, 260))
    for cx, cy, radius, colour in [(120, 150, 58, (210, 40, 40)), (210, 160, 52, (240, 150, 30)), (285, 170, 40, (120, 180, 60))]:
        ball = Image.new("RGB", image.size)
        mask = Image.new("L", image.size, 0)
        ImageDraw.Draw(mask).ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
        draw = ImageDraw.Draw(ball)
        for step in range(radius, 0, -1):
            t = 1 - step / radius
            shift = t * radius * 0.35
            tone = tuple(min(255, round(c * (0.55 + 0.75 * t))) for c in colour)
            draw.ellipse((cx - step - shift, cy - step - shift, cx + step - shift, cy + step - shift), fill=tone)
        image.paste(ball, (0, 0), mask)
    return grain(image, rng, 5)


SCENES = [
    ("mountains.jpg", mountains, {"quality": 88}),
    ("city at night.jpg", city, {"quality": 88}),
    ("forest.png", forest, {"optimize": True}),
    ("flower.gif", flower, {}),
    ("beach.bmp", beach, {}),
    ("planet.webp", planet, {"quality": 82}),
    ("street.tiff", street, {"compression": "tiff_lzw"}),
    ("fruit.pcx", fruit, {}),
]


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    for number, (name, scene, options) in enumerate(SCENES):
        image = scene(random.Random(number))
        if name.endswith((".gif", ".pcx")):
            image = image.quantize(128, dither=Image.Dither.NONE)
        if name.endswith(".png"):
            image = image.quantize(200)
        image.save(folder / name, **options)
        print(f"{name}: {(folder / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
