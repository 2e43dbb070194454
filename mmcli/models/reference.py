"""docs/models.md, from the tables of the families: `python -m mmcli.models.reference > docs/models.md`."""

from __future__ import annotations

import sys

from mmcli.models.captioner import CAPTIONERS
from mmcli.models.chat import CHATS
from mmcli.models.classifier import AUTO, MORE_INPUTS
from mmcli.models.dual_encoder import BY_ARCHITECTURE, DUAL_ENCODERS, DualEncoder
from mmcli.models.encoder import ENCODERS
from mmcli.models.entailment import TEMPLATES as HYPOTHESES
from mmcli.models.few_shot import PROBE_FROM
from mmcli.models.fusion_inputs import TOWERS
from mmcli.models.sentence import MODULES
from mmcli.models.speech import SPEECH
from mmcli.models.vqa import CLASSIFIERS
from mmcli.models.zero_shot import AUDIO_TEMPLATE, IMAGE_TEMPLATE

_HEAD = """\
# Models

Made by `python -m mmcli.models.reference > docs/models.md`; a test checks that it is current.

A checkpoint is a directory as `save_pretrained` writes it, or the id of one on the Hugging Face hub. How it is
called is decided by its `modules.json` (sentence-transformers), else by `model_type` in `config.json`. Another
type is an error that lists these, unless its model offers `get_text_features` and one more of the kind and has
a `projection_dim`: then it is called as a dual encoder. Weights that a checkpoint lacks are an error.
"""
_DUAL = """
## Dual encoders

Text and pictures, sounds or clips in one space. Vectors have unit length; `--no-normalize` leaves them as the
model gives them. Types that take images take video too: `--frames` frames, uniform in time, and the mean of
their vectors. `--pooling` is not for them. A modality whose tokenizer or `preprocessor_config.json` is not
there is left out.

`mmcli finetune --objective contrastive --encoder image=... --encoder text=...` joins any two of the types under
*Encoders*, or one side of a {towers}, of two modalities, into a new one. Of text and pictures it is a
`vision-text-dual-encoder`, as transformers has it, where both encoders have a pooler; else (other modalities, other
poolings, `--loss siglip`) a model of our own, whose directory has a folder for each encoder with its processor.

| model_type | takes |
| --- | --- |
"""
_ENCODER = """
## Encoders

One modality; `--pooling` chooses how its tokens become one vector, the first named is the model's own. Vectors
come as the model gives them; `--normalize` makes their length one. `pooler` is the model's own `pooler_output`;
`mean` and `max` leave out padding and the tokens before those of patches. Why each type's own is what it is
stands in `mmcli/models/encoder.py`. Image encoders take video too, as above; video encoders take the number of
frames that their configuration says.

| model_type | takes | `--pooling` |
| --- | --- | --- |
"""
_SENTENCE = """
## sentence-transformers directories

Exactly as that library: the modules of `modules.json`, one after the other, with their pooling, default
prompt and normalisation. Known modules: {modules}.
A directory with another module is refused by its name.
"""
_WRITERS = """
## Models that write

For `mmcli caption` and `mmcli ask`. Which one a checkpoint is follows from its `model_type` and the class that it
was saved as. A model of several pictures sees a clip as `--frames` of them; one of clips gets the same frames as a
clip, with their times. Other types that transformers knows as image-text-to-text, and causal language models, are
talked to by their chat template: how the arrays of their processor are batched is found out by trying two records
alone and together, and what cannot be settled so is an error.

| family | model_type | saved as | caption | ask | takes |
| --- | --- | --- | --- | --- | --- |
"""

