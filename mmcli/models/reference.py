"""docs/models.md, from the tables of the families: `python -m mmcli.models.reference > docs/models.md`."""

from __future__ import annotations

import sys

from mmcli.models.dual_encoder import BY_ARCHITECTURE, DUAL_ENCODERS, DualEncoder
from mmcli.models.encoder import ENCODERS
from mmcli.models.sentence import MODULES

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
    return _HEAD + _DUAL + "\n".join(duals) + "\n" + _ENCODER + "\n".join(encoders) + "\n" + sentence


_ORDER = {"text": 0, "image": 1, "audio": 2, "video": 3}


def _takes(modalities: tuple[str, ...]) -> str:
    return ", ".join((*modalities, "video") if "image" in modalities else modalities)


if __name__ == "__main__":
    sys.stdout.write(reference())
