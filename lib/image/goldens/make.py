"""Makes the golden files: small images of every kind, and Pillow's crops of them.

    python make.py [FOLDER]      (default: the folder of this script)

Needs Pillow only; the committed files were made by the version that
`index.json` names. What Pillow cannot write is put together here byte by byte,
but every expected crop is Pillow's: open, resize (bicubic), centre crop, RGB, as
in `../conformance.py`. Files that Pillow refuses are listed as such.
"""

import io
import json
import os
import random
import struct
import sys
import zlib

import PIL
from PIL import Image, ImageChops, ImageDraw, ImageOps

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from conformance import crop  # noqa: E402

HERE = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__))
FILES = os.path.join(HERE, "files")
EXPECTED = os.path.join(HERE, "expected")

# Crops this small show every rounding and keep the repository light.
SIZE = 48

cases: list[dict] = []


def photo(width: int, height: int, seed: int = 1) -> Image.Image:
    """Something like a photo: noise at several scales, shapes, a gradient."""
    rng = random.Random(seed)
    image = Image.new("RGB", (width, height))
    for scale in (4, 9, 21, 50):
        small = (max(2, width * scale // 100), max(2, height * scale // 100))
        noise = Image.frombytes("RGB", small, rng.randbytes(small[0] * small[1] * 3))
        image = ImageChops.blend(image, noise.resize((width, height), Image.Resampling.BICUBIC), 0.45)
    draw = ImageDraw.Draw(image)
    for _ in range(9):
        x, y = rng.randrange(width), rng.randrange(height)
        box = (x, y, x + rng.randrange(4, 40), y + rng.randrange(4, 40))
        colour = tuple(rng.randrange(256) for _ in range(3))
        rng.choice((draw.ellipse, draw.rectangle))(box, fill=colour)
    return image


def alpha_for(image: Image.Image) -> Image.Image:
    mask = Image.linear_gradient("L").resize(image.size)
    ImageDraw.Draw(mask).rectangle((10, 10, 30, 25), fill=0)
    ImageDraw.Draw(mask).rectangle((35, 10, 60, 25), fill=255)
    return mask


def put(name: str, data: bytes, size: int = SIZE, orient: bool = False) -> None:
    path = os.path.join(FILES, name)
    with open(path, "wb") as file:
        file.write(data)
    case = {"file": name, "size": size}
    if orient:
        case["orient"] = True
    expected = name.replace(".", "-") + (f"-{size}" if size != SIZE else "") + ("-oriented" if orient else "") + ".rgb"
    try:
        image, _, mode = crop(path, size, orient)
    except Exception as error:  # a refusal is an expectation, too
        case["refused"] = f"{type(error).__name__}: {error}".replace(FILES + os.sep, "")
    else:
        case.update(expected=expected, mode=mode)
        with open(os.path.join(EXPECTED, expected), "wb") as file:
            file.write(image.tobytes())
    cases.append(case)


def decoded(name: str, data: bytes) -> None:
    """A file of which the decoded pixels are compared, before any resize."""
    path = os.path.join(FILES, name)
    with open(path, "wb") as file:
        file.write(data)
    expected = name.replace(".", "-") + "-decoded.raw"
    image = Image.open(path)
    with open(os.path.join(EXPECTED, expected), "wb") as file:
        file.write(image.tobytes())
    cases.append({"file": name, "decoded": expected, "mode": image.mode})


def saved(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


# ---- JPEG


def jpeg() -> None:
    image = photo(131, 97)
    grey = image.convert("L")
    cmyk = image.convert("CMYK")
    kinds = {
        "444": saved(image, "JPEG", quality=90, subsampling=0),
        "422": saved(image, "JPEG", quality=85, subsampling=1),
        "420": saved(image, "JPEG", quality=80, subsampling=2),
        "grey": saved(grey, "JPEG", quality=85),
        "progressive-420": saved(image, "JPEG", quality=75, progressive=True),
        "progressive-444": saved(image, "JPEG", quality=92, progressive=True, subsampling=0),
        "progressive-grey": saved(grey, "JPEG", progressive=True),
        "cmyk": saved(cmyk, "JPEG", quality=88),
        "cmyk-progressive": saved(cmyk, "JPEG", quality=70, progressive=True),
        "restarts": saved(image, "JPEG", quality=80, restart_marker_blocks=3),
        "rgb": saved(image, "JPEG", quality=85, keep_rgb=True),
        "low-quality": saved(image, "JPEG", quality=3),
        "top-quality": saved(image, "JPEG", quality=100, subsampling=0),
    }
    # The Adobe marker's last byte says how the four channels are stored.
    at = kinds["cmyk"].index(b"Adobe") + 11
    kinds["ycck"] = kinds["cmyk"][:at] + b"\2" + kinds["cmyk"][at + 1 :]
    # Chroma subsampled downwards only: factors 1×2 in the frame header.
    tall = bytearray(saved(ImageOps.pad(image, (128, 96)), "JPEG", quality=85, subsampling=1))
    frame = tall.index(b"\xff\xc0")
    tall[frame + 11] = 0x12
    kinds["440"] = bytes(tall)
    for name, data in kinds.items():
        decoded(f"jpeg-{name}.jpg", data)
        put(f"jpeg-{name}.jpg", data)
    for width, height in ((1, 1), (2, 3), (3, 2), (5, 16), (17, 9), (16, 16)):
        small = photo(width, height, width * height)
        for factor in (1, 2):
            decoded(f"jpeg-{width}x{height}-{factor}.jpg", saved(small, "JPEG", subsampling=factor))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(photo(90, 61), "JPEG", quality=80, exif=exif)
        put(f"jpeg-orientation-{orientation}.jpg", data, orient=True)
    put("jpeg-orientation-6.jpg", open(os.path.join(FILES, "jpeg-orientation-6.jpg"), "rb").read())
    whole = kinds["420"]
    put("jpeg-truncated.jpg", whole[: len(whole) // 2])
    put("jpeg-truncated-in-header.jpg", whole[:200])
    put("jpeg-progressive-truncated.jpg", kinds["progressive-420"][:-300])
    put("jpeg-no-end-marker.jpg", whole[:-2])
    corrupt = bytearray(whole)
    corrupt[len(whole) // 2 : len(whole) // 2 + 4] = b"\x5a\xa5\x5a\xa5"
    put("jpeg-corrupt-data.jpg", bytes(corrupt))
    at = whole.index(b"\xff\0")
    put("jpeg-stray-marker.jpg", whole[: at + 1] + b"\x61" + whole[at + 2 :])
    put("jpeg-stray-restart.jpg", whole[: at + 1] + b"\xd3" + whole[at + 2 :])
    put("jpeg-wrong-end-marker.jpg", whole[:-1] + b"\x83")
    put("jpeg-comment-after-scan.jpg", whole[:-2] + b"\xff\xfe\0\7hello" + whole[-2:])
    put("jpeg-text.jpg", b"this is not an image\n")
    put("jpeg-empty.jpg", b"")
    big = photo(700, 467, 7)
    put("jpeg-landscape.jpg", saved(big, "JPEG", quality=60), size=224)
    put("jpeg-portrait.jpg", saved(big.rotate(90, expand=True), "JPEG", quality=60, progressive=True), size=224)


# ---- PNG


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_file(width, height, depth, colour, rows, interlace=0, extra=b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


def adam7(image: Image.Image, pack) -> list[bytes]:
    """The lines of an interlaced image; `pack` turns samples into bytes."""
    rows = []
    width, height = image.size
    data = list(image.getdata())
    for left, top, across, down in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):
        for y in range(top, height, down):
            row = [data[y * width + x] for x in range(left, width, across)]
            if row:
                rows.append(pack(row))
    return rows


def bits(row, depth: int) -> bytes:
    value, count, out = 0, 0, bytearray()
    for sample in row:
        value, count = value << depth | sample, count + depth
        if count == 8:
            out.append(value)
            value, count = 0, 0
    if count:
        out.append(value << (8 - count))
    return bytes(out)


def lines(image: Image.Image, pack) -> list[bytes]:
    width, height = image.size
    data = list(image.getdata())
    return [pack(data[y * width : (y + 1) * width]) for y in range(height)]


def png() -> None:
    image = photo(120, 90, 2)
    rgba = image.copy()
    rgba.putalpha(alpha_for(image))
    grey = image.convert("L")
    palette = image.quantize(60)
    put("png-1.png", saved(image.convert("1"), "PNG"))
    put("png-l.png", saved(grey, "PNG"))
    for depth in (2, 4):
        low = grey.point(lambda value: value >> (8 - depth))
        put(f"png-l{depth}.png", png_file(*grey.size, depth, 0, lines(low, lambda row: bits(row, depth))))
    for depth in (1, 2, 4, 8):
        few = image.quantize(2**depth)
        put(f"png-p{depth}.png", saved(few, "PNG", bits=depth))
    put("png-p-transparent.png", saved(palette, "PNG", transparency=3))
    put("png-p-alphas.png", saved(palette, "PNG", transparency=bytes(range(0, 240, 4))))
    put("png-l-transparent.png", saved(grey, "PNG", transparency=100))
    put("png-rgb-transparent.png", saved(image, "PNG", transparency=(1, 2, 3)))
    put("png-la.png", saved(rgba.convert("LA"), "PNG"))
    put("png-rgb.png", saved(image, "PNG"))
    put("png-rgba.png", saved(rgba, "PNG"))
    deep = grey.convert("I").point(lambda value: value * 257 - 90).convert("I;16")
    put("png-i16.png", saved(deep, "PNG"))
    dark = grey.convert("I").point(lambda value: value * 1 + 0).convert("I;16")
    put("png-i16-dark.png", saved(dark, "PNG"))

    def sixteen(row):
        flat = [channel for pixel in row for channel in pixel]
        return struct.pack(f">{len(flat)}H", *(channel * 257 - channel // 3 for channel in flat))

    put("png-rgb16.png", png_file(*image.size, 16, 2, lines(image, sixteen)))
    put("png-rgba16.png", png_file(*image.size, 16, 6, lines(rgba, sixteen)))
    put("png-la16.png", png_file(*image.size, 16, 4, lines(rgba.convert("LA"), sixteen)))
    flat = lambda row: bytes(channel for pixel in row for channel in pixel)  # noqa: E731
    put("png-interlaced-rgb.png", png_file(*image.size, 8, 2, adam7(image, flat), 1))
    put("png-interlaced-rgba.png", png_file(*image.size, 8, 6, adam7(rgba, flat), 1))
    put("png-interlaced-l.png", png_file(*image.size, 8, 0, adam7(grey, bytes), 1))
    few = image.quantize(16)
    table = png_chunk(b"PLTE", bytes(few.getpalette("RGB")[:48]))
    put("png-interlaced-p4.png", png_file(*image.size, 4, 3, adam7(few, lambda row: bits(row, 4)), 1, table))
    one = image.convert("1").point(lambda value: value and 1, "L")
    put("png-interlaced-1.png", png_file(*image.size, 1, 0, adam7(one, lambda row: bits(row, 1)), 1))
    put("png-interlaced-tiny.png", png_file(3, 2, 8, 2, adam7(image.resize((3, 2)), flat), 1))
    frames = [image.resize((60, 45)), ImageOps.invert(image.resize((60, 45)))]
    put("png-animated.png", saved(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    put("png-animated-default.png", saved(frames[0], "PNG", save_all=True, default_image=True, append_images=frames))
    exif = Image.Exif()
    exif[0x0112] = 8
    put("png-orientation-8.png", saved(image, "PNG", exif=exif), orient=True)
    put("png-same-size.png", saved(rgba.resize((SIZE, SIZE)), "PNG"))
    put("png-same-width.png", saved(rgba.resize((SIZE, 77)), "PNG"))
    put("png-upscaled.png", saved(rgba.resize((13, 9)), "PNG"))
    whole = saved(image, "PNG")
    put("png-truncated.png", whole[: len(whole) // 2])
    put("png-no-end.png", whole[:-12])
    put("png-cut-in-end.png", whole[:-3])
    put("png-bad-header-checksum.png", whole[:29] + b"abcd" + whole[33:])
    body = whole.index(b"IDAT")
    put("png-bad-data-checksum.png", whole[:-16] + b"abcd" + whole[-12:])
    put("png-bad-data.png", whole[: body + 20] + b"\xff\xff\xff\xff" + whole[body + 24 :])
    spoilt = zlib.compress(b"\0" * 10 + b"\7" * 80)
    put("png-bad-filter.png", png_file(9, 9, 8, 0, [b"\0" * 9] * 9).replace(zlib.compress(b"\0" * 90), spoilt))
    put("png-huge.png", png_file(60_000, 60_000, 8, 2, [b"\0"]))
    thin()


def thin() -> None:
    """1 × 8000: Pillow would make a strip of 3.6 GB, so its part is taken alone."""
    size = 224
    strip = photo(1, 8000, 3)
    data = saved(strip, "PNG")
    path = os.path.join(FILES, "png-thin.png")
    with open(path, "wb") as file:
        file.write(data)
    # Output rows 895,888 and on come from source row 3,999 and its neighbours;
    # twenty rows around it, resized by the same factor, give the same pixels.
    first = 3990
    part = strip.crop((0, first, 1, first + 20)).resize((size, 20 * size), Image.Resampling.BICUBIC)
    top = (8000 * size - size) // 2 - first * size
    part = part.crop((0, top, size, top + size))
    with open(os.path.join(EXPECTED, "png-thin-png-224.rgb"), "wb") as file:
        file.write(part.tobytes())
    cases.append({"file": "png-thin.png", "size": size, "expected": "png-thin-png-224.rgb", "mode": "RGB"})


# ---- GIF


def gif() -> None:
    image = photo(100, 80, 4)
    palette = image.quantize(90)
    put("gif-p.gif", saved(palette, "GIF", interlace=0))
    put("gif-interlaced.gif", saved(palette, "GIF", interlace=1))
    put("gif-grey.gif", saved(image.convert("L"), "GIF"))
    put("gif-1.gif", saved(image.convert("1"), "GIF"))
    put("gif-transparent.gif", saved(palette, "GIF", transparency=5))
    other = ImageOps.invert(image).quantize(40)
    put("gif-animated.gif", saved(palette, "GIF", save_all=True, append_images=[other], duration=50))
    whole = saved(palette, "GIF", interlace=0)
    # A larger screen around the same frame, which is moved to the right and down.
    moved = bytearray(whole)
    moved[6:10] = struct.pack("<HH", 140, 110)
    at = moved.rindex(b"," + struct.pack("<HHHH", 0, 0, 100, 80))
    moved[at + 1 : at + 5] = struct.pack("<HH", 25, 20)
    put("gif-small-frame.gif", bytes(moved))
    # A screen smaller than its frame grows.
    moved[6:10] = struct.pack("<HH", 50, 40)
    put("gif-large-frame.gif", bytes(moved))
    put("gif-truncated.gif", whole[: len(whole) // 2])
    put("gif-no-trailer.gif", whole[:-1])
    put("gif-no-frame.gif", whole[:13] + b";")
    put("gif-tiny.gif", saved(palette.crop((0, 0, 1, 1)), "GIF"))


# ---- BMP


def bmp_file(width, height, depth, rows, compression=0, table=b"", masks=b"", header=40, colours=0) -> bytes:
    """`rows` are in the order of the file; bytes are taken as they are."""
    data = rows if isinstance(rows, bytes) else b"".join(row + b"\0" * (-len(row) % 4) for row in rows)
    info = struct.pack("<IiiHHIIiiII", header, width, height, 1, depth, compression, len(data), 2835, 2835, colours, 0)
    info += masks if header > 40 else b""
    info += b"\0" * (header - len(info))
    after = masks if header == 40 else b""
    offset = 14 + header + len(after) + len(table)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + after + table + data


def rle8(rows, width) -> bytes:
    out = bytearray()
    for y, row in enumerate(rows):
        x = 0
        while x < width:
            run = 1
            while x + run < width and run < 255 and row[x + run] == row[x]:
                run += 1
            if run > 2 or width - x < 3:
                out += bytes((run, row[x]))
            else:
                run = min(7, width - x)
                out += bytes((0, run)) + bytes(row[x : x + run]) + b"\0" * (run % 2)
            x += run
        out += b"\0\0"
    return bytes(out) + b"\0\1"


def rle4(rows, width) -> bytes:
    out = bytearray()
    for row in rows:
        x = 0
        while x < width:
            pair = (row[x], row[x + 1] if x + 1 < width else 0)
            run = 2
            while x + run < width and run < 254 and row[x + run] == pair[run % 2]:
                run += 1
            out += bytes((min(run, width - x), pair[0] << 4 | pair[1]))
            x += run
        out += b"\0\0"
    return bytes(out) + b"\0\1"


def bmp() -> None:
    image = photo(101, 77, 5)
    width, height = image.size
    up = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    put("bmp-24.bmp", saved(image, "BMP"))
    put("bmp-8-grey.bmp", saved(image.convert("L"), "BMP"))
    put("bmp-1-mono.bmp", saved(image.convert("1"), "BMP"))
    for depth in (1, 4, 8):
        few = up.quantize(2**depth)
        colours = few.getpalette("RGB")[: 3 << depth]
        colours += [0] * ((3 << depth) - len(colours))
        table = b"".join(bytes((colours[i + 2], colours[i + 1], colours[i], 0)) for i in range(0, len(colours), 3))
        put(f"bmp-{depth}.bmp", bmp_file(width, height, depth, lines(few, lambda row: bits(row, depth)), table=table))
        rows = lines(few, list)
        if depth == 8:
            put("bmp-rle8.bmp", bmp_file(width, height, 8, rle8(rows, width), 1, table))
            put("bmp-8-top-down.bmp", bmp_file(width, -height, 8, lines(few.transpose(Image.Transpose.FLIP_TOP_BOTTOM), bytes), table=table))
            short = rle8(rows[: height // 2], width)
            put("bmp-rle8-short.bmp", bmp_file(width, height, 8, short, 1, table))
        if depth == 4:
            put("bmp-rle4.bmp", bmp_file(width, height, 4, rle4(rows, width), 2, table))
    core = struct.pack("<IHHHH", 12, width, height, 1, 24)
    body = b"".join(row + b"\0" * (-len(row) % 4) for row in lines(up, lambda row: bytes(c for r, g, b in row for c in (b, g, r))))
    put("bmp-os2.bmp", b"BM" + struct.pack("<IHHI", 26 + len(body), 0, 0, 26) + core + body)

    def words(red, green):
        def pack(row):
            return struct.pack(f"<{len(row)}H", *((r >> 3) << red | (g >> (8 - green)) << 5 | b >> 3 for r, g, b in row))

        return pack

    put("bmp-16.bmp", bmp_file(width, height, 16, lines(up, words(10, 5))))
    five = struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    put("bmp-16-565.bmp", bmp_file(width, height, 16, lines(up, words(11, 6)), 3, masks=five))
    four = lambda row: bytes(c for r, g, b in row for c in (b, g, r, 77))  # noqa: E731
    put("bmp-32.bmp", bmp_file(width, height, 32, lines(up, four)))
    rgba = up.copy()
    rgba.putalpha(alpha_for(up))
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    put("bmp-32-alpha.bmp", bmp_file(width, height, 32, lines(rgba, lambda row: bytes(c for r, g, b, a in row for c in (b, g, r, a))), 3, masks=masks, header=124))
    odd = struct.pack("<IIII", 0xF0, 0xF00, 0xF000, 0)
    put("bmp-32-odd-masks.bmp", bmp_file(width, height, 32, lines(up, four), 3, masks=odd, header=124))
    put("bmp-24-top-down.bmp", bmp_file(width, -height, 24, lines(image, lambda row: bytes(c for r, g, b in row for c in (b, g, r)))))
    put("bmp-24.dib", saved(image, "DIB"))
    put("bmp-8.dib", saved(image.quantize(200), "DIB"))
    whole = saved(image, "BMP")
    put("bmp-truncated.bmp", whole[: len(whole) // 2])
    put("bmp-header-only.bmp", whole[:54])


# ---- PCX


def pcx_file(width, height, depth, planes, lines_of_planes, table=b"") -> bytes:
    stride = (width * depth + 7) // 8
    stride += stride % 2
    head = struct.pack("<BBBBHHHHHH", 10, 5, 1, depth, 0, 0, width - 1, height - 1, 72, 72)
    head += table[:48].ljust(48, b"\0") + struct.pack("<BBHHHH", 0, planes, stride, 1, 0, 0)
    out = bytearray(head.ljust(128, b"\0"))
    for line in lines_of_planes:
        data = b"".join(plane.ljust(stride, b"\0") for plane in line)
        at = 0
        while at < len(data):
            run = 1
            while at + run < len(data) and run < 63 and data[at + run] == data[at]:
                run += 1
            if run > 1 or data[at] >= 0xC0:
                out += bytes((0xC0 | run, data[at]))
            else:
                out.append(data[at])
            at += run
    return bytes(out)


def pcx() -> None:
    image = photo(93, 71, 6)
    width, height = image.size
    put("pcx-1.pcx", saved(image.convert("1"), "PCX"))
    put("pcx-l.pcx", saved(image.convert("L"), "PCX"))
    put("pcx-p.pcx", saved(image.quantize(120), "PCX"))
    put("pcx-rgb.pcx", saved(image, "PCX"))
    for planes in (2, 4):
        few = image.quantize(2**planes)
        split = lambda row: [bits([value >> plane & 1 for value in row], 1) for plane in range(planes)]  # noqa: E731
        put(f"pcx-{planes}-planes.pcx", pcx_file(width, height, 1, planes, lines(few, split), bytes(few.getpalette("RGB"))))
    whole = saved(image, "PCX")
    put("pcx-truncated.pcx", whole[: len(whole) // 2])
    put("pcx-empty-window.pcx", whole[:8] + b"\0\0" + whole[10:])


# ---- WebP


def webp() -> None:
    image = photo(119, 83, 8)
    rgba = image.copy()
    rgba.putalpha(alpha_for(image))
    put("webp-lossy.webp", saved(image, "WEBP", quality=70))
    put("webp-lossless.webp", saved(image, "WEBP", lossless=True))
    put("webp-lossy-alpha.webp", saved(rgba, "WEBP", quality=70))
    put("webp-lossless-alpha.webp", saved(rgba, "WEBP", lossless=True))
    other = ImageOps.invert(image)
    put("webp-animated.webp", saved(image, "WEBP", save_all=True, append_images=[other], duration=80, quality=60))
    exif = Image.Exif()
    exif[0x0112] = 5
    put("webp-orientation-5.webp", saved(image, "WEBP", quality=70, exif=exif), orient=True)
    whole = saved(image, "WEBP", quality=70)
    put("webp-truncated.webp", whole[: len(whole) // 2])


# ---- TIFF


def tiff_file(tags: dict, blocks: list[bytes], big: bool = False, bigtiff: bool = False) -> bytes:
    """A TIFF of one page; `tags` maps a tag to (type, values), offsets go in here."""
    order = ">" if big else "<"
    offsets_tag, counts_tag = (324, 325) if 322 in tags else (273, 279)
    word = "Q" if bigtiff else "I"
    count = len(tags) + 2
    directory = (16 + 8 + count * 20 + 8) if bigtiff else (8 + 2 + count * 12 + 4)
    tags = dict(tags)
    tags[offsets_tag] = (4, [0] * len(blocks))
    tags[counts_tag] = (4, [len(block) for block in blocks])
    codes = {1: "B", 2: "c", 3: "H", 4: "I", 11: "f", 7: "B"}

    def packed(kind, values):
        return struct.pack(order + codes[kind] * len(values), *values)

    room = 8 if bigtiff else 4
    extra_at = directory
    sizes = {tag: len(packed(*tags[tag])) for tag in tags}
    data_at = directory + sum(size + size % 2 for size in sizes.values() if size > room)
    offsets = []
    for block in blocks:
        offsets.append(data_at)
        data_at += len(block) + len(block) % 2
    tags[offsets_tag] = (4, offsets)
    entries, extra = b"", b""
    for tag in sorted(tags):
        kind, values = tags[tag]
        value = packed(kind, values)
        if len(value) > room:
            place = struct.pack(order + word, extra_at + len(extra))
            extra += value + b"\0" * (len(value) % 2)
        else:
            place = value.ljust(room, b"\0")
        entries += struct.pack(order + "HH" + word, tag, kind, len(values)) + place
    mark = b"MM" if big else b"II"
    if bigtiff:
        head = mark + struct.pack(order + "HHHQ", 43, 8, 0, 16) + struct.pack(order + "Q", count)
    else:
        head = mark + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", count)
    body = b"".join(block + b"\0" * (len(block) % 2) for block in blocks)
    return head + entries + struct.pack(order + word, 0) + extra + body


def basics(image, depths, photometric, compression=1, **more) -> dict:
    tags = {
        256: (3, [image.size[0]]),
        257: (3, [image.size[1]]),
        258: (3, depths),
        259: (3, [compression]),
        262: (3, [photometric]),
        277: (3, [len(depths)]),
    }
    tags.update(more.get("tags", {}))
    return tags


def tiles(image, width, height, pack) -> list[bytes]:
    out = []
    for top in range(0, image.size[1], height):
        for left in range(0, image.size[0], width):
            tile = image.crop((left, top, left + width, top + height))
            out.append(b"".join(lines(tile, pack)))
    return out


def tiff() -> None:
    image = photo(83, 65, 9)
    grey = image.convert("L")
    rgba = image.copy()
    rgba.putalpha(alpha_for(image))
    mono = image.convert("1")
    palette = image.quantize(70)
    flat = lambda row: bytes(channel for pixel in row for channel in pixel)  # noqa: E731
    for name, compression in (("raw", "raw"), ("lzw", "tiff_lzw"), ("deflate", "tiff_adobe_deflate"), ("old-deflate", "tiff_deflate"), ("packbits", "packbits"), ("jpeg", "jpeg"), ("zstd", "zstd"), ("lzma", "lzma")):
        put(f"tiff-{name}.tif", saved(image, "TIFF", compression=compression))
    for name, compression in (("lzw", "tiff_lzw"), ("deflate", "tiff_adobe_deflate")):
        put(f"tiff-{name}-predictor.tif", saved(image, "TIFF", compression=compression, tiffinfo={317: 2}))
    deep = grey.convert("I").point(lambda value: value * 200 - 90).convert("I;16")
    put("tiff-i16-predictor.tif", saved(deep, "TIFF", compression="tiff_lzw", tiffinfo={317: 2}))
    for name, compression in (("g3", "group3"), ("g4", "group4"), ("rle", "tiff_ccitt")):
        put(f"tiff-{name}.tif", saved(mono, "TIFF", compression=compression))
    put("tiff-g3-2d.tif", saved(mono, "TIFF", compression="group3", tiffinfo={292: 1}))
    put("tiff-g4-small-strips.tif", saved(mono, "TIFF", compression="group4", strip_size=200))
    put("tiff-1.tif", saved(mono, "TIFF"))
    put("tiff-l.tif", saved(grey, "TIFF"))
    put("tiff-p.tif", saved(palette, "TIFF"))
    put("tiff-la.tif", saved(rgba.convert("LA"), "TIFF", compression="tiff_lzw"))
    put("tiff-rgba.tif", saved(rgba, "TIFF", compression="tiff_adobe_deflate"))
    put("tiff-cmyk.tif", saved(image.convert("CMYK"), "TIFF"))
    put("tiff-cmyk-jpeg.tif", saved(image.convert("CMYK"), "TIFF", compression="jpeg"))
    put("tiff-grey-jpeg.tif", saved(grey, "TIFF", compression="jpeg"))
    put("tiff-ycbcr.tif", saved(image.convert("YCbCr"), "TIFF"))
    put("tiff-ycbcr-jpeg.tif", saved(image.convert("YCbCr"), "TIFF", compression="jpeg"))
    # Pillow converts this mode by colour profiles and tables of its own.
    put("tiff-lab.tif", saved(image.convert("LAB"), "TIFF", icc_profile=None))
    cases[-1]["tolerance"] = [0.5, 25]
    put("tiff-i16.tif", saved(deep, "TIFF"))
    put("tiff-i16-lzw.tif", saved(deep, "TIFF", compression="tiff_lzw"))
    put("tiff-i16b.tif", saved(grey.convert("I;16").convert("I").convert("I;16B"), "TIFF"))
    integers = grey.convert("I").point(lambda value: value * 3 - 200)
    put("tiff-i32.tif", saved(integers, "TIFF"))
    floats = grey.convert("F").point(lambda value: value * 1.3 - 20.5)
    put("tiff-f32.tif", saved(floats, "TIFF"))
    put("tiff-f32-deflate.tif", saved(floats, "TIFF", compression="tiff_adobe_deflate"))
    put("tiff-f32-predictor.tif", saved(floats, "TIFF", compression="tiff_adobe_deflate", tiffinfo={317: 3}))
    put("tiff-big.tif", saved(image, "TIFF", big_tiff=True))
    for orientation in (3, 6):
        put(f"tiff-orientation-{orientation}.tif", saved(image, "TIFF", compression="tiff_lzw", tiffinfo={274: orientation}))
    other = ImageOps.invert(image)
    put("tiff-pages.tif", saved(image, "TIFF", compression="tiff_lzw", save_all=True, append_images=[other]))
    tile = (48, 32)
    side = {322: (3, [tile[0]]), 323: (3, [tile[1]])}
    for name, compression, squeeze in (("raw", 1, lambda data: data), ("deflate", 8, zlib.compress)):
        for big in (False, True):
            blocks = [squeeze(block) for block in tiles(image, *tile, flat)]
            put(f"tiff-tiles-{name}-{'mm' if big else 'ii'}.tif", tiff_file(basics(image, [8, 8, 8], 2, compression, tags=side), blocks, big))
        planes = [squeeze(block) for band in image.split() for block in tiles(band, *tile, bytes)]
        put(f"tiff-tiles-planes-{name}.tif", tiff_file(basics(image, [8, 8, 8], 2, compression, tags={**side, 284: (3, [2])}), planes))
        height = {278: (3, [20]), 284: (3, [2])}
        # Strips end with the image, tiles do not.
        rows = [squeeze(b"".join(lines(band.crop((0, top, band.size[0], min(top + 20, band.size[1]))), bytes))) for band in image.split() for top in range(0, image.size[1], 20)]
        put(f"tiff-planes-{name}.tif", tiff_file(basics(image, [8, 8, 8], 2, compression, tags=height), rows))

    def sixteen(order):
        def pack(row):
            samples = [channel * 257 - channel // 3 for pixel in row for channel in pixel]
            return struct.pack(f"{order}{len(samples)}H", *samples)

        return pack

    for big in (False, True):
        order, mark = (">", "mm") if big else ("<", "ii")
        data = b"".join(lines(image, sixteen(order)))
        put(f"tiff-rgb16-{mark}.tif", tiff_file(basics(image, [16] * 3, 2), [data], big))
        put(f"tiff-rgb16-deflate-{mark}.tif", tiff_file(basics(image, [16] * 3, 2, 8), [zlib.compress(data)], big))
        alpha = b"".join(lines(rgba, sixteen(order)))
        put(f"tiff-rgba16-{mark}.tif", tiff_file(basics(image, [16] * 4, 2, tags={338: (3, [2])}), [alpha], big))
        values = list(grey.getdata())
        signed = struct.pack(f"{order}{len(values)}h", *(value * 2 - 100 for value in values))
        put(f"tiff-signed16-{mark}.tif", tiff_file(basics(image, [16], 1, tags={339: (3, [2])}), [signed], big))
        real = struct.pack(f"{order}{len(values)}f", *(value * 0.9 + 3 for value in values))
        put(f"tiff-float-{mark}.tif", tiff_file(basics(image, [32], 1, tags={339: (3, [3])}), [real], big))
        whole = struct.pack(f"{order}{len(values)}H", *(min(value, 250) for value in values))
        put(f"tiff-grey16-deflate-{mark}.tif", tiff_file(basics(image, [16], 1, 8), [zlib.compress(whole)], big))
        put(f"tiff-big-{mark}.tif", tiff_file(basics(image, [8], 1), [bytes(values)], big, bigtiff=True))
    premultiplied = Image.composite(image, Image.new("RGB", image.size), rgba.getchannel("A"))
    premultiplied.putalpha(rgba.getchannel("A"))
    put("tiff-premultiplied.tif", tiff_file(basics(image, [8] * 4, 2, tags={338: (3, [1])}), [premultiplied.tobytes()]))
    put("tiff-rgbx.tif", tiff_file(basics(image, [8] * 4, 2, tags={338: (3, [0])}), [rgba.tobytes()]))
    put("tiff-premultiplied-grey.tif", tiff_file(basics(image, [8] * 2, 1, tags={338: (3, [1])}), [rgba.convert("LA").tobytes()]))
    put("tiff-palette-alpha.tif", tiff_file(basics(image, [8] * 2, 3, tags={338: (3, [2]), 320: (3, [value * 257 for value in range(256)] * 3)}), [rgba.convert("LA").tobytes()]))
    put("tiff-inverted.tif", tiff_file(basics(image, [8], 0), [grey.tobytes()]))
    for depth in (2, 4):
        low = grey.point(lambda value: value >> (8 - depth))
        put(f"tiff-l{depth}.tif", tiff_file(basics(image, [depth], 1), [b"".join(lines(low, lambda row: bits(row, depth)))]))
        turned = bytes(int(f"{byte:08b}"[::-1], 2) for byte in b"".join(lines(low, lambda row: bits(row, depth))))
        put(f"tiff-l{depth}-reversed.tif", tiff_file(basics(image, [depth], 1, tags={266: (3, [2])}), [turned]))
    even = grey.crop((0, 0, 82, 65))
    twelve = b"".join(
        struct.pack("BBB", a >> 1, (a & 1) << 7 | b >> 5, (b & 31) << 3)
        for a, b in zip(even.getdata(), list(even.getdata())[1:])
    )[: 82 * 65 * 3 // 2]
    put("tiff-12.tif", tiff_file(basics(even, [12], 1), [twelve]))
    # Two lumas across and down for one pair of chromas, deflated.
    chroma = photo(96, 64, 11).convert("YCbCr")
    luma, cb, cr = (band.load() for band in chroma.split())
    units = b"".join(
        bytes((luma[x, y], luma[x + 1, y], luma[x, y + 1], luma[x + 1, y + 1], cb[x, y], cr[x, y]))
        for y in range(0, 64, 2)
        for x in range(0, 96, 2)
    )
    put("tiff-ycbcr-420.tif", tiff_file(basics(chroma, [8] * 3, 6, 8, tags={530: (3, [2, 2])}), [zlib.compress(units)]))
    raw = saved(image, "TIFF")
    put("tiff-truncated.tif", raw[: len(raw) // 2])
    squeezed = tiff_file(basics(image, [8] * 3, 2, 8), [zlib.compress(image.tobytes())[:900]])
    put("tiff-truncated-deflate.tif", squeezed)
    put("tiff-unknown-compression.tif", tiff_file(basics(image, [8] * 3, 2, 34712), [b"abc"]))
    put("tiff-float64.tif", tiff_file(basics(image, [64], 1, tags={339: (3, [3])}), [b"\0" * 8 * 83 * 65]))
    put("tiff-no-size.tif", raw[:8] + b"\0\0" + raw[10:])


def main() -> None:
    for folder in (FILES, EXPECTED):
        os.makedirs(folder, exist_ok=True)
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
    for make in (jpeg, png, gif, bmp, pcx, webp, tiff):
        make()
    with open(os.path.join(HERE, "index.json"), "w") as file:
        json.dump({"pillow": PIL.__version__, "cases": cases}, file, indent=1)
        file.write("\n")
    refused = sum("refused" in case for case in cases)
    print(f"{len(cases)} cases, {refused} of them refused by Pillow")


if __name__ == "__main__":
    main()
