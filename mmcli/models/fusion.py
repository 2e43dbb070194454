"""`MultimodalTransformer`: encoders of any modalities, joined by a transformer over the tokens of all.

    encoder -> tokens, averaged down to `max_tokens` -> linear -> LayerNorm -> + modality embedding
    [CLS] and the tokens of all modalities -> pre-norm transformer -> [CLS] -> head

A row that lacks a modality has one learned token in its place. Its encoder does not see that row, so what stands in
the batch there can change nothing: neither other rows nor the statistics of a batch norm. When gradients are wanted
each encoder runs even where no row has its modality, and then has gradients of zero: DistributedDataParallel waits
for every parameter's gradient on every process.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from mmcli.core.errors import ConfigError, MmcliError, ModelError, one_line
from mmcli.core.records import MODALITIES, Modality
from mmcli.models.checkpoint import Checkpoint
from mmcli.models.encoder import ENCODERS, Encoder
from mmcli.models.fusion_inputs import MODEL_TYPE, TOWERS, tower_config

# Parts whose parameters tokens do not depend on: poolers, what only pretraining needs, and what CLIP and SigLIP do
# with the pooled vector. They have no gradient, and DistributedDataParallel would wait for it.
_UNUSED = ("pooler", "masked_spec_embed", "mask_token", "predictor", "post_layernorm", "head")
# Beginnings of names of such parameters, by model type.
_UNUSED_OF_TYPE = {
    "convnext": "layernorm.",
    "convnextv2": "layernorm.",
    "wav2vec2-conformer": "encoder.pos_conv_embed.",
}
# What makes the training of an encoder depend on more than its inputs, or leaves some of its parameters without a
# gradient: layers skipped at random, and random spans of a sound masked.
_STEADY = {"layerdrop": 0.0, "apply_spec_augment": False}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class MultimodalConfig(PreTrainedConfig):  # type: ignore[misc]
    """Settings of a MultimodalTransformer.

    modalities      in the order of the columns of `present`
    *_config        of the encoder of each
    token_sizes     how many numbers a token of each encoder has
    hidden_size, num_attention_heads, num_hidden_layers, intermediate_size, dropout  of the fusion transformer
    max_tokens      so many tokens of a modality at most; more are averaged
    freeze_batch_norm  encoders keep the statistics of their batch norms in training
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {f"{modality}_config": AutoConfig for modality in MODALITIES}

    def __init__(
        self,
        modalities: Sequence[str] = (),
        token_sizes: Mapping[str, int] | None = None,
        hidden_size: int = 512,
        num_attention_heads: int = 8,
        num_hidden_layers: int = 6,
        intermediate_size: int | None = None,
        dropout: float = 0.1,
        max_tokens: int = 64,
        freeze_batch_norm: bool = True,
        initializer_range: float = 0.02,
        **settings: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_attention_heads}"
            )
        self.modalities = list(modalities)
        self.token_sizes = dict(token_sizes or {})
        self.hidden_size, self.num_attention_heads = hidden_size, num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.dropout, self.max_tokens = dropout, max_tokens
        self.freeze_batch_norm = freeze_batch_norm
        self.initializer_range = initializer_range
        encoders = {name: as_config(settings.pop(name, None)) for name in self.sub_configs}
        super().__init__(**settings)
        # Behind, since it resets how they compute attention, with which masks would be ignored.
        for name, encoder in encoders.items():
            setattr(self, name, encoder)
        if (attention := settings.get("attn_implementation")) is not None:
            self._attn_implementation = attention

    def encoder(self, modality: str) -> Any:
        """The settings of the encoder of a modality."""
        return getattr(self, f"{modality}_config")


