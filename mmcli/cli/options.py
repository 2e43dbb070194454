"""The options that commands share, each written once.

A group of options is a dataclass whose annotations are typer options; `@with_options` gives a function one
parameter per group, and typer all of the groups' options. Every option is also the environment variable
MMCLI_<NAME> and a key of the --config file. Values other than flags are strings here: they are parsed where all
problems of a command are collected, so that the user sees them together.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

INPUTS, MODEL, EMBEDDING, QUESTIONS, GENERATION = "Inputs", "Model", "Embedding", "Questions", "Generation"
LABELS, EXAMPLES = "Labels", "Examples"
TRAINING, OPTIMIZATION = "Training", "Optimization"
ENDPOINT, OUTPUT, RUN, MESSAGES = "Endpoint", "Output", "Run", "Messages"


def _option(panel: str, names: str, metavar: str | None, help: str, **more: Any) -> Any:
    """`names`: as in "-m --model". `metavar`: None for a flag."""
    declared = names.split()
    long = next(n for n in declared if n.startswith("--")).partition("/")[0]
    variable = "MMCLI_" + long.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *declared, metavar=metavar, help=help, rich_help_panel=panel, envvar=variable, show_envvar=False, **more
    )


INPUT_HELP = "Folders, files, 'quoted/*.globs', manifests (.parquet .jsonl .csv .tsv), or - for paths on stdin."


@dataclass(frozen=True)
class InputArguments:
    """What to read."""

    inputs: Annotated[list[str] | None, typer.Argument(metavar="INPUT", help=INPUT_HELP, show_default=False)] = None
    glob: Annotated[
        list[str] | None,
        _option(INPUTS, "--glob", "PATTERN", "Only files of a folder that match, e.g. '*.jpg'. Repeatable."),
    ] = None
    hidden: Annotated[bool, _option(INPUTS, "--hidden", None, "Hidden files and folders too.")] = False
    follow_symlinks: Annotated[
        bool, _option(INPUTS, "--follow-symlinks/--no-follow-symlinks", None, "Follow symbolic links in folders.")
    ] = True
    null: Annotated[bool, _option(INPUTS, "-0 --null", None, "Paths on stdin end with NUL (find -print0).")] = False
    input_format: Annotated[
        str | None,
        _option(
            INPUTS,
            "--input-format",
            "FORMAT",
            "Read inputs as parquet, jsonl, csv, tsv or paths (a list) [by name].",
        ),
    ] = None
    image_column: Annotated[
        str | None, _option(INPUTS, "--image-column", "COLUMN", "Manifest column with pictures (path or bytes).")
    ] = None
    audio_column: Annotated[
        str | None, _option(INPUTS, "--audio-column", "COLUMN", "Manifest column with sounds (path or bytes).")
    ] = None
    video_column: Annotated[
        str | None, _option(INPUTS, "--video-column", "COLUMN", "Manifest column with clips (path or bytes).")
    ] = None
    text_column: Annotated[str | None, _option(INPUTS, "--text-column", "COLUMN", "Manifest column with text.")] = (
        None
    )
    path_column: Annotated[
        str | None, _option(INPUTS, "--path-column", "COLUMN", "Manifest column with paths of any kind of media.")
    ] = None
    id_column: Annotated[
        str | None, _option(INPUTS, "--id-column", "COLUMN", "Manifest column to use as id [manifest#row].")
    ] = None
    keep: Annotated[
        list[str] | None,
        _option(INPUTS, "--keep", "A,B", "Manifest columns to pass through to the output; new=old renames one."),
    ] = None
    exact_decode: Annotated[bool, _option(INPUTS, "--exact-decode", None, "Decode large JPEGs at full size.")] = (
        False
    )


@dataclass(frozen=True)
class ModelArguments:
    """Which model, and how it runs."""

    model: Annotated[
        str | None, _option(MODEL, "-m --model", "MODEL", "Hub id, local directory or openai:NAME. Required.")
    ] = None
    revision: Annotated[str | None, _option(MODEL, "--revision", "REV", "Branch, tag or commit on the hub.")] = None
    device: Annotated[str, _option(MODEL, "--device", "DEVICE", "auto, cpu, cuda, cuda:N or mps.")] = "auto"
    dtype: Annotated[
        str, _option(MODEL, "--dtype", "DTYPE", "Precision of the model: auto, float32, bfloat16 or float16.")
    ] = "auto"
    attn_implementation: Annotated[
        str | None,
        _option(MODEL, "--attn-implementation", "NAME", "eager, sdpa, flash_attention_2, ... [the model's]"),
    ] = None
    compile: Annotated[bool, _option(MODEL, "--compile", None, "torch.compile the model.")] = False
    frames: Annotated[
        str, _option(MODEL, "--frames", "N", "Frames per clip, uniform in time, where the model leaves it open.")
    ] = "8"
    offline: Annotated[
        bool, _option(MODEL, "--offline", None, "Never ask the hub; only local directories and its cache.")
    ] = False
    trust_remote_code: Annotated[
        bool, _option(MODEL, "--trust-remote-code", None, "Run Python code that comes with the model.")
    ] = False
    allow_pickle: Annotated[
        bool, _option(MODEL, "--allow-pickle", None, "Load weights that are not safetensors (can run code).")
    ] = False
    base_model: Annotated[
        str | None,
        _option(MODEL, "--base-model", "MODEL", "Of an adapter (peft): its base [as the adapter says]."),
    ] = None


@dataclass(frozen=True)
class EmbeddingArguments:
    """What the vectors are."""

    normalize: Annotated[
        bool | None,
        _option(
            EMBEDDING,
            "--normalize/--no-normalize",
            None,
            "Vectors of unit length, or as they come [as the model does].",
        ),
    ] = None
    pooling: Annotated[
        str | None,
        _option(EMBEDDING, "--pooling", "NAME", "Tokens to one vector: cls, mean, max or pooler [the model's]."),
    ] = None
    embedding_dtype: Annotated[
        str, _option(EMBEDDING, "--embedding-dtype", "DTYPE", "How vectors are stored: float32 or float16.")
    ] = "float32"
    center: Annotated[
        Path | None,
        _option(
            EMBEDDING,
            "--center",
            "STATS.json",
            "Subtract each modality's mean from unit vectors: what mmcli eval --save-center wrote.",
        ),
    ] = None


@dataclass(frozen=True)
class CaptionArguments:
    """What captions are about."""

    prompt: Annotated[
        str | None,
        _option(
            GENERATION,
            "--prompt",
            "TEXT",
            "What captions go on from ('a photo of'), a Florence-2 task, or what a chat model is told; or @FILE.",
        ),
    ] = None


@dataclass(frozen=True)
class SpeechArguments:
    """What is said in sounds."""

    language: Annotated[
        str | None,
        _option(
            GENERATION,
            "--language",
            "LANGUAGE",
            "Of speech: de or german [found out for each sound, where the model knows several].",
        ),
    ] = None
    translate: Annotated[bool, _option(GENERATION, "--translate", None, "Write in English what is said.")] = False


@dataclass(frozen=True)
class QuestionArguments:
    """What is asked."""

    question: Annotated[
        list[str] | None,
        _option(
            QUESTIONS,
            "-q --question",
            "TEXT",
            "A question; {title} is the column title; @FILE reads it; name=... names its columns. Repeatable.",
        ),
    ] = None
    question_column: Annotated[
        str | None,
        _option(
            QUESTIONS, "--question-column", "COLUMN", "Manifest column with each row's question; name=COLUMN, too."
        ),
    ] = None
    questions: Annotated[
        Path | None, _option(QUESTIONS, "--questions", "FILE", "A file with a question a line, each for every row.")
    ] = None
    messages_column: Annotated[
        str | None,
        _option(
            QUESTIONS,
            "--messages-column",
            "COLUMN",
            "Instead of questions: manifest column with a conversation, which a chat model goes on with.",
        ),
    ] = None
    features_column: Annotated[
        str | None,
        _option(
            QUESTIONS,
            "--features-column",
            "COLUMN",
            "Manifest column with a detector's features, for VisualBERT and LXMERT: a list of numbers per region.",
        ),
    ] = None
    boxes_column: Annotated[
        str | None,
        _option(
            QUESTIONS,
            "--boxes-column",
            "COLUMN",
            "Manifest column with the boxes of these regions, for LXMERT: x1, y1, x2, y2 from 0 to 1.",
        ),
    ] = None
    answers: Annotated[
        Path | None,
        _option(
            QUESTIONS,
            "--answers",
            "FILE",
            "What a model's outputs mean where its config.json does not tell: one a line, or a JSON list.",
        ),
    ] = None
    choices: Annotated[
        str | None,
        _option(QUESTIONS, "--choices", "A,B,C", "The answer is one of these; its probability is in score."),
    ] = None
    schema: Annotated[
        str | None,
        _option(
            QUESTIONS,
            "--schema",
            "SCHEMA",
            "Answers are JSON: a JSON Schema file, or fields such as 'name, age int, tags list'.",
        ),
    ] = None


@dataclass(frozen=True)
class LabelArguments:
    """What there is to choose from, and what becomes of the scores."""

    labels: Annotated[
        str | None, _option(LABELS, "--labels", "A,B,C", "What an input may be [the model's own labels].")
    ] = None
    labels_file: Annotated[
        Path | None,
        _option(
            LABELS,
            "--labels-file",
            "FILE",
            'One a line; or JSON: a list, or {"cat": ["cat", "kitten"]} with texts; or what --save-labels wrote.',
        ),
    ] = None
    template: Annotated[
        list[str] | None,
        _option(
            LABELS,
            "--template",
            "TEXT",
            "What a label is put into: 'a photo of a {}.' [that; of sounds 'This is a sound of {}.']. Repeatable.",
        ),
    ] = None
    templates: Annotated[
        str | None,
        _option(LABELS, "--templates", "NAME", "A known set of them: imagenet80, simple7, audio or none."),
    ] = None
    question: Annotated[
        str | None,
        _option(LABELS, "--question", "TEXT", "What a chat model is asked; {labels} are these. @FILE reads it."),
    ] = None
    multi_label: Annotated[
        bool, _option(LABELS, "--multi-label", None, "Any number of labels applies; each is scored alone.")
    ] = False
    threshold: Annotated[
        str, _option(LABELS, "--threshold", "P", "With --multi-label: labels with this score apply.")
    ] = "0.5"
    top_k: Annotated[str, _option(LABELS, "--top-k", "K", "How many of the best labels to list.")] = "5"
    min_score: Annotated[
        str | None,
        _option(LABELS, "--min-score", "P", "Below it no label is given, and the column rejected says so."),
    ] = None
    save_labels: Annotated[
        Path | None,
        _option(LABELS, "--save-labels", "FILE", "Keep the labels' vectors, for --labels-file: a .parquet file."),
    ] = None
    vector_column: Annotated[
        str | None,
        _option(
            INPUTS, "--vector-column", "COLUMN", "Inputs are vectors in this column [that of an output of embed]."
        ),
    ] = None


@dataclass(frozen=True)
class FewShotArguments:
    """Solved examples, and what is made of them."""

    examples: Annotated[
        Path | None,
        _option(
            EXAMPLES,
            "--examples",
            "PATH",
            "Solved examples: a folder with one folder for each label, a manifest, or an output of embed.",
        ),
    ] = None
    label_column: Annotated[
        str, _option(EXAMPLES, "--label-column", "COLUMN", "Column of the examples' manifest with their labels.")
    ] = "label"
    method: Annotated[
        str,
        _option(
            EXAMPLES,
            "--method",
            "NAME",
            "mean: nearest class mean; probe: logistic regression; tip-adapter: with zero-shot [by their number].",
        ),
    ] = "auto"
    tip_alpha: Annotated[str, _option(EXAMPLES, "--tip-alpha", "A", "Weight of tip-adapter's examples.")] = "1"
    tip_beta: Annotated[str, _option(EXAMPLES, "--tip-beta", "B", "Sharpness of tip-adapter's examples.")] = "5.5"
    save_head: Annotated[
        Path | None, _option(EXAMPLES, "--save-head", "FOLDER", "Keep the head: -m FOLDER classifies with it.")
    ] = None


@dataclass(frozen=True)
class IntoArguments:
    """Files in folders of their labels."""

    into: Annotated[
        Path | None,
        _option(
            OUTPUT, "--into", "FOLDER", "Put each file into FOLDER/label/ too, with a metadata.csv (imagefolder)."
        ),
    ] = None
    link: Annotated[bool, _option(OUTPUT, "--link", None, "With --into: as symbolic links [that].")] = False
    copy: Annotated[bool, _option(OUTPUT, "--copy", None, "With --into: as copies.")] = False


@dataclass(frozen=True)
class GenerationArguments:
    """How texts are written."""

    system: Annotated[
        str | None, _option(GENERATION, "--system", "TEXT", "The system message of a chat model; @FILE reads it.")
    ] = None
    examples: Annotated[
        Path | None,
        _option(
            GENERATION,
            "--examples",
            "FILE",
            "Solved cases that a chat model sees first: a manifest of media with an answer (and question) column.",
        ),
    ] = None
    examples_select: Annotated[
        str,
        _option(
            GENERATION,
            "--examples-select",
            "HOW",
            "all; or for each row random ones, or similar: nearest by --embeddings and --examples-embeddings.",
        ),
    ] = "all"
    num_examples: Annotated[
        str, _option(GENERATION, "--num-examples", "N", "How many a row gets, where they are selected.")
    ] = "4"
    embeddings: Annotated[
        Path | None,
        _option(
            GENERATION,
            "--embeddings",
            "FILE",
            "The inputs' vectors, for --examples-select similar: a Parquet of embed.",
        ),
    ] = None
    examples_embeddings: Annotated[
        Path | None,
        _option(GENERATION, "--examples-embeddings", "FILE", "The examples' vectors, of the same model."),
    ] = None
    max_new_tokens: Annotated[
        str,
        _option(
            GENERATION,
            "--max-new-tokens",
            "N",
            "Longer texts are cut, and marked as such [50; answers 100; JSON 300].",
        ),
    ] = "auto"
    num_beams: Annotated[
        str, _option(GENERATION, "--num-beams", "N", "Beams of a beam search; 1: the likeliest token each time.")
    ] = "1"
    temperature: Annotated[
        str,
        _option(
            GENERATION, "--temperature", "T", "Above 0: draw tokens; --seed and the row's input alone decide which."
        ),
    ] = "0"


@dataclass(frozen=True)
class EndpointArguments:
    """A server that runs the model."""

    endpoint: Annotated[
        str | None,
        _option(
            ENDPOINT,
            "--endpoint",
            "URL",
            "Of an OpenAI-compatible server, e.g. http://localhost:8000/v1, for -m openai:NAME.",
        ),
    ] = None
    extra_body: Annotated[
        str | None,
        _option(
            ENDPOINT,
            "--extra-body",
            "JSON",
            """More of each request, e.g. '{"top_p": 0.9}'; null leaves out what would be there.""",
        ),
    ] = None
    concurrency: Annotated[str, _option(ENDPOINT, "--concurrency", "N", "Requests under way at most.")] = "8"
    retry_time: Annotated[
        str,
        _option(ENDPOINT, "--retry-time", "TIME", "A server that is away or busy so long ends the run, exit 75."),
    ] = "2m"
    request_timeout: Annotated[
        str, _option(ENDPOINT, "--request-timeout", "TIME", "An answer that takes longer is asked for again.")
    ] = "10m"
    batch_results: Annotated[
        list[Path] | None,
        _option(
            ENDPOINT,
            "--batch-results",
            "FILE",
            "Take answers from results of an OpenAI batch, whose requests -f openai-batch wrote. Repeatable.",
        ),
    ] = None


@dataclass(frozen=True)
class OutputArguments:
    """Where rows go."""

    output: Annotated[
        str, _option(OUTPUT, "-o --output", "OUT", "A file, a folder (ends with /), or - for JSONL on stdout.")
    ] = "-"
    format: Annotated[
        str | None,
        _option(
            OUTPUT,
            "-f --format",
            "FORMAT",
            "parquet, jsonl, npy (clip-retrieval); results: coco, vqa; openai-batch [by the name of OUT].",
        ),
    ] = None
    overwrite: Annotated[bool, _option(OUTPUT, "--overwrite", None, "Replace OUT and start anew.")] = False
    update: Annotated[
        bool,
        _option(OUTPUT, "--update", None, "Bring OUT up to date: compute new, changed and failed inputs only."),
    ] = False
    retry_errors: Annotated[
        bool, _option(OUTPUT, "--retry-errors", None, "Compute only the error rows of OUT again.")
    ] = False


@dataclass(frozen=True)
class SidecarArguments:
    """Texts beside the files that they are of."""

    txt: Annotated[
        bool,
        _option(OUTPUT, "--txt", None, "Write each caption beside its file too: a.jpg, a.txt (as kohya-ss reads)."),
    ] = False
    srt: Annotated[
        bool, _option(OUTPUT, "--srt", None, "Write subtitles of speech beside each file: a.wav, a.srt.")
    ] = False
    vtt: Annotated[
        bool, _option(OUTPUT, "--vtt", None, "Write WebVTT subtitles of speech beside each file: a.wav, a.vtt.")
    ] = False
    replace_sidecars: Annotated[
        bool,
        _option(OUTPUT, "--replace-sidecars", None, "Replace those that are there already and say something else."),
    ] = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of mmcli.sinks.sidecars.SIDECARS."""
        return tuple(kind for kind in ("txt", "srt", "vtt") if getattr(self, kind))


