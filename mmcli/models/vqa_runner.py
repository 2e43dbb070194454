"""A loaded model that chooses answers: samples -> padded batch -> the likeliest answers and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mmcli.core.records import Scored
from mmcli.models.plan import GenerationPlan
from mmcli.models.runner import Batch, TorchRunner, load_model
from mmcli.models.vqa import Answering

# Answers in `top_k`: as many as transformers' visual-question-answering pipeline gave.
TOP_K = 5


class AnswerRunner(TorchRunner):
    """See mmcli.core.protocols.Runner: batches -> the likeliest answers.

    Among choices, an answer's score is how likely it is given that one of them is right: the softmax of their
    logits, whichever way the model was trained (odds of independent answers are exp(logit)).
    """

    def __init__(self, plan: GenerationPlan) -> None:
        super().__init__(plan)
        answering: Answering = plan.detail
        self._answers = [answering.answers[index] for index in answering.allowed]
        self._allowed = list(answering.allowed) if plan.generation.choices else None
        self._sigmoid = answering.row.scores == "sigmoid" and self._allowed is None

    @torch.inference_mode()
    def forward(self, batch: Batch) -> list[Scored]:
        """The likeliest answers of each sample. Raises torch.OutOfMemoryError."""
        logits = self.loaded(self.to_device(batch)).float()
        if self._allowed is not None:
            logits = logits[:, self._allowed]
        scores = logits.sigmoid() if self._sigmoid else logits.softmax(dim=-1)
        broken = ~logits.isfinite().all(dim=-1, keepdim=True)
        best = scores.masked_fill(broken, torch.nan).topk(min(TOP_K, scores.shape[1]), dim=-1)
        return [
            self._scored(indices, values)
            for indices, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def _scored(self, indices: Sequence[int], scores: Sequence[float]) -> Scored:
        ranked = tuple((self._answers[index], score) for index, score in zip(indices, scores, strict=True))
        return Scored(*ranked[0], ranked)


def load(plan: GenerationPlan, device: torch.device) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Model inputs by name -> logits [n, answers]."""
    import transformers

    answering: Answering = plan.detail
    model = load_model(getattr(transformers, answering.row.model_class), plan, device, makes="answers")
    if answering.row.regions is None:
        return lambda inputs: _vilt(model, inputs)
    # Its name in the outputs: LXMERT's is another than all others'.
    return lambda inputs: next(v for k, v in model(**inputs).items() if k in ("logits", "question_answering_score"))


def _vilt(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, of pictures of one shape.

    The model itself draws the order of the patches, and which of them it leaves out above max_image_length (a means
    of its pretraining), row by row: two runs of ViLT-B/32 differ by 3e-7. Each patch brings its place with it, so
    that their order does not matter: here all of them come as they are, and a row is the same in every run.
    """
    embeddings = model.vilt.embeddings
    patches = embeddings.patch_embeddings(inputs["pixel_values"])
    count, size, *shape = patches.shape
    first, places = embeddings.position_embeddings.split([1, embeddings.position_embeddings.shape[1] - 1], dim=1)
    side = model.config.image_size // model.config.patch_size
    places = places.transpose(1, 2).reshape(1, size, side, side)
    places = torch.nn.functional.interpolate(places, size=shape, mode="bilinear", align_corners=True)
    seen = (patches + places).flatten(2).transpose(1, 2)
    seen = torch.cat([(embeddings.cls_token + first).expand(count, -1, -1), seen], dim=1)
    text = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
    mask = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
    logits: torch.Tensor = model(**text, image_embeds=seen, pixel_mask=mask).logits
    return logits
