"""The objective *contrastive*: two modalities in one space, where rows belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from mmcli.core.errors import ConfigError, MmcliError, ModelError, one_line
from mmcli.core.records import Media, Modality, Sample
from mmcli.models.checkpoint import open_checkpoint
from mmcli.models.dual_encoder import DualEncoder, clip_features, model_class_of, texts_beside, towers_of
from mmcli.models.fusion_family import copy_encoder_files
from mmcli.models.options import ModelOptions
from mmcli.models.plan import EmbeddingPlan
from mmcli.models.runner import Batch, Collator, Loaded, load_model
from mmcli.training.classify import copy_processor
from mmcli.training.contrastive_loss import (
    GradCache,
    clamp_logit_scale,
    clap_loss,
    clip_loss,
    freeze_batch_norm,
    gather_with_grad,
    processes,
    siglip_loss,
    unfreeze_logit_parameters,
    xclip_loss,
)
from mmcli.training.data import Item, in_pieces
from mmcli.training.objective import Backward

# (vectors of both sides, unit or not, [n, D] each; group of each row) -> metrics by name
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, float]]
# (scores of each row's clip with each row's text [n, n], group of each row) -> metrics by name
MeasureScores = Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclass(slots=True)
class Side:
    """One modality of a piece: batches, and which rows of the piece they are."""

    modality: Modality
    parts: list[tuple[Batch, torch.Tensor]]


@dataclass(slots=True)
class Piece:
    """Rows, of both sides.

    groups     int64 [n], the same for rows that belong together
    auxiliary  int64 [n, columns]: the auxiliary labels
    """

    a: Side
    b: Side
    groups: torch.Tensor
    auxiliary: torch.Tensor


@dataclass(slots=True)
class Measured:
    """Of a piece: float32 vectors [n, D] of both sides, the rows' groups, and the sum of their losses.

    clips  of a model whose texts heed the clip beside them, [n, 1 + T, D]: 100 KB a clip of ViT-B/32
    """

    a: torch.Tensor
    b: torch.Tensor
    groups: torch.Tensor
    loss: float
    clips: torch.Tensor | None = None


def joined(found: Sequence[list[Measured]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Of all batches: vectors of both sides, float32 [N, D], the rows' groups, and the mean loss of batches."""
    pieces = [piece for batch in found for piece in batch]
    a, b = torch.cat([piece.a for piece in pieces]), torch.cat([piece.b for piece in pieces])
    groups = torch.cat([piece.groups for piece in pieces])
    return a.numpy(), b.numpy(), groups.numpy(), sum(piece.loss for piece in pieces) / len(groups)


class Network(Protocol):
    """What vectors are made by.

    plan  what decodes and processes rows, and which loss there is: its detail is a DualEncoder
    """

    @property
    def plan(self) -> EmbeddingPlan: ...

    def build(self, device: torch.device) -> tuple[Any, frozenset[str]]:
        """The model, which `towers_of` knows, and the names of its new parameters. Raises ModelError."""
        ...

    def save(self, model: Any, folder: Path) -> None:
        """Write what `-m folder` loads."""
        ...

    def of(self, folder: Path) -> Network:
        """That of the model that `save` wrote into a folder."""
        ...


@dataclass(slots=True)
class CheckpointNetwork:
    """See Network; a dual encoder as it is. `from_config`: with random weights."""

    plan: EmbeddingPlan
    from_config: bool = False

    def build(self, device: torch.device) -> tuple[Any, frozenset[str]]:
        """Nothing in it is new."""
        from transformers import AutoConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        plan, checkpoint = self.plan, self.plan.checkpoint
        made = model_class_of(plan.detail)
        try:
            if self.from_config:
                config = AutoConfig.from_pretrained(checkpoint.directory)
                maker = getattr(made, "from_config", None) or made._from_config
                model = maker(config, attn_implementation=plan.attn_implementation)
            else:
                model = load_model(made, replace(plan, learns=True), device)
        except MmcliError:
            raise
        except Exception as error:
            raise ModelError(f"-m {checkpoint.id}: cannot load it: {one_line(str(error))}") from error
        return model.to(device), frozenset()

    def save(self, model: Any, folder: Path) -> None:
        """As save_pretrained does, with the base's processor files beside it."""
        model.save_pretrained(folder)
        copy_processor(self.plan.checkpoint, folder)
        copy_encoder_files({part.modality: part.checkpoint for part in self.plan.parts}, folder)

    def of(self, folder: Path) -> CheckpointNetwork:
        """See Network."""
        known = self.plan.checkpoint
        options = ModelOptions(
            str(folder), trust_remote_code=known.trust_remote_code, allow_pickle=known.allow_pickle
        )
        return CheckpointNetwork(replace(self.plan, checkpoint=open_checkpoint(options)))


