"""mmcli finetune beside transformers' Trainer: contrastive training of one CLIP, in alternating whole processes.

    python benchmarks/finetune.py [--rows 512] [--rounds 3] [--batch-size 32]

The Trainer's script is what its documentation shows: a Dataset of pictures and captions, CLIPProcessor in the
collate function, `return_loss=True`, one data worker. Both train one epoch of ROWS and one of 2 ROWS pictures of
640 x 480; the difference of the two is the time of ROWS rows once everything is loaded. mmcli also measures 32
validation rows and writes its checkpoints; it does not read all rows beforehand (--no-preflight), as Trainer does
not. Losses of the last steps are compared: rows come in another order, so they are near, not equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peer_data import TEXT, make_images

HERE = Path(__file__).resolve().parent
RATE = "1e-4"


def make_model(folder: Path) -> None:
    """A CLIP with random weights: pictures of 224 pixels in patches of 32 through 6 layers of 384."""
    import torch
    import transformers as hf

    torch.manual_seed(0)
    donor = HERE.parent / "sample_data" / "models" / "clip"
    tokenizer = hf.CLIPTokenizer.from_pretrained(donor)
    sides = {"num_hidden_layers": 6, "num_attention_heads": 6, "hidden_size": 384, "intermediate_size": 1536}
    text = {**sides, "vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {**sides, "image_size": 224, "patch_size": 32}
    hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=256)).save_pretrained(folder)
    images = hf.CLIPImageProcessor()
    images.save_pretrained(folder)
    hf.CLIPProcessor(images, tokenizer).save_pretrained(folder)


def make_rows(folder: Path, count: int) -> None:
    """train.jsonl of `count` rows, double.jsonl of twice as many, val.jsonl of 32."""
    generator = np.random.default_rng(0)
    make_images(folder / "images", 2 * count + 32, (640, 480))
    words = TEXT.split()
    rows = [
        {"image": str(path), "caption": " ".join(generator.choice(words, 8))}
        for path in sorted((folder / "images").iterdir())
    ]
    parts = {"train": rows[:count], "double": rows[: 2 * count], "val": rows[-32:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def trainer(manifest: str, model_path: str, batch_size: int, out: str) -> None:
    """The peer."""
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor, Trainer, TrainingArguments

    rows = [json.loads(line) for line in Path(manifest).read_text().splitlines()]
    processor = CLIPProcessor.from_pretrained(model_path)

    class Pairs(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"image": Image.open(rows[index]["image"]).convert("RGB"), "caption": rows[index]["caption"]}

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        found = processor(
            images=[item["image"] for item in items],
            text=[item["caption"] for item in items],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        return {**found, "return_loss": True}

    arguments = TrainingArguments(
        out, per_device_train_batch_size=batch_size, num_train_epochs=1, learning_rate=float(RATE), use_cpu=True,
        dataloader_num_workers=1, remove_unused_columns=False, logging_steps=1, disable_tqdm=True, seed=0,
        weight_decay=0.01, lr_scheduler_type="cosine", warmup_steps=0.1,
    )  # fmt: skip
    made = Trainer(CLIPModel.from_pretrained(model_path), arguments, data_collator=collate, train_dataset=Pairs())
    made.train()
    made.save_model(out)
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    print(json.dumps(losses[-1]))


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def ours(manifest: Path, model: Path, batch_size: int, out: Path) -> tuple[float, float]:
    command = [
        sys.executable,
        "-m",
        "mmcli",
        "finetune",
        str(manifest),
        "--val",
        str(manifest.with_name("val.jsonl")),
    ]
    command += [
        "--image-column",
        "image",
        "--text-column",
        "caption",
        "--objective",
        "contrastive",
        "-m",
        str(model),
    ]
    command += ["-o", str(out), "--overwrite", "--epochs", "1", "--batch-size", str(batch_size), "--quiet"]
    seconds, _ = timed(
        [*command, "--learning-rate", RATE, "--num-workers", "1", "--no-preflight", "--device", "cpu"]
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return seconds, [line["loss"] for line in lines if "loss" in line][-1]


def theirs(manifest: Path, model: Path, batch_size: int, out: Path) -> tuple[float, float]:
    command = [sys.executable, __file__, "--peer", str(manifest), str(model), str(batch_size), str(out)]
    seconds, said = timed(command)
    return seconds, float(json.loads(said.splitlines()[-1]))


def main() -> None:
    """Parse the command line; print samples a second of both sides, their ratio and its spread."""
    if "--peer" in sys.argv:
        manifest, model, batch_size, out = sys.argv[2:]
        return trainer(manifest, model, int(batch_size), out)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_rows(work, given.rows)
        make_model(work / "model")
        found: dict[str, list[tuple[float, float]]] = {"mmcli": [], "Trainer": []}
        for number in range(given.rounds):
            for side in list(found)[:: 1 if number % 2 == 0 else -1]:
                run = ours if side == "mmcli" else theirs
                once, _ = run(work / "train.jsonl", work / "model", given.batch_size, work / side)
                twice, loss = run(work / "double.jsonl", work / "model", given.batch_size, work / side)
                found[side].append((2 * given.rows / twice, given.rows / (twice - once)))
                whole, loaded = found[side][-1]
                print(f"{side}: {whole:.1f} rows/s whole, {loaded:.1f} loaded; loss {loss:.3f}", flush=True)
    for index, what in enumerate(("whole process", "once loaded")):
        ratios = sorted(a[index] / b[index] for a, b in zip(found["mmcli"], found["Trainer"], strict=True))
        print(f"{what}: {statistics.median(ratios):.2f} times Trainer ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
