"""What the command line says about a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a model is trained.

    epochs         passes over the training rows
    max_steps      optimizer steps at most; None: as many as the epochs have
    batch_size     rows of one optimizer step, over all processes
    accumulation   a batch is computed in so many pieces; its gradients are those of the whole
    learning_rate  the highest; `head_lr` times that for weights that are new
    warmup         the share of all steps in which it rises from 0
    schedule       how it falls then: "cosine" or "linear" to 0, or "constant"
    optimizer      "adamw", "adam" or "sgd" (momentum 0.9)
    weight_decay   not of norms, biases, embeddings and logit scales
    max_grad_norm  gradients are scaled down to this L2 norm; None: never
    label_smoothing  of classes (Szegedy et al. 2016)
    precision      of activations, by autocast; weights stay float32
    freeze         what stays as it is: modalities, whose towers are meant, or beginnings of names of weights
    ema            decay of an exponential moving average of the weights, which is what is evaluated and saved
    wise_ft        what is evaluated and saved lies so far on the straight line from the base's weights (0) to the
                   learned ones (1): more robust elsewhere (Wortsman et al. 2022, "Robust fine-tuning"); None: 1
    average_best   at the end, the average of the weights of so many of the best evaluations becomes the best, if it
                   is better (see mmcli.training.soup); None: no average is made
    patience       evaluations without a better metric after which training stops; None: never
    eval_steps     steps between evaluations; None: after each epoch
    balance        rows are drawn so that all classes come equally often
    lora_rank      linear layers learn a difference of this rank (Hu et al. 2021), scaled by lora_alpha / lora_rank
                   (None: 2), and of all else new weights alone learn; None: all weights do
    lora_save      "merged": the differences are added to the weights, which makes a model of its own; "adapter":
                   they and new weights are saved alone
    modality_dropout  share of the modalities that are left out of rows of several, at random
    unimodal_loss  weight of the losses of heads that see one modality alone; 0: there are none
    auxiliary_loss  weight of the losses of heads on auxiliary labels (see mmcli.training.auxiliary)
    """

    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 5e-5
    head_lr: float = 10.0
    warmup: float = 0.1
    schedule: str = "cosine"
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    freeze: tuple[str, ...] = ()
    ema: float | None = None
    wise_ft: float | None = None
    average_best: int | None = None
    patience: int | None = None
    eval_steps: int | None = None
    balance: bool = False
    modality_dropout: float = 0.0
    unimodal_loss: float = 0.0
    auxiliary_loss: float = 0.3
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_save: str = "merged"
    augment: str = "none"
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