_CLASSIFY = """
## Models that classify

For `mmcli classify`. Whose labels they are:

| checkpoint | labels | `--multi-label` | `--examples` |
| --- | --- | --- | --- |
| a dual encoder | `--labels`, as texts | SigLIP | mean, probe, tip-adapter |
| an encoder, a sentence-transformers directory | those of `--examples` |  | mean, probe |
| with a classification head | its own | yes | mean, probe, on its body's vectors where it is an encoder |
| of entailment (NLI), for texts | `--labels`; without them its own | yes |  |
| that answers questions: chat models, BLIP-VQA, a server | `--labels`, as choices |  |  |
| a folder of `--save-head`, or of `mmcli finetune --objective probe` | its own |  |  |
| a fusion of several encoders, from `mmcli finetune` | its own | yes |  |

**Labels as texts.** A label is put into `--template` (`{image}` where nothing is said; `{audio}` for models of
sound). Of several texts and templates the unit vectors are averaged, and the mean has unit length again. Scores
are those of the checkpoint's own code: the softmax of its scaled cosines; SigLIP's sigmoid, each label alone.
Labels that a tokenizer cannot tell apart are an error. X-CLIP's labels have other vectors beside each clip: it
takes clips, not their vectors, and `--save-labels`, `--save-head` and tip-adapter are not for it.

**Solved examples.** `mean`: the cosine to each label's mean vector. `probe`: logistic regression on
standardised vectors, its penalty chosen on parts of the examples that are left out. `auto` is a probe where
every label has {least} examples or more, else mean. `tip-adapter` (Zhang et al. 2022, training-free) adds the
examples, as a cache, to the zero-shot scores of a dual encoder.

**Heads.** What transformers loads by {classes}: for pictures, sounds, clips and texts. Scores are the softmax
of the logits; the sigmoid where the checkpoint was trained so (`problem_type`) and with `--multi-label`. Labels
are those of `id2label`; equal names get their number behind them (ImageNet's two cranes: `crane (134)`, `crane
(517)`). Not taken, since they need more than a medium: {refused}.

**Entailment.** A text is read beside `{hypothesis}` for each label (`--template` for another); scores are the
softmax of the labels' entailment logits, with `--multi-label` of entailment against contradiction for each
label. A checkpoint is of this kind when one of its labels begins with `entail`.

**Choices.** A model that answers is asked "Which of these is it: ...?" (`--question` for another, with
`{{labels}}` in it); a score is the probability of a label among the labels. Of a server it is null.

**Fusion.** Encoders of text, image, audio and video in any combination, whose tokens one transformer reads
together. Each is of one of the types under *Encoders*, or one side of a {towers}; a directory holds
`config.json` and `model.safetensors` of the whole, and a folder for each encoder (`text/`, `image/`, ...) with its
processor or tokenizer. Rows have a column for each medium (`--image-column`, `--text-column`, ...), and may lack
some of them: an empty cell is no error, as long as the row has one other. `modality` in the output says what each
row had.
"""


def reference() -> str:
    """The whole page, Markdown."""
    rows: dict[str, DualEncoder] = {
        **DUAL_ENCODERS,
        **{f"blip ({name})": row for name, row in BY_ARCHITECTURE.items()},
    }
    duals = [f"| {kind} | {_takes(row.modalities)} |" for kind, row in sorted(rows.items())]
    kinds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for kind, encoder in ENCODERS.items():
        kinds.setdefault((encoder.modality, encoder.poolings), []).append(kind)
    encoders = [
        f"| {', '.join(sorted(names))} | {_takes((modality,))} | {', '.join(poolings)} |"
        for (modality, poolings), names in sorted(kinds.items(), key=lambda item: (_ORDER[item[0][0]], item[1]))
    ]
    sentence = _SENTENCE.format(modules=", ".join(MODULES))
    classify = _CLASSIFY.format(
        image=IMAGE_TEMPLATE,
        audio=AUDIO_TEMPLATE,
        least=PROBE_FROM,
        classes=", ".join(f"`{name}`" for name, _, _ in AUTO),
        refused=", ".join(sorted(MORE_INPUTS)),
        hypothesis=HYPOTHESES[0],
        towers=" or ".join(sorted(TOWERS)),
    )
    dual = _DUAL.format(towers=" or ".join(sorted(TOWERS)))
    pages = (dual, duals), (_ENCODER, encoders), (_WRITERS, _writers())
    return _HEAD + "".join(head + "\n".join(lines) + "\n" for head, lines in pages) + sentence + classify


def _writers() -> list[str]:
    """A line for each class of each family that writes."""
    takes: dict[tuple[str, str, str], str] = {}
    tasks: dict[tuple[str, str, str], list[str]] = {}

    def add(family: str, kind: str, saved: str, task: str, taken: str) -> None:
        takes[family, kind, saved] = taken
        tasks.setdefault((family, kind, saved), []).append(task)

    for task, captioners in CAPTIONERS.items():
        for kind, captioner in captioners.items():
            add("captioner", kind, captioner.model_class, task, "image")
    for kind, classifier in CLASSIFIERS.items():
        regions = classifier.regions
        seen = "image" if regions is None else "features of regions" + (" and boxes" if regions.boxes else "")
        add("VQA", kind, classifier.model_class, "ask", seen)
    for kind, chat in CHATS.items():
        for task in ("caption", "ask"):
            add("chat", kind, chat.model_class, task, ", ".join(chat.modalities))
    for kind, speech in SPEECH.items():
        add("speech", kind, speech.model_class, "caption", "audio")
    return [
        f"| {' | '.join(key)} | {' | '.join('yes' if task in tasks[key] else '' for task in ('caption', 'ask'))} "
        f"| {taken} |"
        for key, taken in takes.items()
    ]


_ORDER = {"text": 0, "image": 1, "audio": 2, "video": 3}


def _takes(modalities: tuple[str, ...]) -> str:
    return ", ".join((*modalities, "video") if "image" in modalities else modalities)


if __name__ == "__main__":
    sys.stdout.write(reference())
