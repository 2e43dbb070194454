"""Decoded media -> model inputs, in a decode worker: the checkpoint's own processor, by its shortest exact way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcli.core.errors import ModelError, RowError, one_line
from mmcli.core.records import Audio, Modality, Payload, Sample, Video
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.plan import AudioSpec, Inputs, TextSpec

if TYPE_CHECKING:
    import torch

    from mmcli.models.fusion_inputs import Part

# Extractors of long sounds draw a random window (CLAP). One seed for every sound, so that a row does not depend
# on the rows before it.
AUDIO_SEED = 0
# A picture may have so many pixels when it is resized: one of 1 x 100,000 to a shortest side of 224 has 5e9.
MAX_RESIZED_PIXELS = 2**26
# Names of pixels among model inputs.
PIXELS = frozenset(["pixel_values", "pixel_values_videos"])
# On what it is tried whether a shorter way is exact: pictures of (H, W), clips of (F, H, W).
TRIED_PICTURES = ((301, 517), (97, 61), (5, 9), (24, 250))
TRIED_CLIPS = ((4, 97, 161), (4, 261, 233))
# Options of a processor that gives pixels of 0 to 255.
AS_THEY_ARE = {"do_rescale": False, "do_normalize": False}

Way = Callable[[np.ndarray], dict[str, np.ndarray]]


class InputProcessor:
    """See mmcli.core.protocols.Processor."""

    def __init__(self, checkpoint: Checkpoint, inputs: Inputs) -> None:
        # One thread per worker: there are as many workers as cores, and a fork must not meet a thread pool.
        import torch

        torch.set_num_threads(1)
        self._processors: dict[Modality, Callable[[Any], Sample]] = {}
        if inputs.text:
            self._processors["text"] = TextProcessor(open_tokenizer(checkpoint), inputs.text)
        if inputs.audio:
            self._processors["audio"] = AudioProcessor(open_feature_extractor(checkpoint), inputs.audio)
        if inputs.image:
            images = ImageProcessor(open_image_processor(checkpoint))
            self._processors["image"] = images
            if inputs.video:
                self._processors["video"] = FrameProcessor(images)
        elif inputs.video:
            self._processors["video"] = ClipProcessor(checkpoint)

    def __call__(self, modality: Modality, payload: Payload) -> Sample:
        """Raises RowError for an input that the model cannot take."""
        return self._processors[modality](payload)


class PartsProcessor:
    """See mmcli.core.protocols.Processor; of a model whose modalities have processors of several checkpoints."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._processors: dict[Modality, InputProcessor] = {}
        for part in parts:
            self._processors |= dict.fromkeys(part.inputs.modalities, InputProcessor(part.checkpoint, part.inputs))

    def __call__(self, modality: Modality, payload: Payload) -> Sample:
        """Raises RowError for an input that the model cannot take."""
        return self._processors[modality](modality, payload)


class TextProcessor:
    """A text -> `input_ids` int64 [T] and what else the tokenizer gives."""

    def __init__(self, tokenizer: Any, spec: TextSpec) -> None:
        self._tokenizer, self._spec = tokenizer, spec
        if spec.lower_case:
            _lower_case(tokenizer)
        self._options: dict[str, Any] = {"truncation": spec.max_length is not None, "max_length": spec.max_length}
        if spec.padding == "max_length":
            self._options["padding"] = "max_length"
        else:
            # Some tokenizers give none, and the padding that a batch brings would count as text.
            self._options["return_attention_mask"] = True

    def __call__(self, text: str) -> Sample:
        try:
            encoded = self._tokenizer(self._spec.prefix + text, **self._options)
        except (TypeError, UnicodeError) as error:
            # A lone surrogate, from a manifest that is not UTF-8.
            raise RowError("corrupt", f"the tokenizer does not take this text: {error}") from error
        arrays = {name: np.asarray(values, dtype=np.int64) for name, values in encoded.items()}
        length = len(arrays["input_ids"])
        if length == 0:
            raise RowError("empty_output", "the tokenizer gives no token for this text")
        return Sample("text", arrays, length=length, group=length if self._spec.exact else ())


