"""Makes the goldens that tests/goldens.rs compares the compiled graphs with.

The reference is the model code of the PyPI package `openai-clip`, in 32-bit floats on a CPU, with
weights from `clip-model synthesize NAME --seed 0` and pixels from the formula below, which
tests/goldens.rs repeats.

    pip install torch openai-clip safetensors numpy "setuptools<80"
    python make.py PATH_OF_CLIP_MODEL_BINARY [MODEL…]
"""

import hashlib
import html
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import clip
import numpy as np
import torch
from clip.model import CLIP
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).parent
MODELS = ["tiny", "ViT-B/32", "ViT-B/16", "ViT-L/14"]
IMAGES = 8
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711])
TEXTS = [
    "a photo of a cat",
    "a photo of a combine harvester",
    "Two dogs, running on the beach at 7:30!",
    "a",
    "",
    "naïve café — ÜBER-straße 東京",
]
# Encoded, not embedded: what a tokenizer may get wrong.
HARD_TEXTS = TEXTS + [
    "it's they'll we've I'd you're don't I'm",
    "  spaces \t and\nlines  ",
    "emoji 🎉🐈 and ½ ² ①",
    "HELLO WoRLD",
    "1234567890 3.14159 -5%",
    "under_score @mention #hashtag http://example.org/path?x=1",
    "antidisestablishmentarianism",
    "ελληνικά русский العربية हिन्दी",
    "\"quotes\" (brackets) [more] {these} <tags>",
    "ſ İ ẞ and wow!!! ... ??",
]


def pixels(size):
    """Eight images: black, white, six smooth and busy patterns; all whole-number arithmetic."""
    y, x, c = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
    images = [np.zeros((size, size, 3), np.int64), np.full((size, size, 3), 255, np.int64)]
    for i in range(2, IMAGES):
        wave = x * x * (3 + i) + y * y * (5 + 2 * i) + x * y * (7 + c) + c * 85 * 64 + i * 40 * 64
        images.append((wave >> (i + 1)) & 255)
    return np.stack(images).astype(np.uint8)


def load(name, binary, folder):
    path = Path(folder) / "weights.safetensors"
    command = [binary, "synthesize", name, "--seed", "0", "--output", str(path)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    with safe_open(path, "pt") as file:
        shape = json.loads(file.metadata()["clip-model.synthesized"])["architecture"]
        state = {key: file.get_tensor(key) for key in file.keys()}
    vision, text = shape["vision"], shape["text"]
    model = CLIP(
        shape["dimensions"],
        vision["image_size"],
        vision["transformer"]["layers"],
        vision["transformer"]["width"],
        vision["patch_size"],
        text["context"],
        text["vocabulary"],
        text["transformer"]["width"],
        text["transformer"]["heads"],
        text["transformer"]["layers"],
    )
    # The class takes 64 channels per head for granted.
    for block in model.visual.transformer.resblocks:
        block.attn.num_heads = vision["transformer"]["heads"]
        block.attn.head_dim = vision["transformer"]["width"] // block.attn.num_heads
    model.load_state_dict(state)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return model.float().eval(), vision["image_size"], digest.hexdigest()


def embed(model, size):
    scaled = torch.from_numpy(pixels(size)).float() / 255
    images = ((scaled - MEAN) / DEVIATION).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        return (
            torch.cat([model.encode_image(image[None]) for image in images]).numpy(),
            model.encode_text(clip.tokenize(TEXTS)).numpy(),
        )


def with_exact_gelu(model):
    for tower in (model.visual.transformer, model.transformer):
        for block in tower.resblocks:
            block.mlp.gelu = torch.nn.GELU()
    return model


def main():
    binary, names = sys.argv[1], sys.argv[2:] or MODELS
    tokens = [{"text": text, "ids": ids[: ids.argmax() + 1].tolist()} for text, ids in zip(HARD_TEXTS, clip.tokenize(HARD_TEXTS))]
    assert all(html.unescape(text) == text for text in HARD_TEXTS)
    (HERE / "tokens.json").write_text(json.dumps(tokens, ensure_ascii=False, indent=1) + "\n")
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            model, size, digest = load(name, binary, folder)
            vision, text = embed(model, size)
            tensors = {"vision": vision, "text": text}
            if name == "tiny":
                tensors["vision_gelu"], tensors["text_gelu"] = embed(with_exact_gelu(model), size)
        normal = vision / np.linalg.norm(vision, axis=1, keepdims=True)
        print(name, "norm", np.linalg.norm(vision, axis=1).round(1), "cosine", (normal @ normal.T).round(3)[2])
        tensors = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        metadata = {"weights_sha256": digest, "texts": json.dumps(TEXTS), "torch": str(torch.__version__)}
        save_file(tensors, HERE / f"{name.replace('/', '-')}.safetensors", metadata)


main()
