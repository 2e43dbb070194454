"""mmcli caption beside what people write by hand, on the same pictures and model, in alternating whole processes.

    python benchmarks/captions.py [--count 240] [--rounds 3] [--max-new-tokens 50] [--photos DIR] [--model DIR]

The peers:

    loop      one picture at a time: processor, model.generate, decode
    pipeline  transformers' pipeline("image-text-to-text", batch_size=8)

Without --model it is a BLIP with random weights: the text decoder of 6 layers of 384, 30,522 tokens, the picture
encoder a ViT-Tiny of 224 pixels. Its end token is loud enough that texts have 5 to 50 tokens. Pictures are those of
sample_data/ and of --photos, again and again. Each side is timed from its start to its exit, and from its first
result on (its first batch not counted); seconds of processors are what other processes disturb least. All sides
decode whole pictures, and their texts are compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PIPELINE_BATCH = 8
VOCABULARY, CLS, SEP = 30_522, 101, 102
# Of the end token's weights: a tenth of the texts has 8 tokens or less, half 29 or more, a third the 50 allowed.
END_LOUDNESS = 5.0


@dataclass
class Timing:
    """Wall and processor seconds of a whole process, and rows a second after its first result."""

    whole: float
    cpu: float
    steady: float


def make_model(folder: Path) -> None:
    """A BLIP with random weights whose texts differ from picture to picture, and end at different places."""
    import torch
    import transformers as hf

    text = {
        "vocab_size": VOCABULARY, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
        "num_attention_heads": 6, "encoder_hidden_size": 192, "bos_token_id": VOCABULARY - 1, "sep_token_id": SEP,
        "pad_token_id": 0, "eos_token_id": SEP,
    }  # fmt: skip
    vision = {
        "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3,
        "image_size": 224, "patch_size": 16,
    }  # fmt: skip
    model = hf.BlipForConditionalGeneration(hf.BlipConfig(text_config=text, vision_config=vision))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            scale = weight[0].numel() ** -0.5
            if "position_embedding" in name:
                scale = 0.3
            elif "word_embeddings" in name:
                scale = 0.05
            elif "text" in name and "attention.output.dense" in name:
                # Else the picture, which is the same at every step, drowns what is written.
                scale *= 0.45
            weight.normal_(0, scale, generator=generator)
        model.text_decoder.get_output_embeddings().weight[SEP] *= END_LOUDNESS
    words = [f"w{number:05d}" for number in range(VOCABULARY)]
    for number, word in {0: "[PAD]", 100: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", 103: "[MASK]"}.items():
        words[number] = word
    # The start token, which decoding has to leave out.
    words[-1] = "[DEC]"
    tokenizer = hf.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[DEC]"]})
    images = hf.BlipImageProcessor(size={"height": 224, "width": 224})
    model.save_pretrained(folder)
    images.save_pretrained(folder)
    hf.BlipProcessor(images, tokenizer).save_pretrained(folder)


def make_pictures(folder: Path, sources: list[Path], count: int) -> None:
    folder.mkdir()
    found = sorted(p for s in sources for p in s.iterdir() if p.suffix in (".jpg", ".png", ".bmp", ".webp"))
    for number, source in zip(range(count), itertools.cycle(found), strict=False):
        shutil.copy(source, folder / f"{number:05d}{source.suffix}")


# ------------------------------------------------------------------------------------------ the peers


def loop(paths: list[Path], model_path: str, limit: int) -> Any:
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.image_utils import load_image

    processor = AutoProcessor.from_pretrained(model_path)
    model = AutoModelForImageTextToText.from_pretrained(model_path).eval()
    for path in paths:
        inputs = processor(images=load_image(str(path)), return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False, num_beams=1)
        yield processor.decode(tokens[0], skip_special_tokens=True)


def pipeline(paths: list[Path], model_path: str, limit: int) -> Any:
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=model_path)
    inputs = ({"images": str(path), "text": ""} for path in paths)
    options = {"max_new_tokens": limit, "do_sample": False, "num_beams": 1}
    for found in pipe(inputs, batch_size=PIPELINE_BATCH, generate_kwargs=options):
        yield found[0]["generated_text"]


def peer(name: str, data: str, model: str, limit: int, out: str) -> None:
    """Write the texts; the last line on stdout says how fast."""
    paths = sorted(Path(data).iterdir())
    times, texts = [], []
    for text in {"loop": loop, "pipeline": pipeline}[name](paths, model, limit):
        texts.append(text)
        times.append(time.perf_counter())
    Path(out).write_text(json.dumps(texts))
    # Those of a batch come together.
    first = 1 if name == "loop" else PIPELINE_BATCH
    print(json.dumps((len(paths) - first) / (times[-1] - times[0])))


# ------------------------------------------------------------------------------------------ side by side


def run(command: list[str]) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Wall seconds, processor seconds with those of its own processes, and what it printed."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu, done


def ours(data: Path, model: str, limit: int, out: Path) -> tuple[Timing, list[str], list[int]]:
    command = [
        sys.executable,
        "-m",
        "mmcli",
        "caption",
        str(data),
        "-m",
        model,
        "-o",
        str(out),
        "--overwrite",
        "--quiet",
    ]
    whole, cpu, done = run([*command, "--json", "--exact-decode", "--max-new-tokens", str(limit)])
    report = json.loads(done.stderr.splitlines()[-1])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    batch = -(-len(rows) // report["batches"])
    steady = (len(rows) - batch) / (report["wall_s"] - report["first_result_s"])
    return Timing(whole, cpu, steady), [row["caption"] for row in rows], [row["n_tokens"] for row in rows]


def theirs(name: str, data: Path, model: str, limit: int, out: Path) -> tuple[Timing, list[str]]:
    command = [sys.executable, __file__, "--peer", name, str(data), model, str(limit), str(out)]
    whole, cpu, done = run(command)
    return Timing(whole, cpu, float(done.stdout.splitlines()[-1])), json.loads(out.read_text())


def compare(data: Path, model: str, limit: int, rounds: int, work: Path) -> None:
    timings: dict[str, list[Timing]] = {"mmcli": [], "loop": [], "pipeline": []}
    texts: dict[str, list[str]] = {}
    lengths: list[int] = []
    for number in range(rounds):
        # The order alternates, so that a machine that gets slower favours nobody.
        for name in list(timings)[:: 1 if number % 2 == 0 else -1]:
            if name == "mmcli":
                timing, texts[name], lengths = ours(data, model, limit, work / "mmcli.jsonl")
            else:
                timing, texts[name] = theirs(name, data, model, limit, work / f"{name}.json")
            timings[name].append(timing)
    count = len(lengths)
    spread = statistics.quantiles(lengths, n=10)
    print(f"tokens of a text: half have {statistics.median(lengths):.0f} or more, ", end="")
    print(f"a tenth {spread[0]:.0f} or less, a tenth {spread[-1]:.0f} or more")
    for name, found in timings.items():
        whole = sorted(count / t.whole for t in found)
        steady = sorted(t.steady for t in found)
        cpu = statistics.median(t.cpu for t in found)
        same = sum(a.strip() == b.strip() for a, b in zip(texts["mmcli"], texts[name], strict=True))
        print(
            f"{name:9} rows/s: whole {_rates(whole)}, steady {_rates(steady)}; {cpu:6.1f} s of processors", end=""
        )
        print(f"; {same} of {count} texts as mmcli's")
    for name in ("loop", "pipeline"):
        pairs = list(zip(timings["mmcli"], timings[name], strict=True))
        # Medians over the rounds: what else the machine does in a round slows all sides.
        ratios = (
            statistics.median(t.whole / o.whole for o, t in pairs),
            statistics.median(o.steady / t.steady for o, t in pairs),
            statistics.median(t.cpu / o.cpu for o, t in pairs),
        )
        print("mmcli beside {}: whole {:.2f}, steady {:.2f}, processors {:.2f}".format(name, *ratios), flush=True)


def _rates(rates: list[float]) -> str:
    return f"{statistics.median(rates):.2f} ({rates[0]:.2f} to {rates[-1]:.2f})"


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        name, data, model, limit, out = sys.argv[2:]
        return peer(name, data, model, int(limit), out)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--photos", type=Path, action="append", default=[], help="another folder of pictures")
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument("--max-new-tokens", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = options.model or str(work / "model")
        if options.model is None:
            make_model(work / "model")
        make_pictures(work / "pictures", [HERE.parent / "sample_data" / "images", *options.photos], options.count)
        print(f"{options.count} pictures, {model}, {os.cpu_count()} cores, {options.rounds} rounds", flush=True)
        compare(work / "pictures", model, options.max_new_tokens, options.rounds, work)


if __name__ == "__main__":
    main()
