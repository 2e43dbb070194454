"""mmcli finetune beside transformers' Trainer: contrastive training of one CLIP, in alternating whole processes.

    python benchmarks/finetune.py [--rows 384] [--rounds 5] [--batch-size 32]

The Trainer's script is what its documentation shows: a Dataset of pictures and captions, CLIPProcessor in the
collate function, `return_loss=True`, one data worker, an evaluation and a checkpoint an epoch. Both train one epoch
of ROWS pictures of 640 x 480, evaluate 32 rows, write a checkpoint and the model. Steady is the pace of steps 3 to
10, as both sides log it. mmcli also writes its diagnostics; it does not read all rows beforehand (--no-preflight),
as Trainer does not. Losses of the validation rows are compared: rows come in another order, so they are near, not
equal.
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
# The steady pace is that of the steps after FIRST up to LAST.
FIRST, LAST = 2, 10


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
    """train.jsonl of `count` rows, val.jsonl of 32."""
    generator = np.random.default_rng(0)
    make_images(folder / "images", count + 32, (640, 480))
    words = TEXT.split()
    rows = [
        {"image": str(path), "caption": " ".join(generator.choice(words, 8))}
        for path in sorted((folder / "images").iterdir())
    ]
    parts = {"train": rows[:count], "val": rows[-32:]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def trainer(manifest: str, model_path: str, batch_size: int, out: str) -> None:
    """The peer."""
    import torch
    from PIL import Image
    from transformers import CLIPModel, CLIPProcessor, Trainer, TrainerCallback, TrainingArguments

    processor = CLIPProcessor.from_pretrained(model_path)

    class Pairs(torch.utils.data.Dataset[Any]):
        def __init__(self, path: Path) -> None:
            self.rows = [json.loads(line) for line in path.read_text().splitlines()]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = self.rows[index]
            return {"image": Image.open(row["image"]).convert("RGB"), "caption": row["caption"]}

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

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
        weight_decay=0.01, lr_scheduler_type="cosine", warmup_steps=0.1, eval_strategy="epoch",
        save_strategy="epoch", per_device_eval_batch_size=batch_size,
    )  # fmt: skip
    train, val = Pairs(Path(manifest)), Pairs(Path(manifest).with_name("val.jsonl"))
    made = Trainer(
        CLIPModel.from_pretrained(model_path), arguments, data_collator=collate, train_dataset=train,
        eval_dataset=val, callbacks=[Clock()],
    )  # fmt: skip
    # The loss is no label that the model's arguments name.
    made.can_return_loss = True
    made.train()
    made.save_model(out)
    loss = next(line["eval_loss"] for line in reversed(made.state.log_history) if "eval_loss" in line)
    steady = batch_size * (LAST - FIRST) / (ends[LAST - 1] - ends[FIRST - 1])
    print(json.dumps([steady, loss]))


def timed(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def ours(manifest: Path, model: Path, batch_size: int, out: Path) -> tuple[float, float, float]:
    """Seconds of the whole process, rows a second of the steady steps, validation loss."""
    columns = ["--image-column", "image", "--text-column", "caption", "--objective", "contrastive"]
    command = [sys.executable, "-m", "mmcli", "finetune", str(manifest), *columns]
    command += ["--val", str(manifest.with_name("val.jsonl")), "-m", str(model), "-o", str(out), "--overwrite"]
    command += ["--epochs", "1", "--batch-size", str(batch_size), "--quiet", "--learning-rate", RATE]
    seconds, _ = timed([*command, "--num-workers", "1", "--no-preflight", "--device", "cpu"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    paces = [line["rows_per_s"] for line in lines if "rows_per_s" in line and FIRST < line["step"] <= LAST]
    return seconds, statistics.harmonic_mean(paces), lines[-1]["val_loss"]


def theirs(manifest: Path, model: Path, batch_size: int, out: Path) -> tuple[float, float, float]:
    """The same of Trainer."""
    command = [sys.executable, __file__, "--peer", str(manifest), str(model), str(batch_size), str(out)]
    seconds, said = timed(command)
    steady, loss = json.loads(said.splitlines()[-1])
    return seconds, steady, loss


def main() -> None:
    """Parse the command line; print samples a second of both sides, their ratio and its spread."""
    if "--peer" in sys.argv:
        manifest, model, batch_size, out = sys.argv[2:]
        return trainer(manifest, model, int(batch_size), out)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
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
                seconds, steady, loss = run(work / "train.jsonl", work / "model", given.batch_size, work / side)
                found[side].append((given.rows / seconds, steady))
                whole, _ = found[side][-1]
                print(
                    f"{side}: {whole:.1f} rows/s whole, {steady:.1f} steady; validation loss {loss:.3f}", flush=True
                )
    for index, what in enumerate(("whole process", "steady")):
        ratios = sorted(a[index] / b[index] for a, b in zip(found["mmcli"], found["Trainer"], strict=True))
        print(f"{what}: {statistics.median(ratios):.2f} times Trainer ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