def as_config(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    settings = dict(given)
    kind = settings.pop("model_type")
    return AutoConfig.for_model(kind, **settings)


@dataclass
class MultimodalOutput(ModelOutput):  # type: ignore[misc]
    """What a MultimodalTransformer gives.

    loss             the mean over rows (of several labels at once: and labels); None without labels
    logits           [n, L]
    hidden           [n, H], what the head reads
    unimodal_logits  [n, M, L], of each modality alone (see add_unimodal_heads); of a row that lacks it, anything
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    unimodal_logits: torch.Tensor | None = None


class Tower(nn.Module):
    """An encoder and what makes tokens of the fusion transformer of its tokens.

    kind     [H], added to all tokens of the modality
    missing  [H], the token of a row without the modality
    """

    def __init__(self, modality: str, config: MultimodalConfig, encoder: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.encoder = encoder
        self.projection = nn.Linear(config.token_sizes[modality], size)
        self.norm = nn.LayerNorm(size)
        self.kind, self.missing = nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size))
        settings = config.encoder(modality)
        row = ENCODERS.get(settings.model_type)
        self._image, self._most = modality == "image", config.max_tokens
        self._prefix = prefix_tokens(settings, row)
        self._alone = _reads_padding(settings, row)
        self._accepted = set(inspect.signature(encoder.forward).parameters)
        # V-JEPA 2 predicts hidden patches beside, which nothing here reads.
        self._options = {"skip_predictor": True} if "skip_predictor" in self._accepted else {}
        self._kind = settings.model_type
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Parameters that tokens do not depend on take no gradient."""
        for name, parameter in self.encoder.named_parameters():
            if is_unused(name, self._kind):
                parameter.requires_grad_(False)

    def forward(self, inputs: dict[str, torch.Tensor], present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of the encoder, [n, ...], `present` bool [n] -> tokens [n, T, H], which of them count [n, T]."""
        rows, count = present.nonzero()[:, 0], len(present)
        device = self.kind.device
        if not inputs or (len(rows) == 0 and not torch.is_grad_enabled()):
            if len(rows):
                raise ValueError("rows are said to have a modality that the inputs lack")
            tokens = self.missing.expand(count, 1, -1)
            return tokens + self.kind, torch.ones(count, 1, dtype=torch.bool, device=device)
        if len(rows) < count:
            rows = rows.to(device)
            inputs = {name: tensor[rows] for name, tensor in inputs.items()} if len(rows) else _blank(inputs)
        tokens, mask = self._encode_unseen(inputs) if len(rows) == 0 else self._encode(inputs)
        tokens = self.norm(self.projection(tokens))
        if len(rows) < count:
            # Of no row at all: its parameters have gradients, of zero.
            tokens, mask = tokens[: len(rows)], mask[: len(rows)]
            tokens = tokens.new_zeros(count, *tokens.shape[1:]).index_copy(0, rows, tokens)
            mask = mask.new_zeros(count, mask.shape[1]).index_copy(0, rows, mask)
        here = present.to(device, non_blocking=True)[:, None]
        first = torch.where(here, tokens[:, 0], self.missing.to(tokens.dtype))
        tokens = torch.cat([first[:, None], tokens[:, 1:]], dim=1)
        mask = torch.cat([mask.new_ones(count, 1), mask[:, 1:]], dim=1)
        return tokens + self.kind, mask

    def _encode_unseen(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_encode`, of inputs that batch norms must not learn from."""
        norms = [part for part in self.encoder.modules() if isinstance(part, _BATCH_NORMS) and part.training]
        for norm in norms:
            norm.eval()
        try:
            return self._encode(inputs)
        finally:
            for norm in norms:
                norm.train()

    def _encode(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs of rows that have the modality -> tokens [n, T, D], T at most `max_tokens`, and their mask."""
        if not self._alone:
            return self._tokens(inputs)
        # Only sounds of equal length together, without a mask: padding would change them.
        waves, lengths = inputs["input_values"], inputs["attention_mask"].sum(dim=1)
        found = []
        for length in lengths.unique():  # type: ignore[no-untyped-call]
            rows = (lengths == length).nonzero()[:, 0]
            found.append((rows, *self._tokens({"input_values": waves[rows, : int(length)]})))
        longest = max(tokens.shape[1] for _, tokens, _ in found)
        first = found[0][1]
        all_tokens = first.new_zeros(len(lengths), longest, first.shape[-1])
        all_masks = torch.zeros(len(lengths), longest, dtype=torch.bool, device=first.device)
        for rows, tokens, mask in found:
            behind = longest - tokens.shape[1]
            all_tokens = all_tokens.index_copy(0, rows, nn.functional.pad(tokens, (0, 0, 0, behind)))
            all_masks = all_masks.index_copy(0, rows, nn.functional.pad(mask, (0, behind)))
        return all_tokens, all_masks

    def _tokens(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        accepted = {name: tensor for name, tensor in inputs.items() if name in self._accepted}
        hidden = self.encoder(**accepted, **self._options).last_hidden_state
        mask = inputs.get("attention_mask") if "attention_mask" in self._accepted else None
        grid = None
        if hidden.ndim == 4:
            # A feature map [n, C, H, W]: each place is a token.
            grid, prefix = hidden.shape[-2:], 0
            hidden = hidden.flatten(2).transpose(1, 2)
        else:
            prefix = self._prefix
            side = isqrt(hidden.shape[1] - prefix)
            grid = (side, side) if self._image and side**2 == hidden.shape[1] - prefix else None
        if mask is not None and "input_values" in inputs:
            # Of samples -> of the frames that the convolutions make of them.
            mask = self.encoder._get_feature_vector_attention_mask(hidden.shape[1], mask)
        if mask is None:
            return _averaged(hidden, prefix, grid, self._most)
        mask = mask.bool()
        if hidden.shape[1] <= self._most:
            return hidden, mask
        weights, kept = _bins(mask.sum(dim=1), hidden.shape[1], self._most)
        return weights.to(hidden.dtype) @ hidden, kept


def _averaged(
    hidden: torch.Tensor, prefix: int, grid: Sequence[int] | None, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [n, T, D] that all count -> at most `most`. The first `prefix` stay as they are (class tokens)."""
    size, device = hidden.shape[1], hidden.device
    if size > most:
        kept = max(1, most - prefix)
        if grid is not None:
            # Neighbours in the picture are averaged, in height and width.
            down, across = (_bins(torch.tensor([n]), n, min(n, isqrt(kept)))[0][0] for n in grid)
            weights = torch.kron(down, across)
        else:
            weights = _bins(torch.tensor([size - prefix]), size - prefix, kept)[0][0]
        averaged = weights.to(device, hidden.dtype) @ hidden[:, prefix:]
        hidden = torch.cat([hidden[:, :prefix], averaged], dim=1)
    return hidden, torch.ones(hidden.shape[:2], dtype=torch.bool, device=device)


def _bins(lengths: torch.Tensor, size: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive average pooling of the first `lengths` [n] of `size` tokens down to `most`, as matrices.

    A row with fewer tokens keeps them as they are: so it does not depend on how far it is padded.
    -> float32 [n, most, size], bool [n, most]: which of the results there are.
    """
    lengths = lengths[:, None]
    kept = lengths.clamp(max=most)
    index = torch.arange(most, device=lengths.device)
    # floor and ceiling, as torch.nn.AdaptiveAvgPool1d divides.
    start, stop = index * lengths // kept, -(-(index + 1) * lengths // kept)
    there = index < kept
    place = torch.arange(size, device=lengths.device)
    inside = (place >= start[..., None]) & (place < stop[..., None]) & there[..., None]
    return inside / inside.sum(dim=-1, keepdim=True).clamp(min=1), there


def _blank(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row of zeros that an encoder can read."""
    return {
        name: torch.ones_like(tensor[:1]) if name.endswith("mask") else torch.zeros_like(tensor[:1])
        for name, tensor in inputs.items()
    }


def is_unused(name: str, kind: str) -> bool:
    """Whether an encoder's parameter is none that its tokens depend on."""
    return not set(name.split(".")).isdisjoint(_UNUSED) or name.startswith(_UNUSED_OF_TYPE.get(kind, "\0"))


def prefix_tokens(settings: Any, row: Encoder | None) -> int:
    """Tokens before those of patches."""
    if row is None:
        return 0
    return row.prefix + (getattr(settings, "num_register_tokens", 0) if row.registers else 0)


def _reads_padding(settings: Any, row: Encoder | None) -> bool:
    """Whether an audio encoder's tokens change with padding: see mmcli.models.encoder.audio_spec."""
    if not getattr(settings, "conv_kernel", None):
        return False
    group_norm = getattr(settings, "feat_extract_norm", None) == "group"
    return group_norm or bool(getattr(settings, "add_adapter", False)) or (row is not None and row.exact)


class MultimodalTransformer(PreTrainedModel):  # type: ignore[misc]
    """See the module. Its `towers` are by modality; `towers[m].encoder` is what was pretrained."""

    config_class = MultimodalConfig
    base_model_prefix = "multimodal"
    main_input_name = "inputs"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: MultimodalConfig, encoders: Mapping[Any, Any] | None = None) -> None:
        """`encoders`: loaded ones; without them they have random weights."""
        super().__init__(config)
        made = encoders or {
            m: encoder_class(config.encoder(m))._from_config(config.encoder(m)) for m in config.modalities
        }
        self.towers = nn.ModuleDict({m: Tower(m, config, made[m]) for m in config.modalities})
        self.cls = nn.Parameter(torch.zeros(config.hidden_size))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                config.dropout,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.unimodal_heads = nn.ModuleDict()
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """See transformers."""
        loaded = super().from_pretrained(*arguments, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Its loading makes all parameters anew, that take gradients.
        for tower in model.towers.values():
            tower.freeze_unused()
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        deviation = self.config.initializer_range
        if isinstance(module, Tower):
            init.normal_(module.kind, 0.0, deviation)
            init.normal_(module.missing, 0.0, deviation)
        elif isinstance(module, MultimodalTransformer):
            init.normal_(module.cls, 0.0, deviation)
        elif isinstance(module, nn.MultiheadAttention):
            init.normal_(module.in_proj_weight, 0.0, deviation)
            init.zeros_(module.in_proj_bias)
        else:
            super()._init_weights(module)

    def train(self, mode: bool = True) -> MultimodalTransformer:
        """As ever, but for the batch norms of encoders (`freeze_batch_norm`).

        Those then keep the statistics that they were pretrained with: in small batches of a task they would get
        worse, and a row's gradient would depend on its neighbours, so that accumulated gradients differ from those
        of a whole batch. Their scale and shift are trained. Encoders from scratch have no statistics to keep.
        """
        super().train(mode)
        if self.config.freeze_batch_norm:
            for part in self.towers.modules():
                if isinstance(part, _BATCH_NORMS):
                    part.eval()
        return self

    def forward(
        self,
        inputs: dict[str, torch.Tensor],
        present: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> MultimodalOutput:
        """Model inputs -> MultimodalOutput.

        inputs   `image.pixel_values` and so on, [n, ...]; of a row without a modality anything
        present  bool [n, M], in the order of config.modalities, best on the host: a device would have to be waited
                 for; None: all rows have the modalities of `inputs`
        labels   int64 [n]; float [n, L] where any number of labels applies (config.problem_type)
        """
        of: dict[str, dict[str, torch.Tensor]] = {modality: {} for modality in self.config.modalities}
        for name, tensor in inputs.items():
            modality, _, own = name.partition(".")
            of[modality][own] = tensor
        if present is None:
            count = len(next(iter(inputs.values())))
            present = torch.tensor([bool(given) for given in of.values()]).expand(count, -1)
        sequences = [tower(of[m], present[:, i]) for i, (m, tower) in enumerate(self.towers.items())]
        hidden = self._fuse(sequences)
        logits = self.head(self.dropout(hidden))
        loss = None if labels is None else self._loss(logits, labels)
        return MultimodalOutput(loss, logits, hidden, self._unimodal(sequences))

    def add_unimodal_heads(self) -> None:
        """A linear head for each modality, on the mean of its tokens before fusion: for training alone.

        They are no part of what save_pretrained writes. Drawn from torch's global generator.
        """
        for modality in self.config.modalities:
            head = nn.Linear(self.config.hidden_size, self.config.num_labels)
            nn.init.normal_(head.weight, 0.0, self.config.initializer_range)
            nn.init.zeros_(head.bias)
            self.unimodal_heads[modality] = head.to(self.device)
        self._keys_to_ignore_on_save = [f"unimodal_heads.{name}" for name in self.unimodal_heads.state_dict()]

    def _unimodal(self, sequences: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        if not self.unimodal_heads:
            return None
        found = []
        for (tokens, mask), head in zip(sequences, self.unimodal_heads.values(), strict=True):
            counted = mask[..., None].to(tokens.dtype)
            found.append(head((tokens * counted).sum(dim=1) / counted.sum(dim=1)))
        return torch.stack(found, dim=1)

    def _fuse(self, sequences: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Tokens and masks of all modalities -> [n, H], that of [CLS]."""
        first = sequences[0][0]
        begin = self.cls.to(first.dtype).expand(len(first), 1, -1)
        tokens = torch.cat([begin, *(tokens for tokens, _ in sequences)], dim=1)
        masks = [mask for _, mask in sequences]
        hidden_keys = ~torch.cat([masks[0].new_ones(len(first), 1), *masks], dim=1)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                tokens = self._gradient_checkpointing_func(layer.__call__, tokens, None, hidden_keys)
            else:
                tokens = layer(tokens, src_key_padding_mask=hidden_keys)
        return self.norm(tokens[:, 0])  # type: ignore[no-any-return]

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return nn.functional.cross_entropy(logits.float(), labels)

    def new_weights(self) -> frozenset[str]:
        """Names of the parameters that are of no encoder."""
        encoders = tuple(f"towers.{modality}.encoder." for modality in self.config.modalities)
        return frozenset(name for name, _ in self.named_parameters() if not name.startswith(encoders))

    @classmethod
    def from_encoders(
        cls,
        encoders: Mapping[Modality, Checkpoint],
        labels: Sequence[str],
        weights: bool = True,
        attn_implementation: str | None = None,
        **settings: Any,
    ) -> MultimodalTransformer:
        """A new model on encoders, whose weights are loaded (`weights`) or random; the rest is random.

        settings  of MultimodalConfig. Encoders without weights learn the statistics of their batch norms, unless
                  `freeze_batch_norm` is given.
        Random weights are drawn from torch's global generator. Raises ModelError for weights that an encoder lacks,
        ConfigError for one that is not of a known type.
        """
        made = {
            modality: load_encoder(checkpoint, modality, weights, attn_implementation)
            for modality, checkpoint in encoders.items()
        }
        names = dict(enumerate(labels))
        config = MultimodalConfig(
            modalities=list(made),
            token_sizes={modality: token_size(encoder.config) for modality, encoder in made.items()},
            id2label=names,
            label2id={name: index for index, name in names.items()},
            **{f"{modality}_config": encoder.config for modality, encoder in made.items()},
            **{"freeze_batch_norm": weights, **settings},
        )
        return cls(config, made)


def load_encoder(
    checkpoint: Checkpoint, modality: Modality, weights: bool = True, attn_implementation: str | None = None
) -> Any:
    """A checkpoint's encoder of a modality, float32, on the host. Raises ModelError, ConfigError."""
    encoder, missing = open_encoder(checkpoint, modality, weights, attn_implementation)
    kind = encoder.config.model_type
    check_complete(checkpoint, modality, [name for name in missing if not is_unused(name, kind)])
    return encoder


def check_complete(checkpoint: Checkpoint, modality: Modality, missing: Sequence[str]) -> None:
    """Raise ModelError when weights that are needed are `missing`: they would be random numbers."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"-m {checkpoint.id}: it lacks weights of its {modality} encoder ({missing[0]}{more})")


def open_encoder(
    checkpoint: Checkpoint, modality: Modality, weights: bool = True, attn_implementation: str | None = None
) -> tuple[Any, list[str]]:
    """As `load_encoder`, and the names of weights that the checkpoint lacks."""
    settings = tower_config(checkpoint, modality)
    for name, value in _STEADY.items():
        if hasattr(settings, name):
            setattr(settings, name, value)
    model_class = encoder_class(settings)
    if not weights:
        return model_class._from_config(settings, attn_implementation=attn_implementation), []
    disable_progress_bar()
    verbosity = get_verbosity()
    # It warns of the weights of a dual encoder's other tower.
    set_verbosity_error()
    try:
        encoder, info = checkpoint.load(
            model_class, config=settings, dtype=torch.float32, attn_implementation=attn_implementation
        )
    except MmcliError:
        raise
    except Exception as error:
        raise ModelError(f"-m {checkpoint.id}: cannot load it: {one_line(str(error))}") from error
    finally:
        set_verbosity(verbosity)
    # Where it was is no concern of who loads the model.
    encoder.config._name_or_path = ""
    return encoder, sorted(info["missing_keys"])


def token_size(settings: Any) -> int:
    """How many numbers a token of an encoder has."""
    row = ENCODERS.get(settings.model_type)
    if getattr(settings, "add_adapter", False):
        return int(settings.output_hidden_size)
    if row is not None and row.size is None:
        # Of a picture, on torch's meta device, which holds no weights.
        with torch.device("meta"), torch.inference_mode():
            model = encoder_class(settings)._from_config(settings).eval()
            return int(model(pixel_values=torch.zeros(1, 3, 224, 224)).last_hidden_state.shape[1])
    name, _, index = (row.size if row is not None and row.size else "hidden_size").partition(".")
    size = getattr(settings, name)
    return int(size[int(index)] if index else size)


def encoder_class(settings: Any) -> Any:
    """The transformers class of an encoder. Raises ConfigError."""
    import transformers

    kind = settings.model_type
    name = next(
        (one.model_class for towers in TOWERS.values() for one in towers.values() if one.kind == kind), None
    )
    if name is not None:
        return getattr(transformers, name)
    found = AutoModel._model_mapping.get(type(settings), None)
    if found is None:
        raise ConfigError(f"model type {kind!r} has no encoder")
    return found


def register() -> None:
    """Let transformers' AutoConfig and AutoModel load MultimodalTransformers."""
    AutoConfig.register(MODEL_TYPE, MultimodalConfig, exist_ok=True)
    AutoModel.register(MultimodalConfig, MultimodalTransformer, exist_ok=True)


def drop_modalities(present: torch.Tensor, p: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """`present` bool [n, M] without each modality of a row with probability `p`; one stays of a row that has any.

    Modality dropout (Neverova et al. 2016, ModDrop), which training uses so that no modality is relied on alone.
    """
    drawn = torch.rand(present.shape, generator=generator, device=present.device)
    kept = present & (drawn >= p)
    # All are below p where none is kept, so that the largest is as likely any of them.
    last = drawn.masked_fill(~present, -1.0).argmax(dim=1, keepdim=True)
    rescued = torch.zeros_like(present).scatter(1, last, True) & present
    return torch.where(kept.any(dim=1, keepdim=True), kept, rescued)