@dataclass(frozen=True)
class RunArguments:
    """How to run; none of these changes a row (but the seed)."""

    batch_size: Annotated[
        str, _option(RUN, "--batch-size", "N", "Inputs per forward pass; auto: texts by tokens.")
    ] = "auto"
    num_workers: Annotated[
        str, _option(RUN, "--num-workers", "N", "Decode processes; 0: none, and no protection from crashes.")
    ] = "auto"
    timeout: Annotated[
        str, _option(RUN, "--timeout", "TIME", "An input that takes longer to decode is an error row.")
    ] = "120s"
    time_limit: Annotated[
        str | None, _option(RUN, "--time-limit", "TIME", "Stop after 90s, 30m or 8h, keep what is done, exit 75.")
    ] = None
    on_error: Annotated[
        str, _option(RUN, "--on-error", "WHAT", "record: an error is a row; fail: it ends the run.")
    ] = "record"
    max_errors: Annotated[
        str | None, _option(RUN, "--max-errors", "N or P%", "More error rows than that end the run, exit 4.")
    ] = None
    fail_on_empty: Annotated[bool, _option(RUN, "--fail-on-empty", None, "Exit 5 when there are no inputs.")] = (
        False
    )
    seed: Annotated[str, _option(RUN, "--seed", "N", "Seed of whatever is random.")] = "0"
    part_rows: Annotated[str, _option(RUN, "--part-rows", "N", "Commit after so many rows at the latest.")] = (
        "50000"
    )
    part_seconds: Annotated[str, _option(RUN, "--part-seconds", "TIME", "Commit after so long at the latest.")] = (
        "30s"
    )