class ImageProcessor:
    """A picture uint8 [H, W, 3] -> `pixel_values`.

    Resized and cropped by the checkpoint's own processor, but left uint8 [3, H, W] where that is exact: a quarter
    of the bytes on the way to the device, where the runner normalises. Whether a shorter way is exact is found out
    by trying it on a few pictures when the processor is opened.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        ways = (self._bare, self._without_normalisation)
        self._way = next(
            (way for way in ways if _is_exact(processor, self._whole, way, TRIED_PICTURES)), self._whole
        )

    def __call__(self, pixels: np.ndarray) -> Sample:
        arrays = self.arrays(pixels)
        return Sample("image", arrays, group=_shapes(arrays))

    def arrays(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Model inputs by name, without a batch axis. Raises RowError for a picture too narrow to be resized."""
        _check_narrow(self._processor, *pixels.shape[:2])
        return self._way(pixels)

    def frames(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        """As `arrays`, of the frames [F, H, W, 3] of a clip, one behind the other."""
        _check_narrow(self._processor, *frames.shape[1:3])
        if self._way == self._bare:
            # 16 frames of 320 x 240 in 6.7 instead of 11.4 ms.
            return self._bare(frames)
        each = [self._way(frame) for frame in frames]
        return {name: np.stack([one[name] for one in each]) for name in each[0]}

    def _bare(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return {"pixel_values": _resized(self._processor, pixels)}

    def _without_normalisation(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return self._run(pixels, **AS_THEY_ARE)

    def _whole(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        return self._run(pixels)

    def _run(self, pixels: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
        found = self._processor(pixels, return_tensors="pt", input_data_format="channels_last", **options)
        return {name: value[0].numpy() for name, value in found.items()}


def _check_narrow(processor: Any, height: int, width: int) -> None:
    """Raise RowError for pixels too narrow to be resized by their shorter side."""
    size: Any = getattr(processor, "size", None)
    if not size or not getattr(processor, "do_resize", False) or size.get("longest_edge"):
        return
    shortest = size.get("shortest_edge")
    if shortest and shortest**2 * max(height, width) > MAX_RESIZED_PIXELS * min(height, width):
        raise RowError("too_large", f"{width} x {height} pixels: too narrow to be resized to {shortest} pixels")


def _resized(processor: Any, pixels: np.ndarray) -> np.ndarray:
    """A processor's resize and centre crop alone, [..., H, W, 3] -> [..., 3, H, W], uint8.

    0.6 instead of 2.1 ms for a picture of 640 x 480 to 224; 6.7 instead of 30 for 16 frames of 320 x 240.
    """
    import torch

    images = torch.from_numpy(pixels).movedim(-1, -3)
    if processor.do_resize:
        images = processor.resize(images, size=_size(processor.size), resample=processor.resample)
    if getattr(processor, "do_center_crop", False):
        images = processor.center_crop(images, _size(processor.crop_size))
    return images.contiguous().numpy()


def _is_exact(processor: Any, whole: Way, way: Way, tried: Sequence[tuple[int, ...]]) -> bool:
    """Whether another way gives the same model inputs, once they are normalised: tried on pixels of such shapes."""
    import torch

    generator = np.random.default_rng(0)
    try:
        normalize = Normalize.of(processor)
        for shape in tried:
            pixels = generator.integers(0, 256, (*shape, 3), dtype=np.uint8)
            wanted, found = whole(pixels), way(pixels)
            if found.keys() != wanted.keys() or not PIXELS & found.keys():
                return False
            for name in PIXELS & found.keys():
                made = found.pop(name)
                if made.dtype != np.uint8:
                    return False
                normalized = normalize(torch.from_numpy(made)[None])[0]
                if not torch.allclose(normalized, torch.from_numpy(wanted.pop(name)), atol=2e-6, rtol=2e-6):
                    return False
            if any(not np.array_equal(found[name], wanted[name]) for name in found):
                return False
    except Exception:  # noqa: BLE001 - a processor without these parts has no shorter way
        return False
    return True


class Normalize:
    """uint8 [..., 3, H, W] -> (x * rescale_factor - mean) / std, float32, on the device of x.

    mean, std  of each channel, in units of x
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        import torch

        self.mean = torch.tensor(mean, dtype=torch.float32).reshape(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).reshape(-1, 1, 1)

    @classmethod
    def of(cls, processor: Any) -> Normalize:
        """As an image processor is configured. Raises AttributeError, TypeError for other processors."""
        scale = 1.0 / processor.rescale_factor if processor.do_rescale else 1.0
        if not processor.do_normalize:
            return cls([0.0] * 3, [scale] * 3)
        return cls([m * scale for m in processor.image_mean], [s * scale for s in processor.image_std])

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        if self.mean.device != pixels.device:
            self.mean, self.std = self.mean.to(pixels.device), self.std.to(pixels.device)
        if pixels.device.type != "cpu":
            return pixels.float().sub_(self.mean).div_(self.std)
        # A picture at a time stays in the processor's cache: 0.11 ms for one of 224 x 224, and not 0.16 to 0.2.
        pictures = pixels.reshape(-1, *pixels.shape[-3:])
        made = torch.empty(pictures.shape, dtype=torch.float32)
        for picture, found in zip(pictures, made, strict=True):
            found.copy_(picture).sub_(self.mean).div_(self.std)
        return made.reshape(pixels.shape)


class FrameProcessor:
    """A clip for an image tower -> `pixel_values` [F, 3, H, W]: each frame as a picture."""

    def __init__(self, images: ImageProcessor) -> None:
        self._images = images

    def __call__(self, video: Video) -> Sample:
        arrays = self._images.frames(video.frames)
        return Sample("video", arrays, group=_shapes(arrays), cost=len(video.frames))


class ClipProcessor:
    """A clip for a video model -> `pixel_values` [F, 3, H, W] (or what its own processor gives).

    By the shortest exact way, as ImageProcessor.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._processor, self._takes_pictures = open_clip_processor(checkpoint)
        # As the processor calls them.
        self._name = "pixel_values"
        with contextlib.suppress(Exception):
            self._name = next(iter(PIXELS & self._whole(np.zeros((*TRIED_CLIPS[0], 3), np.uint8)).keys()))
        ways = (self._bare, self._without_normalisation)
        exact = (way for way in ways if _is_exact(self._processor, self._whole, way, TRIED_CLIPS))
        self._way = next(exact, self._whole)

    def __call__(self, video: Video) -> Sample:
        _check_narrow(self._processor, *video.frames.shape[1:3])
        arrays = self._way(video.frames)
        return Sample("video", arrays, group=_shapes(arrays), cost=len(video.frames))

    def _bare(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        return {self._name: _resized(self._processor, frames)}

    def _without_normalisation(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        return self._run(frames, **AS_THEY_ARE)

    def _whole(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        return self._run(frames)

    def _run(self, frames: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
        if self._takes_pictures:
            found = self._processor(list(frames), return_tensors="pt", input_data_format="channels_last", **options)
            pixels = found["pixel_values"]
            # [1, F, 3, H, W] where it knows clips (VideoMAE's), [F, 3, H, W] where it knows pictures (CLIP's).
            return {"pixel_values": pixels.reshape(len(frames), *pixels.shape[-3:]).numpy()}
        found = self._processor([frames], return_tensors="pt", do_sample_frames=False, **options)
        return {name: value[0].numpy() for name, value in found.items()}


class AudioProcessor:
    """A sound -> `input_values` [T] or `input_features`, as its own feature extractor gives them."""

    def __init__(self, extractor: Any, spec: AudioSpec) -> None:
        self._extractor, self._spec = extractor, spec

    def __call__(self, audio: Audio) -> Sample:
        if len(audio.waveform) < self._spec.min_samples:
            needed = 1000 * self._spec.min_samples / audio.sampling_rate
            given = 1000 * len(audio.waveform) / audio.sampling_rate
            raise RowError(
                "unsupported_format", f"{given:.0f} ms of sound; the model needs at least {needed:.0f} ms"
            )
        # What else draws from numpy in this process goes on as if nothing had been read (SpecAugment in training).
        state = np.random.get_state()
        np.random.seed(AUDIO_SEED)
        found = self._extractor(audio.waveform, sampling_rate=audio.sampling_rate, return_tensors="np")
        np.random.set_state(state)
        arrays = {name: np.asarray(values[0]) for name, values in found.items()}
        if self._spec.batching == "fixed":
            return Sample("audio", arrays, group=_shapes(arrays))
        if "input_features" in arrays:
            return Sample("audio", arrays, length=len(arrays["input_features"]))
        values = arrays["input_values"]
        if self._spec.batching == "exact":
            return Sample("audio", {"input_values": values}, length=len(values), group=len(values))
        # An int64 until it is on the device would be two thirds of all that waits, crosses and is copied.
        mask = np.ones(len(values), dtype=np.int8)
        return Sample("audio", {"input_values": values, "attention_mask": mask}, length=len(values))


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The checkpoint's tokenizer. Raises ModelError."""
    from transformers import AutoTokenizer

    return _open(AutoTokenizer, checkpoint, "tokenizer")


def _lower_case(tokenizer: Any) -> None:
    """Let the tokenizer lower-case texts first, special tokens in them excepted."""
    from tokenizers.normalizers import Lowercase, Sequence

    backend = tokenizer.backend_tokenizer
    backend.normalizer = Sequence([Lowercase(), *filter(None, [backend.normalizer])])


def open_image_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's image processor. Raises ModelError."""
    from transformers import AutoImageProcessor

    return _open(AutoImageProcessor, checkpoint, "image processor")


def open_feature_extractor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's feature extractor. Raises ModelError."""
    from transformers import AutoFeatureExtractor

    return _open(AutoFeatureExtractor, checkpoint, "feature extractor")


def _open(auto_class: Any, checkpoint: Checkpoint, what: str) -> Any:
    try:
        return auto_class.from_pretrained(checkpoint.directory, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:
        # Damaged files, unknown classes, or a library that is not installed.
        reason = one_line(" ".join(str(error).split()))
        raise ModelError(f"-m {checkpoint.id}: cannot open its {what}: {reason}") from error


def open_clip_processor(checkpoint: Checkpoint) -> tuple[Any, bool]:
    """What turns the frames of a clip into model inputs, and whether it is an image processor of clips."""
    settings = checkpoint.json("preprocessor_config.json") or checkpoint.processor_json("image_processor")
    if "image_processor_type" in settings or "feature_extractor_type" in settings:
        return open_image_processor(checkpoint), True
    from transformers import AutoVideoProcessor

    return _open(AutoVideoProcessor, checkpoint, "video processor"), False


def open_normalization(checkpoint: Checkpoint, inputs: Inputs, modality: Modality) -> Normalize | None:
    """How pixels that an InputProcessor leaves uint8 are normalised; None where it leaves none so."""
    try:
        if inputs.image:
            return Normalize.of(open_image_processor(checkpoint))
        return Normalize.of(open_clip_processor(checkpoint)[0]) if modality == "video" else None
    except (AttributeError, TypeError):
        # A processor of its own kind: the workers send what it gives, already normalised.
        return None


def _shapes(arrays: dict[str, np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(a.shape for a in arrays.values())


def _size(size: Any) -> Any:
    from transformers.image_utils import SizeDict

    return SizeDict(**size) if isinstance(size, dict) else size
