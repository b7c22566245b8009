"""Compares embeddings over the crops that `clip-image conformance` has left.

Ours: our crop through our graph (`clip-model embed`). The reference: Pillow's
crop through OpenAI's own CLIP code in PyTorch, on the same weights. Prints a
row per image type with the worst and the median relative L2 distance, lists
what is over the limit, and fails if less than the given share is within it.
Where the bundle has labels, the five best of each image are compared, too:
ours as the task would write them, the reference's from its own text tower.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import warnings

warnings.filterwarnings("ignore")

import numpy
import safetensors.torch
import torch
from clip import tokenize
from clip.model import build_model

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
BATCH = 16
SHOWN_LABELS = 5


def reference(model, crops):
    """The reference's embeddings of uint8 crops [n, size, size, 3]."""
    rows = []
    for start in range(0, len(crops), BATCH):
        pixels = torch.from_numpy(crops[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            rows.append(model.encode_image((pixels - MEAN) / DEVIATION).float().numpy())
    return numpy.concatenate(rows)


def ours(program, bundle, crops, folder):
    """Our embeddings of the same form, through `clip-model embed`."""
    raw = folder / "ours.rgb"
    raw.write_bytes(crops.tobytes())
    command = [program, "embed", bundle, "--pixels", raw]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [json.loads(line) for line in output.splitlines()]
    labels = [[label for label, _ in row["labels"] or []] for row in rows]
    return numpy.array([row["embedding"] for row in rows], dtype=numpy.float32), labels


def reference_labels(model, embeddings, names):
    """The five best labels of each embedding by the reference's text tower."""
    texts = []
    for start in range(0, len(names), BATCH):
        prompts = [f"a photo of a {name}" for name in names[start : start + BATCH]]
        with torch.no_grad():
            texts.append(model.encode_text(tokenize(prompts)).float().numpy())
    texts = numpy.concatenate(texts)
    texts /= numpy.linalg.norm(texts, axis=1, keepdims=True)
    best = numpy.argsort(-(embeddings @ texts.T), axis=1, kind="stable")[:, :SHOWN_LABELS]
    return [[names[index] for index in row] for row in best]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--crops", type=pathlib.Path, required=True, help="folder with report.json")
    parser.add_argument("--weights", type=pathlib.Path, required=True, help="safetensors of both sides")
    parser.add_argument("--bundle", type=pathlib.Path, required=True, help="bundle built from them")
    parser.add_argument("--clip-model", type=pathlib.Path, required=True, help="the clip-model program")
    parser.add_argument("--limit", type=float, default=1e-2, help="relative L2 distance allowed")
    parser.add_argument("--share", type=float, default=0.97, help="share of files that must keep it")
    arguments = parser.parse_args()

    report = json.loads((arguments.crops / "report.json").read_text())
    pairs = []
    for entry in report:
        crops = [arguments.crops / f"{entry['index']}.{side}.rgb" for side in ("ours", "reference")]
        if all(crop.exists() for crop in crops):
            pairs.append((entry["path"], entry["type"], *[numpy.fromfile(crop, numpy.uint8) for crop in crops]))
    if not pairs:
        sys.exit("no file was decoded by both sides: there is nothing to compare")
    size = int((pairs[0][2].size // 3) ** 0.5)
    mine, theirs = (
        numpy.stack([pair[side] for pair in pairs]).reshape(-1, size, size, 3) for side in (2, 3)
    )
    weights = safetensors.torch.load_file(arguments.weights)
    model = build_model(dict(weights)).float().eval()
    # build_model has rounded them to half precision, which is no loss for
    # weights that were published so; others are loaded again as they are.
    model.load_state_dict(weights, strict=False)
    want = reference(model, theirs)
    have, labels = ours(arguments.clip_model, arguments.bundle, mine, arguments.crops)
    distances = numpy.linalg.norm(have - want, axis=1) / numpy.linalg.norm(want, axis=1)

    print(f"\n{'type':<12} {'files':>6} {'over limit':>10} {'median rel. L2':>15} {'worst rel. L2':>14}")
    kinds = [pair[1] for pair in pairs]
    for kind in sorted(set(kinds)):
        rows = [float(d) for d, k in zip(distances, kinds) if k == kind]
        over = sum(not d <= arguments.limit for d in rows)
        print(f"{kind:<12} {len(rows):>6} {over:>10} {statistics.median(rows):>15.2e} {max(rows):>14.2e}")
    for distance, pair in sorted(zip(distances, pairs), key=lambda row: -row[0]):
        if not distance <= arguments.limit:
            print(f"  {distance:.3e}  {pair[0]}")
    within = sum(bool(d <= arguments.limit) for d in distances) / len(distances)
    print(f"{within:.2%} of {len(distances)} embeddings are within {arguments.limit:g} of the reference's")
    manifest = json.loads((arguments.bundle / "manifest.json").read_text())
    if manifest.get("labels"):
        names = safetensors.safe_open(arguments.bundle / "labels.safetensors", "np").metadata()["labels"]
        want_labels = reference_labels(model, want, json.loads(names))
        same = sum(a == b for a, b in zip(labels, want_labels))
        print(f"the five best labels are the same, in the same order, for {same} of {len(labels)} images")
    return 0 if within >= arguments.share else 1


if __name__ == "__main__":
    sys.exit(main())