@dataclass(frozen=True)
class TrainingArguments:
    """What is learned, and from what."""

    objective: Annotated[
        str,
        _option(TRAINING, "--objective", "NAME", "What is learned: classify, contrastive, caption, vqa, or probe."),
    ] = "classify"
    val: Annotated[
        list[str] | None,
        _option(TRAINING, "--val", "INPUT", "Rows to measure on, as INPUT. Repeatable. Required."),
    ] = None
    label_column: Annotated[
        str,
        _option(TRAINING, "--label-column", "COLUMN", "Column of manifests with labels; of folders, their names."),
    ] = "label"
    target_column: Annotated[
        str | None,
        _option(
            TRAINING,
            "--target-column",
            "COLUMN",
            "caption, vqa: column with what is to be written; vqa: or a list of all answers [caption; answer].",
        ),
    ] = None
    question_column: Annotated[
        str | None, _option(TRAINING, "--question-column", "COLUMN", "vqa: column with questions [question].")
    ] = None
    messages_column: Annotated[
        str | None,
        _option(
            TRAINING,
            "--messages-column",
            "COLUMN",
            "vqa by chat models: column with a conversation, whose last turn is learned, instead of the other two.",
        ),
    ] = None
    prompt: Annotated[
        str | None,
        _option(
            TRAINING,
            "--prompt",
            "TEXT",
            "caption: what the model is told first; give mmcli caption the same.",
        ),
    ] = None
    max_new_tokens: Annotated[
        str,
        _option(
            TRAINING,
            "--max-new-tokens",
            "N",
            "caption, vqa: texts are cut there, those that are learned too; auto: as mmcli caption and ask.",
        ),
    ] = "auto"
    language: Annotated[
        str | None, _option(TRAINING, "--language", "LANGUAGE", "caption by Whisper: of the texts, de or german.")
    ] = None
    auxiliary_column: Annotated[
        list[str] | None,
        _option(
            TRAINING,
            "--auxiliary-column",
            "COLUMN",
            "caption, vqa, contrastive: labels that the encoder of what is seen or heard learns to tell beside, by "
            "heads that are thrown away: helps models that begin with random weights. Repeatable.",
        ),
    ] = None
    new_answers: Annotated[
        bool,
        _option(
            TRAINING, "--new-answers", None, "vqa by ViLT: learn the answers of INPUT in place of the base's own."
        ),
    ] = False
    modality: Annotated[
        str | None,
        _option(TRAINING, "--modality", "NAME", "What the base is to learn, where it could learn several."),
    ] = None
    encoder: Annotated[
        list[str] | None,
        _option(
            TRAINING,
            "--encoder",
            "MODALITY=MODEL",
            "Instead of -m, join encoders: text=BERT, image=..., audio=..., video=... Repeatable. classify: any "
            "number, by a transformer; contrastive: two, in a new shared space.",
        ),
    ] = None
    hidden_size: Annotated[
        str, _option(TRAINING, "--hidden-size", "N", "With --encoder: width of what joins them.")
    ] = "512"
    fusion_layers: Annotated[str, _option(TRAINING, "--fusion-layers", "N", "With --encoder: its layers.")] = "6"
    fusion_heads: Annotated[str, _option(TRAINING, "--fusion-heads", "N", "With --encoder: its heads.")] = "8"
    projection_size: Annotated[
        str | None,
        _option(
            TRAINING, "--projection-size", "N", "contrastive with --encoder: numbers of a shared vector [512]."
        ),
    ] = None
    loss: Annotated[
        str | None,
        _option(
            TRAINING,
            "--loss",
            "NAME",
            "contrastive with --encoder: clip (rows of a batch compete) or siglip (each pair alone) [clip].",
        ),
    ] = None
    from_config: Annotated[
        bool, _option(TRAINING, "--from-config", None, "Begin with random weights, of the base's architecture.")
    ] = False
    freeze: Annotated[
        list[str] | None,
        _option(
            TRAINING,
            "--freeze",
            "PART",
            "Keep as it is: the encoder of a modality (image, ...), or weights whose names begin so. Repeatable.",
        ),
    ] = None
    balance: Annotated[
        bool, _option(TRAINING, "--balance", None, "Draw rows so that all classes come equally often.")
    ] = False
    augment: Annotated[
        str,
        _option(
            TRAINING,
            "--augment",
            "NAME",
            "Change inputs at random: none, flip (pictures), crop, noise (sounds), speed.",
        ),
    ] = "none"
    missing_policy: Annotated[
        str,
        _option(
            TRAINING,
            "--missing-policy",
            "WHAT",
            "What cannot be read: error ends the run, drop leaves such rows out; mask (with --encoder) takes their "
            "other media.",
        ),
    ] = "error"
    preflight: Annotated[
        bool, _option(TRAINING, "--preflight/--no-preflight", None, "Read every row before the first step.")
    ] = True


