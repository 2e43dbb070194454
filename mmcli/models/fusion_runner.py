"""A loaded MultimodalTransformer on a device: batches -> the labels of each record."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from mmcli.core.classified import ClassifiedRows
from mmcli.core.errors import ModelError
from mmcli.core.records import Modality, Sample
from mmcli.models.fusion import MultimodalTransformer, register
from mmcli.models.fusion_inputs import FusionProcessor, Part
from mmcli.models.inputs import PIXELS, Normalize, open_normalization, open_tokenizer
from mmcli.models.plan import CheckpointPlan, ClassificationPlan
from mmcli.models.runner import Batch, Collator, TorchRunner, load_model, stack
from mmcli.models.scores import PendingClassified, classify


class FusionCollator(Collator):
    """Samples of a FusionProcessor -> batches of a MultimodalTransformer, without the model.

    whole  batches have inputs of every encoder, also where no row has its modality: for training, where each
           encoder has to run (see mmcli.models.fusion)
    """

    def __init__(self, plan: CheckpointPlan, device: torch.device, whole: bool = False) -> None:
        self.device = device
        self._dtype: torch.dtype = getattr(torch, plan.dtype)
        self._moved_s, self._moving = 0.0, deque()
        parts: tuple[Part, ...] = plan.detail
        self._pads: dict[str, int] = {}
        self._normalize_named: dict[str, Normalize] = {}
        for part in parts:
            if part.modality == "text":
                tokenizer = open_tokenizer(part.checkpoint)
                self._pads = {
                    "text.input_ids": tokenizer.pad_token_id or 0,
                    "text.token_type_ids": tokenizer.pad_token_type_id,
                }
            elif part.modality in ("image", "video"):
                found = open_normalization(part.checkpoint, part.inputs, part.modality)
                if found is not None:
                    self._normalize_named |= {f"{part.modality}.{name}": found for name in PIXELS}
        self._blanks: list[dict[str, np.ndarray]] = []
        if whole:
            # Which sets it to 1, as decode workers want it.
            threads = torch.get_num_threads()
            processor = FusionProcessor(parts)
            torch.set_num_threads(threads)
            self._blanks = [processor.blank(part) for part in parts]

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Samples of equal group, of any modalities -> a Batch, whose tensors are named as the Samples' arrays.

        `present`: bool [n, M]; a row without a modality has zeros there. Sequences are padded behind.
        Raises ModelError for pictures or clips of different shapes: those are of different groups.
        """
        if len({sample.group for sample in samples}) > 1:
            raise ModelError("internal error: pictures of different shapes in a batch")
        rows = [sample.arrays for sample in samples]
        tensors = {"present": torch.from_numpy(np.stack([arrays["present"] for arrays in rows]))}
        names = dict.fromkeys(name for arrays in rows for name in arrays if name != "present")
        for name in names:
            tensors[name] = self._stacked(name, [arrays.get(name) for arrays in rows])
        for blank in self._blanks:
            if not any(name in names for name in blank):
                for name, array in blank.items():
                    tensors[name] = self._stacked(name, [array, *[None] * (len(rows) - 1)])
        return Batch(samples[0].modality, tensors)

    def _stacked(self, name: str, arrays: Sequence[np.ndarray | None]) -> torch.Tensor:
        known = next(array for array in arrays if array is not None)
        nothing = np.empty((0,) * known.ndim, known.dtype)
        filled = [nothing if array is None else array for array in arrays]
        return stack(filled, self._pads.get(name, 0), self.device.type == "cuda")

    def _to_device(self, modality: Modality, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "present":
            # The model looks at it: on a device that would have to be waited for.
            return tensor
        moved = tensor.to(self.device, non_blocking=True)
        if moved.dtype == torch.uint8 and name in self._normalize_named:
            moved = self._normalize_named[name](moved)
        return moved.to(self._dtype) if moved.is_floating_point() else moved


class FusionRunner(TorchRunner, FusionCollator):
    """See mmcli.core.protocols.Runner: records -> Classified."""

    def __init__(self, plan: ClassificationPlan) -> None:
        super().__init__(plan)
        self._plan = plan
        model: MultimodalTransformer = self.loaded
        self._model = torch.compile(model) if plan.compile else model

    @torch.inference_mode()
    def forward(self, batch: Batch) -> ClassifiedRows | PendingClassified:
        """One output for each record of the batch. Raises torch.OutOfMemoryError."""
        plan = self._plan
        inputs = self.to_device(batch)
        present = inputs.pop("present")
        logits: torch.Tensor = self._model(inputs, present).logits
        return classify(logits, plan.activation, plan.labels, plan.ranking)


def load(plan: ClassificationPlan, device: torch.device) -> MultimodalTransformer:
    """The model, ready for inference. Raises ModelError."""
    register()
    model: MultimodalTransformer = load_model(MultimodalTransformer, plan, device, makes="scores")
    return model
