"""The other side of peers.py: PEER KIND DATA MODEL OUT.npy, as a careful user would write it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

BATCH_SIZE = 32


class Pictures(torch.utils.data.Dataset):
    """Decoded and processed in the DataLoader's workers."""

    def __init__(self, folder: str, processor: object) -> None:
        self.paths = sorted(Path(folder).iterdir())
        self.processor = processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as picture:
            return self.processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def image_vectors(data: str, model_path: str) -> np.ndarray:
    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path).eval()
    loader = torch.utils.data.DataLoader(
        Pictures(data, processor), batch_size=BATCH_SIZE, num_workers=os.cpu_count() or 1
    )
    forward = model.get_image_features if hasattr(model, "get_image_features") else model
    with torch.inference_mode():
        return np.concatenate([forward(pixel_values=b).pooler_output.flatten(1).numpy() for b in loader])


def text_vectors(data: str, model_path: str) -> np.ndarray:
    from transformers import AutoModel, AutoTokenizer

    texts = read_texts(data)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModel.from_pretrained(model_path).eval()
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH_SIZE):
            inputs = tokenizer(
                texts[start : start + BATCH_SIZE], padding=True, truncation=True, return_tensors="pt"
            )
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1)
            found.append(((hidden * mask).sum(1) / mask.sum(1)).numpy())
    return np.concatenate(found)


def sentence_vectors(kind: str, data: str, model_path: str) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_path)
    if kind == "texts":
        return model.encode(read_texts(data), batch_size=BATCH_SIZE)
    pictures = [Image.open(path) for path in sorted(Path(data).iterdir())]
    return model.encode(pictures, batch_size=BATCH_SIZE)


def read_texts(data: str) -> list[str]:
    with open(data) as file:
        return [json.loads(line)["text"] for line in file]


def main() -> None:
    peer, kind, data, model, out = sys.argv[1:]
    if peer == "sentence-transformers":
        found = sentence_vectors(kind, data, model)
    else:
        found = image_vectors(data, model) if kind == "images" else text_vectors(data, model)
    np.save(out, found)


if __name__ == "__main__":
    main()