@dataclass(frozen=True)
class OptimizationArguments:
    """How weights are changed."""

    epochs: Annotated[str, _option(OPTIMIZATION, "--epochs", "N", "Passes over the training rows.")] = "3"
    max_steps: Annotated[str | None, _option(OPTIMIZATION, "--max-steps", "N", "Optimizer steps at most.")] = None
    batch_size: Annotated[str, _option(OPTIMIZATION, "--batch-size", "N", "Rows of an optimizer step.")] = "32"
    gradient_accumulation_steps: Annotated[
        str,
        _option(
            OPTIMIZATION,
            "--gradient-accumulation-steps",
            "N",
            "Compute a batch in N pieces, which need less memory; its gradients are the same.",
        ),
    ] = "1"
    learning_rate: Annotated[
        str, _option(OPTIMIZATION, "--learning-rate", "RATE", "The highest learning rate.")
    ] = "5e-5"
    head_lr_multiplier: Annotated[
        str, _option(OPTIMIZATION, "--head-lr-multiplier", "X", "New weights learn so much faster.")
    ] = "10"
    optimizer: Annotated[str, _option(OPTIMIZATION, "--optimizer", "NAME", "adamw, adam or sgd.")] = "adamw"
    weight_decay: Annotated[
        str,
        _option(OPTIMIZATION, "--weight-decay", "X", "Not of norms, biases, embeddings and logit scales."),
    ] = "0.01"
    schedule: Annotated[
        str, _option(OPTIMIZATION, "--schedule", "NAME", "How the rate falls: cosine, linear or constant.")
    ] = "cosine"
    warmup: Annotated[
        str, _option(OPTIMIZATION, "--warmup", "SHARE", "Share of all steps in which the rate rises.")
    ] = "0.1"
    max_grad_norm: Annotated[
        str, _option(OPTIMIZATION, "--max-grad-norm", "X", "Gradients are scaled down to this norm; 0: never.")
    ] = "1"
    lora_rank: Annotated[
        str | None,
        _option(OPTIMIZATION, "--lora-rank", "N", "Learn differences of this rank alone (LoRA, by peft)."),
    ] = None
    lora_save: Annotated[
        str,
        _option(
            OPTIMIZATION,
            "--lora-save",
            "FORM",
            "merged: into a model of its own; adapter: the differences alone, which need their base.",
        ),
    ] = "merged"
    lora_alpha: Annotated[
        str | None, _option(OPTIMIZATION, "--lora-alpha", "X", "Scale of the differences, over N [2 N].")
    ] = None
    label_smoothing: Annotated[
        str, _option(OPTIMIZATION, "--label-smoothing", "SHARE", "Share of the target spread over all classes.")
    ] = "0"
    precision: Annotated[
        str, _option(OPTIMIZATION, "--precision", "NAME", "Of activations: fp32, bf16, or fp16 on a GPU.")
    ] = "fp32"
    gradient_checkpointing: Annotated[
        bool, _option(OPTIMIZATION, "--gradient-checkpointing", None, "Less memory, a third more time.")
    ] = False
    ema: Annotated[
        str | None,
        _option(OPTIMIZATION, "--ema", "DECAY", "Measure and save a moving average of the weights, e.g. 0.999."),
    ] = None
    modality_dropout: Annotated[
        str,
        _option(
            OPTIMIZATION,
            "--modality-dropout",
            "SHARE",
            "With --encoder: leave out so many of a row's media at random; one stays.",
        ),
    ] = "0"
    unimodal_loss: Annotated[
        str,
        _option(
            OPTIMIZATION,
            "--unimodal-loss",
            "WEIGHT",
            "With --encoder: add the losses of a head on each modality alone, so that all are learned; e.g. 0.5.",
        ),
    ] = "0"
    auxiliary_loss: Annotated[
        str,
        _option(
            OPTIMIZATION, "--auxiliary-loss", "WEIGHT", "With --auxiliary-column: weight of the sum of its losses."
        ),
    ] = "0.3"
    wise_ft: Annotated[
        str | None,
        _option(
            OPTIMIZATION,
            "--wise-ft",
            "SHARE",
            "Measure and save weights so far from the base's (0) to the learned ones (1): robust elsewhere.",
        ),
    ] = None
    average_best: Annotated[
        str | None,
        _option(
            OPTIMIZATION,
            "--average-best",
            "N",
            "At the end, average the weights of the N best evaluations; that is the best, if it is better.",
        ),
    ] = None
    early_stopping: Annotated[
        str | None,
        _option(OPTIMIZATION, "--early-stopping", "N", "Stop after N evaluations without a better metric."),
    ] = None
    eval_steps: Annotated[
        str | None, _option(OPTIMIZATION, "--eval-steps", "N", "Evaluate every N steps [after each epoch].")
    ] = None
    metric: Annotated[
        str | None, _option(OPTIMIZATION, "--metric", "NAME", "What the best is chosen by [accuracy].")
    ] = None


