"""Contrastive losses of two sides, exact in batches larger than memory and across processes.

All losses take vectors of any length: they normalise them, in float32 at least and outside autocast (in bfloat16 a
logit near 100 is wrong by up to 0.25).

Several captions of one picture are no negatives of one another. `groups` says what belongs together, and a row's
target is shared evenly among all its positives: UniCL (Yang et al. 2022), which is SupCon's L_out (Khosla et al.
2020, equation 2) of two sides, and how ALBEF and BLIP are tuned for retrieval. The other way, to leave them out of
the denominator, learns less from the same rows (Huynh et al. 2022: "attraction" against "elimination"). The least
that such a loss can be is the mean of ln |positives|, not 0.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

# What a parameter is called that is the logarithm of a logit scale, and ALIGN's, which divides logits.
LOG_SCALES = ("logit_scale", "logit_scale_a", "logit_scale_t")
TEMPERATURE, BIAS = "temperature", "logit_bias"
# exp of it is the largest scale: Radford et al. 2021, section 2.5.
MAXIMUM_LOG_SCALE = math.log(100)
# Of what is gathered, beside its rows.
_DIMENSIONS = 3

Scale = torch.Tensor | float


# ------------------------------------------------------------------------------------------------------ losses


def clip_loss(a: torch.Tensor, b: torch.Tensor, scale: Scale, groups: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy of scaled cosines, the mean of both ways (Radford et al. 2021, figure 3).

    a, b    vectors [n, D]; row i of one belongs to row i of the other
    scale   multiplies cosines: exp(logit_scale)
    groups  int64 [n]: rows of equal value are positives of one another; None: all are distinct
    """
    return symmetric_cross_entropy(scale * _cosines(a, b), groups)


def clap_loss(
    audio: torch.Tensor,
    text: torch.Tensor,
    scale_audio: Scale,
    scale_text: Scale,
    groups: torch.Tensor | None = None,
) -> torch.Tensor:
    """`clip_loss` with a scale for each way: audio to text and text to audio (Wu et al. 2023, equation 3).

    transformers' ClapModel transposes its logits per audio once too often: its loss ranks sounds for a text twice,
    and texts for a sound never. This one is the paper's.
    """
    cosines = _cosines(audio, text)
    of_audio, of_text = cross_entropy(scale_audio * cosines, groups), cross_entropy(scale_text * cosines.T, groups)
    return (of_audio + of_text) / 2


def xclip_loss(
    videos: torch.Tensor, texts: torch.Tensor, scale: Scale, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """`clip_loss` of texts that heed the clip beside them (X-CLIP, Ni et al. 2022, section 3.3).

    videos  [n, D]; texts: [n, n, D], what text j becomes beside clip i
    """
    with torch.autocast(videos.device.type, enabled=False):
        cosines = torch.einsum("id,ijd->ij", _unit(videos), _unit(texts))
    return symmetric_cross_entropy(scale * cosines, groups)


def siglip_loss(
    a: torch.Tensor, b: torch.Tensor, scale: Scale, bias: Scale, groups: torch.Tensor | None = None
) -> torch.Tensor:
    """Each pair on its own, positive or not: the sum over pairs, divided by rows (Zhai et al. 2023, algorithm 1).

    bias    is added to scaled cosines
    groups  as in `clip_loss`: all pairs within a group are positive
    """
    logits = scale * _cosines(a, b) + bias
    if groups is None:
        positive = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    else:
        positive = _same(groups, logits)
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum(dim=1).mean()


def symmetric_cross_entropy(logits: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of both ways of logits [n, n]."""
    return (cross_entropy(logits, groups) + cross_entropy(logits.T, groups)) / 2


def cross_entropy(logits: torch.Tensor, groups: torch.Tensor | None = None) -> torch.Tensor:
    """One way, of logits [n, n]: the mean over rows of -log softmax, itself the mean over a row's positives.

    Where all groups are distinct, it is to the last bit what it is without groups.
    """
    found = logits.log_softmax(dim=1)
    if groups is None:
        # In one piece, as the sums below are: the mean of a strided tensor adds up in another order.
        return -found.diagonal().contiguous().mean()
    positive = _same(groups, logits)
    return -(torch.where(positive, found, 0).sum(dim=1) / positive.sum(dim=1)).mean()


def _same(groups: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """bool [n, n]: which pairs are of one group."""
    if groups.shape != logits.shape[:1]:
        raise ValueError(f"groups {list(groups.shape)} of logits {list(logits.shape)}")
    return groups[:, None] == groups


def _cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[n, n] of [n, D] and [n, D]."""
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"vectors of two sides must be as many and as long: {list(a.shape)}, {list(b.shape)}")
    with torch.autocast(a.device.type, enabled=False):
        return _unit(a) @ _unit(b).T


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


# ------------------------------------------------------------------------------------------------- logit scale


def logit_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Scales and biases of a model's logits, by name: what no tower owns, no decay touches, and adapters lack."""
    names = {*LOG_SCALES, TEMPERATURE, BIAS}
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in names}


