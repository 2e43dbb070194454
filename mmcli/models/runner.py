"""A loaded model on a device: samples -> padded batch -> vectors."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmcli.core.errors import MmcliError, ModelError, one_line
from mmcli.core.records import Modality, Sample
from mmcli.core.samples import Column, Samples
from mmcli.models.concurrent import concurrent
from mmcli.models.device import choose_device, exact_convolutions, keep_freed_memory
from mmcli.models.head import Similarity
from mmcli.models.inputs import PIXELS, Normalize, open_normalization, open_tokenizer
from mmcli.models.packed import pack
from mmcli.models.pending import PendingVectors
from mmcli.models.plan import CheckpointPlan, EmbeddingPlan

# Model inputs of one modality by name -> vectors [n, D], in whatever dtype.
Tower = Callable[[dict[str, torch.Tensor]], torch.Tensor]
# Model inputs, features of texts [P, D] -> vectors [n, D] and what the texts become beside each, [n, P, D].
Conditioned = Callable[[dict[str, torch.Tensor], torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(slots=True)
class Loaded:
    """A model that gives vectors.

    towers       of each modality
    similarity   how its cosines are read; None: its vectors are of no shared space
    conditioned  of a model whose texts' vectors depend on what they are compared with (X-CLIP)
    """

    towers: dict[Modality, Tower]
    similarity: Similarity | None = None
    conditioned: Conditioned | None = None


@dataclass(slots=True)
class Batch:
    """Samples of one modality, stacked. `tensors`: model inputs by name, [n, ...], on the host."""

    modality: Modality
    tensors: dict[str, torch.Tensor]


class Collator:
    """Samples -> batches on a device, without a model.

    transfer_s  seconds that `to_device` has taken; on a CUDA device, which copies while the host goes on, those of
                the device, as far as it is known to have copied
    """

    def __init__(self, plan: CheckpointPlan, device: torch.device) -> None:
        self.device = device
        self._dtype: torch.dtype = getattr(torch, plan.dtype)
        self._fill = _text_fill(plan)
        self._normalize: dict[Modality, Normalize] = {}
        for modality in plan.modalities & {"image", "video"}:
            found = open_normalization(plan.processor_of(modality), plan.inputs_of(modality), modality)
            if found is not None:
                self._normalize[modality] = found
        self._moved_s = 0.0
        self._moving: deque[tuple[Any, Any]] = deque()

    @property
    def transfer_s(self) -> float:
        while self._moving and self._moving[0][1].query():
            start, end = self._moving.popleft()
            self._moved_s += start.elapsed_time(end) / 1000
        return self._moved_s

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Samples of equal (modality, group) -> a Batch; sequences are padded to the longest, on the right.

        On the right whatever the tokenizer says: so tokens have the positions that they have alone.
        """
        modality = samples[0].modality
        fill = self._fill if modality == "text" else {}
        pinned = self.device.type == "cuda"
        if isinstance(samples, Samples):
            tensors = {name: padded(c, fill.get(name, 0), pinned) for name, c in samples.columns.items()}
            return Batch(modality, tensors)
        tensors = {}
        for name in samples[0].arrays:
            tensors[name] = stack([s.arrays[name] for s in samples], fill.get(name, 0), pinned)
        return Batch(modality, tensors)

    def to_device(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Model inputs by name, in the model's dtype; pictures that came as uint8 are normalised there."""
        if self.device.type == "cuda":
            _ = self.transfer_s  # forgets the copies that are done
            stream = torch.cuda.current_stream(self.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            stream.record_event(start)
            moved = {n: self._to_device(batch.modality, n, tensor) for n, tensor in batch.tensors.items()}
            stream.record_event(end)
            self._moving.append((start, end))
            return moved
        begun = time.perf_counter()
        moved = {n: self._to_device(batch.modality, n, tensor) for n, tensor in batch.tensors.items()}
        self._moved_s += time.perf_counter() - begun
        return moved

    def _to_device(self, modality: Modality, name: str, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(self.device, non_blocking=True)
        if name in PIXELS and moved.dtype == torch.uint8 and modality in self._normalize:
            moved = self._normalize[modality](moved)
        if moved.dtype == torch.int8:
            # A mask of sound (see inputs.AudioProcessor).
            moved = moved.long()
        # A number for each clip is a time, not an input of a layer (Qwen2.5-VL's second_per_grid_ts).
        return moved.to(self._dtype) if moved.is_floating_point() and moved.ndim > 1 else moved


class TorchRunner(Collator):
    """What all runners share (see mmcli.core.protocols.Runner): device, loading, batches on their way to it.

    loaded  what the plan's loader gives
    """

    def __init__(self, plan: CheckpointPlan) -> None:
        self.device = torch.device(choose_device(plan.device)[0])
        if self.device.type == "cpu" and plan.dtype == "float16":
            raise ModelError(
                "--dtype float16 is not for the CPU: 4 times slower than float32", hint="--dtype bfloat16"
            )
        if self.device.type == "cpu":
            keep_freed_memory()
        if plan.dtype == "float32":
            exact_convolutions()
        plan.checkpoint.fetch_weights()
        try:
            self.loaded = plan.load_weights(self.device)
        except MmcliError:
            raise
        except torch.OutOfMemoryError as error:
            raise ModelError(f"-m {plan.checkpoint.id}: its weights do not fit on {self.device}") from error
        except Exception as error:
            raise ModelError(f"-m {plan.checkpoint.id}: cannot load it: {one_line(str(error))}") from error
        super().__init__(plan, self.device)


class EmbeddingRunner(TorchRunner):
    """Batches -> vectors."""

    def __init__(self, plan: EmbeddingPlan) -> None:
        super().__init__(plan)
        self._plan = plan
        loaded: Loaded = self.loaded
        self._towers = loaded.towers
        self.similarity, self.conditioned = loaded.similarity, loaded.conditioned
        means = {} if plan.center is None else plan.center.means
        self._means = {m: torch.tensor(mean, device=self.device) for m, mean in means.items()}
        if plan.compile:
            self._towers = {m: torch.compile(tower) for m, tower in self._towers.items()}

    @torch.inference_mode()
    def forward(self, batch: Batch) -> np.ndarray | PendingVectors:
        """Batch -> float32 [n, D]. Raises torch.OutOfMemoryError, ModelError for vectors of another size."""
        vectors = self.vectors(batch)
        if self._plan.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        if self._means:
            vectors = torch.nn.functional.normalize(vectors - self._means[batch.modality], dim=-1)
        return PendingVectors(vectors) if self.device.type == "cuda" else vectors.cpu().numpy()

    def concurrent(self, most: int, runner: Any = None) -> Any:
        """See mmcli.core.protocols.Runner; of a `runner` that calls this one, where one is given."""
        return concurrent(runner or self, self._plan, most)

    def vectors(self, batch: Batch) -> torch.Tensor:
        """Batch -> float32 [n, D] on the device, not normalised. Raises as `forward`."""
        vectors = self._towers[batch.modality](self.to_device(batch))
        if vectors.ndim != 2 or vectors.shape[1] != self._plan.embedding_size:
            raise ModelError(
                f"the model gave vectors of shape {tuple(vectors.shape)}, not [n, {self._plan.embedding_size}]"
            )
        return vectors.float()


def load_model(
    model_class: Any, plan: CheckpointPlan, device: torch.device, unused: Sequence[str] = (), makes: str = "vectors"
) -> Any:
    """`model_class.from_pretrained`, ready for inference on `device`.

    unused  beginnings of the names of weights that are not needed, so that a checkpoint may lack them
    makes   what the weights are for, as the error says it
    Raises ModelError when other weights are missing: they would be random numbers.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    checkpoint = plan.checkpoint
    model, info = checkpoint.load(
        model_class, dtype=getattr(torch, plan.dtype), attn_implementation=plan.attn_implementation
    )
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(tuple(unused)))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"-m {checkpoint.id}: it lacks weights that its {makes} need ({missing[0]}{more}); "
            f"it was saved as {', '.join(checkpoint.config.architectures or ['another class'])}",
            hint="another --pooling does without it" if all(k.startswith("pooler.") for k in missing) else None,
        )
    model = model.to(device).eval()
    if device.type == "cpu" and not (plan.learns or plan.compile):
        pack(model)
    return model


def stack(arrays: Sequence[np.ndarray], fill: int, pinned: bool, left: bool = False) -> torch.Tensor:
    """Arrays as one, padded along their first axis to the longest: behind, or in front with `left`.

    Further axes are padded behind. Straight into pinned memory for a CUDA device: no second copy.
    """
    first = arrays[0]
    if first.ndim == 0:
        stacked = torch.empty(len(arrays), dtype=_dtype_of(first), pin_memory=pinned)
        stacked.numpy()[:] = arrays
        return stacked
    lengths = [len(array) for array in arrays]
    inner = first.shape[1:] if first.ndim == 1 else _largest([a.shape[1:] for a in arrays])
    longest = max(lengths)
    stacked = torch.empty((len(arrays), longest, *inner), dtype=_dtype_of(first), pin_memory=pinned)
    out = stacked.numpy()
    alike = first.ndim == 1 or all(a.shape[1:] == inner for a in arrays)
    if alike and min(lengths) == longest:
        # As np.stack, which takes four times as long for a thousand short ones.
        np.concatenate(arrays, out=out.reshape(len(arrays) * longest, *inner))
        return stacked
    out.fill(fill)
    for row, array, length in zip(out, arrays, lengths, strict=True):
        rows = row[longest - length :] if left else row[:length]
        if alike:
            # 0.3 us; the general way takes 0.7, of each of three arrays of a text.
            rows[:] = array
        else:
            rows[(slice(None), *map(slice, array.shape[1:]))] = array
    return stacked


def padded(column: Column, fill: int, pinned: bool) -> torch.Tensor:
    """As `stack`."""
    tensor = torch.empty(column.padded_shape, dtype=_dtype_of(column.values), pin_memory=pinned)
    column.pad_into(tensor.numpy(), fill)
    return tensor


def join(arrays: Sequence[np.ndarray], pinned: bool = False) -> torch.Tensor:
    """Arrays one behind the other; further axes are padded with 0, behind."""
    first = arrays[0]
    shape = (sum(len(a) for a in arrays), *_largest([a.shape[1:] for a in arrays]))
    joined = torch.empty(shape, dtype=_dtype_of(first), pin_memory=pinned)
    out = joined.numpy()
    if all(a.shape[1:] == first.shape[1:] for a in arrays):
        np.concatenate(arrays, out=out)
        return joined
    out.fill(0)
    start = 0
    for array in arrays:
        out[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
        start += len(array)
    return joined


def _dtype_of(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def _largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(max(sizes) for sizes in zip(*shapes, strict=True))


def _text_fill(plan: CheckpointPlan) -> dict[str, int]:
    """With what shorter texts are filled up; with 0 where nothing is said."""
    if plan.inputs.text is None:
        return {}
    tokenizer = open_tokenizer(plan.processor_of("text"))
    # CLIP's towers may take the largest id for the end of a text: a padding token behind it would be taken instead.
    tokens = 0 if getattr(plan.detail, "causal", False) else tokenizer.pad_token_id or 0
    return {"input_ids": tokens, "token_type_ids": tokenizer.pad_token_type_id}