@dataclass(frozen=True)
class TrainingRunArguments:
    """Where a training run is kept, and how it runs; none of these changes a weight (but the seed)."""

    output: Annotated[
        str | None, _option(OUTPUT, "-o --output", "RUN", "A folder; RUN/best is the model. Required.")
    ] = None
    overwrite: Annotated[bool, _option(OUTPUT, "--overwrite", None, "Begin anew, without what is there.")] = False
    num_workers: Annotated[
        str, _option(RUN, "--num-workers", "N", "Processes that read rows; 0: none beside this one.")
    ] = "auto"
    timeout: Annotated[
        str, _option(RUN, "--timeout", "TIME", "A row that takes longer to read, in the preflight, cannot be read.")
    ] = "120s"
    time_limit: Annotated[
        str | None,
        _option(RUN, "--time-limit", "TIME", "Stop after 90s, 30m or 8h; the same command goes on; exit 75."),
    ] = None
    checkpoint_time: Annotated[
        str,
        _option(RUN, "--checkpoint-time", "TIME", "Time between checkpoints; there is one after each evaluation."),
    ] = "10m"
    seed: Annotated[str, _option(RUN, "--seed", "N", "Seed of whatever is random.")] = "0"


def _read_config(context: typer.Context, value: Path | None) -> Path | None:
    if value is not None:
        from mmcli.cli.config import load_config

        context.default_map = load_config(value, context)
    return value