@dataclass(slots=True)
class Contrastive:
    """See mmcli.training.objective.Objective.

    The loss is the model's own: CLIP's, CLAP's with a scale for each way, SigLIP's of pairs, X-CLIP's of texts
    beside each clip; exact in pieces by GradCache. `measure` gives the metrics of validation vectors, those that
    `mmcli embed` gives; `measure_scores` of X-CLIP's cosines, texts beside clips, as `mmcli classify` has them.
    """

    network: Network
    slots: tuple[Modality, Modality]
    measure: Measure
    measure_scores: MeasureScores | None = None
    name: str = "contrastive"
    metric: str = "r_at_1"
    joint: bool = True
    _new: frozenset[str] = field(default=frozenset(), init=False)
    _host: Collator | None = field(default=None, init=False)
    _device: Collator | None = field(default=None, init=False)
    _towers: Loaded | None = field(default=None, init=False)
    _model: Any = field(default=None, init=False)

    @property
    def plan(self) -> EmbeddingPlan:
        """The network's."""
        return self.network.plan

    def build(self, device: torch.device) -> nn.Module:
        """The network's model. Raises ModelError."""
        model, self._new = self.network.build(device)
        self._model = model
        self._device = Collator(self.plan, device)
        self._towers = towers_of(model, self.plan)
        return model  # type: ignore[no-any-return]

    def of(self, folder: Path) -> Contrastive:
        """The same objective of the model that `save` wrote into a folder."""
        return replace(self, network=self.network.of(folder))

    def new_weights(self) -> frozenset[str]:
        """The projections of encoders that are joined."""
        return self._new

    def adapted(self, model: nn.Module) -> None:
        """The temperature learns whatever is frozen: else adapters would be compared at the old one."""
        unfreeze_logit_parameters(model)

    def collate(self, items: Sequence[Item], pieces: int) -> list[Piece]:
        """Rows in pieces of about equal size."""
        return [self._piece(part) for part in in_pieces(items, pieces)]

    def _piece(self, items: Sequence[Item]) -> Piece:
        sides = [self._side([item.samples[index] for item in items], index) for index in range(2)]
        groups = torch.tensor([item.target for item in items])
        return Piece(sides[0], sides[1], groups, torch.tensor([item.auxiliary for item in items]))

    def auxiliary(self, piece: Piece) -> torch.Tensor:
        """The labels of a piece's rows, int64 [n, columns], as the encoder of what is seen or heard gets them."""
        side = piece.b if piece.a.modality == "text" else piece.a
        return piece.auxiliary[torch.cat([rows for _, rows in side.parts])]

    def _side(self, samples: Sequence[Sample], index: int) -> Side:
        if self._host is None:
            self._host = Collator(self.plan, torch.device("cpu"))
        groups: dict[Any, list[int]] = {}
        for row, sample in enumerate(samples):
            groups.setdefault((sample.modality, sample.group), []).append(row)
        parts = [
            (self._host.collate([samples[row] for row in rows]), torch.tensor(rows)) for rows in groups.values()
        ]
        return Side(samples[0].modality, parts)

    def count(self, pieces: Sequence[Piece]) -> int:
        """Rows."""
        return sum(len(piece.groups) for piece in pieces)

    def step(self, model: nn.Module, pieces: Sequence[Piece], total: float, backward: Backward) -> float:
        """Of the whole batch, whatever the pieces; `total` is in the loss already."""
        freeze_batch_norm(model)
        own = [piece.groups for piece in pieces] or [torch.zeros(0, dtype=torch.int64)]
        groups = gather_with_grad(torch.cat(own).to(self._place))

        def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self._loss(model, gather_with_grad(_exact(a)), gather_with_grad(_exact(b)), groups)

        if pieces:
            cache = GradCache(self._encode, self._encode, loss, backward)
            found = cache.step([piece.a for piece in pieces], [piece.b for piece in pieces])
        else:
            nothing = torch.zeros(0, device=self._place)
            found = loss(nothing, nothing)
            backward(found)
        return float(found) / processes()

    @property
    def _place(self) -> torch.device:
        assert self._device is not None
        return self._device.device

    def _encode(self, side: Side) -> torch.Tensor:
        """float [n, D], in the order of the piece's rows; of clips that texts heed [n, 1 + T, D]."""
        assert self._device is not None
        assert self._towers is not None
        tower = self._towers.towers[side.modality]
        if self._conditioned and side.modality == "video":
            tower = partial(clip_features, self._model)
        vectors = torch.cat([tower(self._device.to_device(batch)) for batch, _ in side.parts])
        rows = torch.cat([rows for _, rows in side.parts]).to(self._place)
        return vectors[rows.argsort()]

    def _loss(self, model: Any, a: torch.Tensor, b: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        row: DualEncoder = self.plan.detail
        if row.activation == "sigmoid":
            return siglip_loss(a, b, model.logit_scale.exp(), model.logit_bias, groups)
        if row.scale == "logit_scale_a":
            sounds, texts = (a, b) if self.slots[0] == "audio" else (b, a)
            return clap_loss(sounds, texts, model.logit_scale_a.exp(), model.logit_scale_t.exp(), groups)
        if row.conditioned:
            clips, texts = (a, b) if self.slots[0] == "video" else (b, a)
            beside = texts_beside(model, texts, clips)
            return xclip_loss(clips[:, 0], beside, model.logit_scale.exp(), groups)
        return clip_loss(a, b, self._scale(model), groups)

    @property
    def _conditioned(self) -> bool:
        row: DualEncoder = self.plan.detail
        return row.conditioned

    def _scale(self, model: Any) -> torch.Tensor | float:
        """What cosines are multiplied by. Of BLIP, whose class has no parameter for it, a constant."""
        row: DualEncoder = self.plan.detail
        if row.scale is None:
            assert self._towers is not None
            assert self._towers.similarity is not None
            return self._towers.similarity.scale
        learned: torch.Tensor = getattr(model, row.scale)
        return 1 / learned if row.scale == "temperature" else learned.exp()

    def after_step(self, model: nn.Module) -> None:
        """Logit scales stay at 100 at most."""
        clamp_logit_scale(model)

    def predict(self, model: nn.Module, pieces: Sequence[Piece]) -> list[Measured]:
        """Vectors, and the loss, of each piece."""
        found = []
        for piece in pieces:
            a, b = self._encode(piece.a).float(), self._encode(piece.b).float()
            loss = float(self._loss(model, a, b, piece.groups.to(self._place)))
            clips = next((side.cpu() for side in (a, b) if side.ndim == 3), None)
            a, b = (side[:, 0] if side.ndim == 3 else side for side in (a, b))
            found.append(Measured(a.cpu(), b.cpu(), piece.groups, loss * len(a), clips))
        return found

    def measured(self, found: Sequence[list[Measured]]) -> dict[str, float]:
        """What `measure` says of the vectors of all rows, and the mean loss of batches."""
        a, b, groups, loss = joined(found)
        scores = {**self.measure(a, b, groups), "loss": loss}
        if self._conditioned and self.measure_scores is not None:
            scores |= self.measure_scores(self._beside(found), groups)
        return scores

    @torch.inference_mode()
    def _beside(self, found: Sequence[list[Measured]]) -> np.ndarray:
        """Cosines of all clips with all texts, each beside the clip: float32 [N, N]."""
        pieces = [piece for batch in found for piece in batch]
        texts = torch.cat([piece.b if self.slots[0] == "video" else piece.a for piece in pieces]).to(self._place)
        cosines = []
        for one in (clip for piece in pieces if piece.clips is not None for clip in piece.clips):
            clip = one[None].to(self._place)
            beside = texts_beside(self._model, texts, clip)[0].float()
            cosines.append(nn.functional.cosine_similarity(clip[:, 0].float(), beside, dim=-1).cpu())
        return torch.stack(cosines).numpy()

    def vectors(self, model: nn.Module, batches: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Of all batches: see `joined`."""
        return joined([self.predict(model, pieces) for pieces in batches])

    def save(self, model: nn.Module, folder: Path) -> None:
        """What `-m folder` loads."""
        self.network.save(model, folder)


def _exact(vectors: torch.Tensor) -> torch.Tensor:
    """float32 at least, as the losses want them; so what a process without rows has is of the same type."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def check_base(plan: Any, slots: Sequence[Modality]) -> None:
    """Raise ConfigError unless a plan's model has a loss for these two modalities."""
    name = plan.checkpoint.id
    row = getattr(plan, "detail", None)
    if not isinstance(row, DualEncoder):
        raise ConfigError(
            f"-m {name}: it has no space for two modalities; take a dual encoder (CLIP, SigLIP, CLAP)"
        )
    if len(slots) != 2:
        raise ConfigError("--objective contrastive: name two columns that belong together, --image-column, ...")
    if missing := [slot for slot in slots if slot not in plan.modalities]:
        raise ConfigError(f"--{missing[0]}-column: -m {name} takes {', '.join(sorted(plan.modalities))}")


def group_rows(media: Sequence[tuple[Media, ...]]) -> list[int]:
    """A number for each row, the same for rows with an equal medium: captions of one picture, pictures of one text.

    Equal by file name, or by content where it is inline.
    """
    parents = list(range(len(media)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = parents[parents[row]]
            row = parents[row]
        return row

    seen: dict[Any, int] = {}
    for row, slots in enumerate(media):
        for slot, one in enumerate(slots):
            key = (slot, one.file if one.file is not None else one.text if one.text is not None else one.data)
            first = seen.setdefault(key, row)
            parents[root(row)] = root(first)
    return [root(row) for row in range(len(media))]