def unfreeze_logit_parameters(model: nn.Module) -> list[str]:
    """Let them learn whatever froze the rest (peft freezes all it does not adapt); returns those that did not."""
    frozen = [name for name, parameter in logit_parameters(model).items() if not parameter.requires_grad]
    for name in frozen:
        model.get_parameter(name).requires_grad_(True)
    return frozen


@torch.no_grad()
def clamp_logit_scale(model: nn.Module, maximum: float = MAXIMUM_LOG_SCALE) -> None:
    """Keep logit scales at exp(maximum) at most; to be called after each optimizer step.

    Beyond it training becomes unstable (Radford et al. 2021, section 2.5). The scale of a sigmoid loss, told by the
    bias beside it, has no such limit in Zhai et al. 2023, and is left alone.
    """
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for name in [] if BIAS in own else [name for name in LOG_SCALES if name in own]:
            own[name].clamp_(max=maximum)
        if TEMPERATURE in own:
            own[TEMPERATURE].clamp_(min=math.exp(-maximum))


# --------------------------------------------------------------------------------------------- several processes


def gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Rows [n, ...] of every process, in order of rank: [N, ...]; itself where there is one process.

    Processes may have different n. A loss of gathered vectors is the whole batch's, the same in every process. Its
    backward pass sums what all W processes have as a row's gradient in the process that the row is from: W times
    the whole batch's. The mean over processes that DDP, or `average_gradients`, takes of the parameters' gradients
    makes them those of one process with the whole batch. Groups are gathered too: a number must mean the
    same in every process.

    In open_clip's words this is gather_with_grad without local_loss. local_loss compares only a process's own rows
    with all others, which takes less memory (n N logits instead of N N), and gives the same gradients where all
    have the same n. open_clip without gather_with_grad loses a row's gradients from the other processes' losses.
    """
    if processes() == 1:
        return tensor
    # How many rows, whether they learn, and how long they are: all that a process without rows does not know.
    own = torch.tensor([len(tensor), tensor.requires_grad, *tensor.shape[1:]], device=tensor.device)
    own = F.pad(own, (0, 2 + _DIMENSIONS - len(own)))
    found = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(found, own)
    counts, learns, *longest = torch.stack(found).T.tolist()
    if not len(tensor):
        tensor = tensor.reshape(0, *(max(sizes) for sizes in longest if any(sizes)))
    if any(learns) and not tensor.requires_grad:
        # Else one process would wait in its backward pass for another one that has none.
        tensor = tensor.detach().requires_grad_(True)
    gathered: torch.Tensor = _Gather.apply(tensor, counts)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """all_gather of unequal numbers of rows. (torch.distributed.nn.functional is deprecated in PyTorch 2.12.)"""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Every backend has all_reduce; reduce_scatter would move less, but vectors are small beside what made them.
        summed = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return torch.split(summed, ctx.counts)[dist.get_rank()], None


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """The mean of the processes' gradients, as DDP takes it; nothing to do where there is one process.

    For gradients that were not made in the backward pass of DDP's own forward: those of `GradCache`, and those of a
    batch with fewer rows than processes. A process may lack gradients that others have.
    """
    # Those of FSDP's blocks are the mean already.
    learning = [p for p in model.parameters() if p.requires_grad and not hasattr(p, "device_mesh")]
    if processes() == 1 or not learning:
        return
    there = torch.tensor([p.grad is not None for p in learning], dtype=torch.uint8, device=learning[0].device)
    dist.all_reduce(there, op=dist.ReduceOp.MAX)
    pending = []
    for parameter, known in zip(learning, there.tolist(), strict=True):
        if known:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad /= processes()
            pending.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in pending:
        work.wait()


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# --------------------------------------------------------------------------------------------------- GradCache

Encode = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class GradCache:
    """Gradients of a whole batch's loss, in the memory of a piece (Gao et al. 2021, "Scaling Deep Contrastive
    Learning Batch Size under Memory Limited Setup").

    The rows of all pieces are computed without a graph; the loss of them all gives a gradient for each row, and for
    what the loss itself has to learn (logit scale and bias); then each piece is computed once more, just as it was,
    dropout included, and its rows' gradients go on into its encoder. That costs one more forward pass.

    encode_a  a piece of one side -> rows [k, ...]: vectors, or more than that (X-CLIP's with its patches)
    encode_b  a piece of the other
    loss      all rows of a and of b -> the loss; it gathers those of other processes, if there are any
    backward  of the loss: accelerate's, or one that scales it; all gradients are scaled alike

    Across processes the encoders are the bare model's, not DDP's, and `average_gradients` follows: DDP would
    average for every piece. Not for DeepSpeed, whose own engine must make every backward pass.

    BatchNorm breaks it, as it breaks every gradient accumulation: in training mode its statistics are a piece's,
    and the running ones are updated twice. See `freeze_batch_norm`.
    """

    encode_a: Encode
    encode_b: Encode
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward

    def step(self, a: Sequence[Any], b: Sequence[Any]) -> torch.Tensor:
        """Add the batch's gradients to the parameters'; returns its loss, without a graph.

        a, b  pieces of both sides, not necessarily as many; the rows of all must agree
        """
        if len(a) == len(b) == 1:
            loss = self.loss(self.encode_a(a[0]), self.encode_b(b[0]))
            self.backward(loss)
            return loss.detach()
        sides = _Side(self.encode_a, a), _Side(self.encode_b, b)
        rows = [side.forward() for side in sides]
        loss = self.loss(*rows)
        self.backward(loss)
        with _randomness_kept():
            for side, vectors in zip(sides, rows, strict=True):
                if vectors.grad is not None:
                    side.backward(vectors.grad)
        return loss.detach()


@dataclass(slots=True)
class _Side:
    """The pieces of one side, and what was random when each was encoded."""

    encode: Encode
    pieces: Sequence[Any]
    sizes: list[int] = field(default_factory=list)
    before: list[_Randomness] = field(default_factory=list)

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        """Rows of all pieces, a leaf."""
        found = []
        for piece in self.pieces:
            self.before.append(_Randomness.now())
            found.append(self.encode(piece))
        self.sizes = [len(rows) for rows in found]
        return torch.cat(found).requires_grad_(True)

    def backward(self, gradient: torch.Tensor) -> None:
        """From the rows into the encoder."""
        for piece, before, part in zip(self.pieces, self.before, torch.split(gradient, self.sizes), strict=True):
            before.restore()
            rows = self.encode(piece)
            if not rows.requires_grad:  # A frozen tower.
                return
            with torch.autocast(rows.device.type, enabled=False):
                torch.autograd.backward(rows, part)


def freeze_batch_norm(model: nn.Module) -> int:
    """Let every BatchNorm use its running statistics, and keep them; to be called after each `model.train()`.

    So the result for a row depends on its neighbours no more. Returns how many there are (CLAP, ALIGN, ResNet).
    """
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in found:
        module.eval()
    return len(found)


@dataclass(frozen=True, slots=True)
class _Randomness:
    """All random states that a model draws from: Wav2Vec2 masks spectrograms and drops layers with numpy's."""

    python: Any
    numpy: Any
    host: torch.Tensor
    device: torch.Tensor | None

    @classmethod
    def now(cls) -> _Randomness:
        device = _device()
        state = None if device is None else device.get_rng_state()
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), state)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.host)
        if self.device is not None:
            device = _device()
            assert device is not None
            device.set_rng_state(self.device)


def _device() -> Any:
    """The accelerator's module, when one is in use: asking an idle CUDA device would start it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda
    return torch.mps if torch.backends.mps.is_available() else None


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """Afterwards everything goes on as if nothing had been drawn meanwhile."""
    before = _Randomness.now()
    try:
        yield
    finally:
        before.restore()