ConfigOption = Annotated[
    Path | None,
    _option(
        MESSAGES,
        "--config",
        "FILE.toml",
        "Read options from a TOML file; the command line wins.",
        is_eager=True,
        callback=_read_config,
    ),
]


@dataclass(frozen=True)
class MessageArguments:
    """What is said on stderr."""

    quiet: Annotated[bool, _option(MESSAGES, "--quiet", None, "Errors only.")] = False
    json: Annotated[bool, _option(MESSAGES, "--json", None, "End with one JSON line on stderr.")] = False
    log_file: Annotated[
        Path | None, _option(MESSAGES, "--log-file", "FILE", "Append the messages to FILE too.")
    ] = None
    debug: Annotated[bool, _option(MESSAGES, "--debug", None, "Show tracebacks, and what libraries say.")] = False
    config: ConfigOption = None


def with_options(function: Callable[..., int]) -> Callable[..., int]:
    """Give typer a flat signature: the options of every parameter that is annotated with a group above."""
    groups = {n: t for n, t in get_type_hints(function).items() if n != "return"}
    parameters = [p for group in groups.values() for p in _parameters(group)]
    # Parameters with a default come last in a Python signature.
    parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)

    @functools.wraps(function)
    def command(**values: Any) -> int:
        made = {name: group(**{f.name: values[f.name] for f in fields(group)}) for name, group in groups.items()}
        return function(**made)

    command.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameters(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(group)
    ]
