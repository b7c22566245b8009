"""A worker that does what the original does, written from its observed behaviour.

One message at a time: receive, get the object, open it with Pillow, run PyTorch CLIP on a batch of one, put the vector,
publish the event, delete the message; fresh SDK clients for each message; the label prompts embedded at start.

Environment: INPUT_QUEUE_URL, OUTPUT_TOPIC_ARN, CACHE_BUCKET, WEIGHTS (safetensors in OpenAI's layout), LABELS (a file
with one label a line; empty: none), plus the SDK's own variables. Ends on SIGTERM.
"""

import io
import json
import os
import signal
import sys
from urllib.parse import unquote, urlparse

import boto3
import torch
from clip import tokenize
from clip.clip import _transform
from clip.model import build_model
from PIL import Image
from safetensors.torch import load_file

MODEL = "ViT-B/32"
PREFIX = "clip-image-processor"


def load():
    state = load_file(os.environ["WEIGHTS"])
    state.pop("input_resolution", None)
    model = build_model(state).float().eval()
    return model, _transform(model.visual.input_resolution)


def label_features(model):
    path = os.environ.get("LABELS")
    if not path:
        return [], None
    with open(path, encoding="utf-8") as file:
        labels = [line.strip() for line in file if line.strip() and not line.startswith("#")]
    with torch.no_grad():
        features = model.encode_text(tokenize([f"a photo of a {label}" for label in labels]))
    return labels, features / features.norm(dim=-1, keepdim=True)


def handle(message, model, transform, labels, features):
    s3, sns, sqs = boto3.client("s3"), boto3.client("sns"), boto3.client("sqs")
    event = json.loads(message["Body"])
    url = urlparse(event["data"]["document"]["url"])
    body = s3.get_object(Bucket=url.netloc, Key=unquote(url.path[1:]))["Body"].read()
    pixels = transform(Image.open(io.BytesIO(body))).unsqueeze(0)
    with torch.no_grad():
        embedding = model.encode_image(pixels)
    vector = embedding[0].tolist()
    key = f"{PREFIX}/{event['data']['document']['etag']}"
    bucket = os.environ["CACHE_BUCKET"]
    s3.put_object(Bucket=bucket, Key=key, Body=json.dumps(vector), ContentType="application/json")
    if labels:
        scores = (embedding / embedding.norm(dim=-1, keepdim=True)) @ features.T
        event["data"]["metadata"]["keywords"] = [labels[i] for i in scores[0].topk(5).indices.tolist()]
    event["data"]["metadata"]["properties"] = {
        "kind": "text",
        "attrs": {"embeddings": {"vectors": f"s3://{bucket}/{key}", "model": MODEL, "dimensions": len(vector)}},
    }
    event["data"]["callStack"].insert(0, "clip-image-processor")
    sns.publish(TopicArn=os.environ["OUTPUT_TOPIC_ARN"], Message=json.dumps(event))
    sqs.delete_message(QueueUrl=os.environ["INPUT_QUEUE_URL"], ReceiptHandle=message["ReceiptHandle"])


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    model, transform = load()
    labels, features = label_features(model)
    while True:
        messages = boto3.client("sqs").receive_message(
            QueueUrl=os.environ["INPUT_QUEUE_URL"], MaxNumberOfMessages=1, WaitTimeSeconds=20
        )
        for message in messages.get("Messages", []):
            handle(message, model, transform, labels, features)


if __name__ == "__main__":
    main()
