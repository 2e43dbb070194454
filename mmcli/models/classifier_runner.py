"""A loaded model with a classification head: batches -> the labels of each input."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from mmcli.core.classified import ClassifiedRows
from mmcli.core.errors import ModelError
from mmcli.core.records import Modality
from mmcli.models.classifier import ClassifierHead
from mmcli.models.concurrent import concurrent
from mmcli.models.encoder import CHANNELS_LAST, TRAINING_ONLY
from mmcli.models.entailment import Pairs
from mmcli.models.pending import PendingVectors
from mmcli.models.plan import ClassificationPlan
from mmcli.models.runner import Batch, TorchRunner, Tower, load_model
from mmcli.models.scores import PendingClassified, classify


class _HeadRunner(TorchRunner):
    """What the runners of this family share; the loader gives towers whose vectors are logits [n, L]."""

    def __init__(self, plan: ClassificationPlan) -> None:
        super().__init__(plan)
        self._plan = plan
        self._towers: dict[Modality, Tower] = self.loaded
        if plan.compile:
            self._towers = {m: torch.compile(tower) for m, tower in self._towers.items()}

    def concurrent(self, most: int) -> Any:
        """See mmcli.core.protocols.Runner."""
        return concurrent(self, self._plan, most)

    def logits(self, batch: Batch, width: int) -> torch.Tensor:
        """Batch -> float32 [n, width]. Raises torch.OutOfMemoryError, ModelError for another width."""
        # VideoPrism's have an axis of one between.
        logits = self._towers[batch.modality](self.to_device(batch)).flatten(1)
        if logits.shape[1] != width:
            raise ModelError(
                f"the model gave scores of shape {tuple(logits.shape)}; config.json has {width} labels"
            )
        return logits.float()


class ClassifierRunner(_HeadRunner):
    """See mmcli.core.protocols.Runner: inputs -> Classified."""

    @torch.inference_mode()
    def forward(self, batch: Batch) -> ClassifiedRows | PendingClassified:
        """One output for each input of the batch. Raises as `logits`."""
        plan = self._plan
        return classify(self.logits(batch, len(plan.labels)), plan.activation, plan.labels, plan.ranking)


class PairRunner(_HeadRunner):
    """Of texts beside hypotheses (mmcli.models.entailment) -> their logits of contradiction and entailment."""

    @torch.inference_mode()
    def forward(self, batch: Batch) -> np.ndarray | PendingVectors:
        """Batch -> float32 [n, 2]. Raises as `logits`."""
        pairs: Pairs = self._plan.detail
        logits = self.logits(batch, self._plan.checkpoint.config.num_labels)
        chosen = logits[:, [pairs.contradiction, pairs.entailment]]
        return PendingVectors(chosen) if self.device.type == "cuda" else chosen.numpy()


def load(plan: ClassificationPlan, device: torch.device) -> dict[Modality, Tower]:
    """The tower of a loaded model, which gives logits [n, L]. Raises ModelError when its head lacks weights."""
    return {plan.detail.modality: _load_tower(plan, plan.detail, device)}


def load_pairs(plan: ClassificationPlan, device: torch.device) -> dict[Modality, Tower]:
    """As `load`, of a model that reads texts beside hypotheses."""
    return {"text": _load_tower(plan, plan.detail.head, device)}


def _load_tower(plan: ClassificationPlan, row: ClassifierHead, device: torch.device) -> Tower:
    import transformers

    known = getattr(transformers, row.architecture or "", None)
    beginning = f"{known.base_model_prefix}." if known is not None else ""
    unused = [beginning + name for name in TRAINING_ONLY]
    model = load_model(getattr(transformers, row.auto_class), plan, device, unused, makes="scores")
    if plan.checkpoint.config.model_type in CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)
    return head_tower(model, row.modality)


def head_tower(model: Any, modality: Modality) -> Tower:
    """What gives a loaded model's logits."""
    tower = _logits_of(model)
    return _text_tower(model, _with_sparse_attention(model, tower)) if modality == "text" else tower


def _logits_of(model: Any) -> Tower:
    accepted = set(inspect.signature(model.forward).parameters)
    # V-JEPA 2 predicts hidden patches, and decoders keep a cache, which nothing here reads.
    options = {name: value for name, value in (("use_cache", False), ("skip_predictor", True)) if name in accepted}

    def tower(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        given = {name: tensor for name, tensor in inputs.items() if name in accepted}
        output = model(**given, **options)
        # PP-LCNet has another name for them.
        logits: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
        return logits

    return tower


def _text_tower(model: Any, tower: Tower) -> Tower:
    """Heads of decoders read a text's last token, which they find by the padding token of config.json.

    So that is what texts are padded with, whatever the tokenizer's is. Where it has none, they take no batch
    (transformers raises for it): then texts are read one by one.
    """
    pad: int | None = getattr(model.config.get_text_config(), "pad_token_id", None)
    if pad is None or pad < 0:
        return _one_by_one(tower)

    def padded(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        behind = inputs["attention_mask"] == 0
        return tower(inputs | {"input_ids": inputs["input_ids"].masked_fill(behind, pad)})

    return padded


def _with_sparse_attention(model: Any, tower: Tower) -> Tower:
    """BigBird reads a short text with full attention, and then all others, too: its own is put back each time."""
    encoder = next((part for part in model.modules() if hasattr(part, "set_attention_type")), None)
    if encoder is None:
        return tower
    own = encoder.attention_type

    def restored(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        encoder.set_attention_type(own)
        return tower(inputs)

    return restored


def _one_by_one(tower: Tower) -> Tower:
    def each(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        texts = ({n: t[row : row + 1, :length] for n, t in inputs.items()} for row, length in enumerate(lengths))
        return torch.cat([tower(text) for text in texts])

    return each
