"""Sentence-transformers directories: the modules that modules.json lists, one after the other, as there.

Layouts of the library's versions 0.3 to 6.2. Its Transformer, Pooling, Dense, LayerNorm, Normalize, Dropout and
CLIPModel are known; other modules are refused by name.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mmcli.core.errors import ConfigError, ModelError, one_line
from mmcli.core.records import DecodeOptions
from mmcli.models import dual_encoder
from mmcli.models.checkpoint import Checkpoint, check_files
from mmcli.models.facts import available, max_positions, max_tokens
from mmcli.models.options import ModelOptions
from mmcli.models.plan import EmbeddingPlan, Inputs, TextSpec

if TYPE_CHECKING:
    import torch

    from mmcli.models.runner import Loaded

    # What the modules hand on: "token_embeddings" [n, T, D], "sentence_embedding" [n, D], "mask" [n, T].
    Features = dict[str, torch.Tensor]
    Step = Callable[[Features], None]

FAMILY = "sentence-transformers"
# What cosines are multiplied by in the loss that these models are usually trained with: the default of
# sentence-transformers' MultipleNegativesRankingLoss. A checkpoint does not tell.
SCALE = 20.0
MODULES = ("Transformer", "CLIPModel", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
# Pooling as flags, of versions before 5.4; vectors are joined in this order.
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_TRANSFORMER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
_CLIP = {
    "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
    "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
}
# Settings of a Transformer that change its vectors and are not known here.
_UNKNOWN_SETTINGS = (
    "processing_kwargs", "model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_name_or_path",
)  # fmt: skip
# Of these only the encoder gives vectors.
_ENCODER_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}


@dataclass(frozen=True, slots=True)
class Module:
    """One entry of modules.json: the class, its folder, and what its config file says."""

    kind: str
    folder: str
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What follows the transformer.

    modules   in order; without a Normalize at the end, which the plan's `normalize` stands for
    output    which of the transformer's outputs they begin with
    prompt    put before every text
    truncate  how many of the vectors' first values are kept; None: all
    """

    modules: tuple[Module, ...]
    output: str
    prompt: str
    truncate: int | None


def plan(checkpoint: Checkpoint, options: ModelOptions, dtype: str) -> EmbeddingPlan:
    """What the directory's files say. Raises ConfigError."""
    if options.pooling is not None:
        raise ConfigError(
            f"--pooling {options.pooling}: {checkpoint.id} is a sentence-transformers directory, "
            "which says itself how it pools; leave --pooling out"
        )
    transformer, *rest = _read_modules(checkpoint)
    checkpoint = _with_folders(checkpoint, transformer, rest)
    outputs = _outputs(checkpoint, transformer)
    settings = checkpoint.json("config_sentence_transformers.json", folder=checkpoint.root)
    truncate = settings.get("truncate_dim")
    normalize = options.normalize
    if rest and rest[-1].kind == "Normalize" and (truncate is None or normalize is not None):
        normalize = True if normalize is None else normalize
        rest = rest[:-1]
    options = replace(options, normalize=bool(normalize))
    text = TextSpec(
        _max_length(checkpoint, transformer),
        prefix=_prompt(checkpoint, settings),
        lower_case=bool(transformer.settings.get("do_lower_case")),
    )
    if outputs.keys() != {"text"}:
        return _dual_plan(checkpoint, options, dtype, text, rest)
    if not available(checkpoint, "text"):
        raise ConfigError(f"-m {checkpoint.id}: it has no tokenizer, so nothing tells how it takes text")
    pipeline = Pipeline(tuple(rest), outputs["text"], text.prefix, truncate)
    inputs = Inputs(text=text)
    return EmbeddingPlan(
        checkpoint=checkpoint,
        family=FAMILY,
        loader="mmcli.models.sentence:load",
        detail=pipeline,
        inputs=inputs,
        embedding_size=_size(checkpoint, pipeline),
        decode=DecodeOptions(modalities=inputs.modalities),
        pooling="+".join(m for step in rest if step.kind == "Pooling" for m in _modes(step)) or None,
        normalize=options.normalize or False,
        activation="softmax",
        dtype=dtype,
        device=options.device,
        attn_implementation=options.attn_implementation,
        compile=options.compile,
    )


def _dual_plan(
    checkpoint: Checkpoint, options: ModelOptions, dtype: str, text: TextSpec, rest: list[Module]
) -> EmbeddingPlan:
    """A CLIP-like model: a dual encoder whose texts are cut and padded as this library does."""
    if rest:
        raise ConfigError(f"-m {checkpoint.id}: {rest[0].kind} after a model of text and images is not supported")
    kind = checkpoint.config.model_type
    row = dual_encoder.DUAL_ENCODERS.get(kind)
    if row is None:
        raise ConfigError(f"-m {checkpoint.id}: a {kind} in a sentence-transformers directory is not supported")
    made = dual_encoder.plan(checkpoint, options, dtype, row)
    return replace(made, inputs=replace(made.inputs, text=text))


def _read_modules(checkpoint: Checkpoint) -> list[Module]:
    """modules.json with each module's settings. Raises ConfigError for what is not known."""
    path = checkpoint.directory / "modules.json"
    try:
        entries = [(str(e["type"]), str(e["path"])) for e in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"-m {checkpoint.id}: modules.json cannot be read: {one_line(str(error))}") from error
    modules = []
    for name, folder in entries:
        kind = name.rpartition(".")[2]
        if not name.startswith("sentence_transformers.") or kind not in MODULES:
            raise ConfigError(
                f"-m {checkpoint.id}: its module {name} is not supported; supported are {', '.join(MODULES)}"
            )
        if PurePosixPath(folder).is_absolute() or ".." in PurePosixPath(folder).parts:
            raise ConfigError(f"-m {checkpoint.id}: modules.json points out of the directory: {folder}")
        modules.append(Module(kind, folder, _settings(checkpoint, kind, folder)))
    if not modules or modules[0].kind not in ("Transformer", "CLIPModel"):
        raise ConfigError(f"-m {checkpoint.id}: modules.json does not begin with a Transformer or CLIPModel")
    for module in modules[1:]:
        _check_module(checkpoint, module)
    return modules


def _settings(checkpoint: Checkpoint, kind: str, folder: str) -> dict[str, Any]:
    names = _TRANSFORMER_SETTINGS if kind in ("Transformer", "CLIPModel") else ("config.json",)
    found = (checkpoint.json(str(PurePosixPath(folder, name))) for name in names)
    return next(filter(None, found), {})


def _check_module(checkpoint: Checkpoint, module: Module) -> None:
    """Raise ConfigError for settings that are not supported."""
    settings = module.settings
    where = f"-m {checkpoint.id}: {module.folder or module.kind}"
    if module.kind in ("Transformer", "CLIPModel"):
        raise ConfigError(f"{where}: a second {module.kind} is not supported")
    if module.kind == "Pooling" and (unknown := [m for m in _modes(module) if m not in POOLINGS]):
        raise ConfigError(f"{where}: pooling {unknown[0]!r} is not one of {', '.join(POOLINGS)}")
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding", "token_embeddings"):
            raise ConfigError(f"{where}: {key} {settings[key]!r} is not supported")
    needed = {"Pooling": (), "Dense": ("in_features", "out_features"), "LayerNorm": ("dimension",)}
    for key in needed.get(module.kind, ()):
        if not isinstance(settings.get(key), int):
            raise ConfigError(f"{where}: its config.json has no {key}")
    if module.kind == "Dense":
        _activation(where, settings)


def _activation(where: str, settings: dict[str, Any]) -> Any:
    """The torch module that `activation_function` names. Raises ConfigError."""
    from torch import nn

    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    found = getattr(nn, name.rpartition(".")[2], None)
    if not name.startswith("torch.nn.") or not isinstance(found, type) or not issubclass(found, nn.Module):
        raise ConfigError(f"{where}: activation_function {name!r} is not supported")
    return found()


def _with_folders(checkpoint: Checkpoint, transformer: Module, rest: list[Module]) -> Checkpoint:
    """The checkpoint whose `directory` is the transformer's, and which knows the folders of the other modules."""
    root = checkpoint.directory
    folders: dict[Path, None] = dict.fromkeys([root, *(root / m.folder for m in (transformer, *rest))])
    found = replace(checkpoint, directory=root / transformer.folder, folders=tuple(folders))
    check_files(found)
    return found


def _outputs(checkpoint: Checkpoint, transformer: Module) -> dict[str, str]:
    """Modality -> which of the transformer's outputs stands for it. Raises ConfigError."""
    settings = transformer.settings
    where = f"-m {checkpoint.id}: its {transformer.kind}"
    for key in _UNKNOWN_SETTINGS:
        if settings.get(key):
            raise ConfigError(f"{where} has the setting {key}, which is not supported: {settings[key]}")
    task = settings.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise ConfigError(f"{where} is for {task}, which gives no vectors")
    calls = settings.get("modality_config") or (_CLIP if transformer.kind == "CLIPModel" else _TEXT_ONLY)
    methods = {modality: call["method"] for modality, call in calls.items()}
    outputs = {modality: call["method_output_name"] for modality, call in calls.items()}
    if methods == {"text": "forward"} and outputs["text"] in ("last_hidden_state", "pooler_output"):
        return outputs
    if methods == {m: f"get_{m}_features" for m in methods} and methods.keys() == {"text", "image"}:
        return outputs
    raise ConfigError(f"{where} is called in a way that is not supported: {json.dumps(calls)}")


def _max_length(checkpoint: Checkpoint, transformer: Module) -> int | None:
    """Where texts are cut: `max_seq_length` before what the tokenizer says, and never past the positions."""
    config = checkpoint.config
    tokenizer = transformer.settings.get("tokenizer_args") or transformer.settings.get("processor_kwargs") or {}
    stated = tokenizer.get("model_max_length") or transformer.settings.get("max_seq_length")
    text_config = config.get_text_config() if transformer.kind == "CLIPModel" else config
    if stated is None:
        return max_tokens(checkpoint, text_config)
    if getattr(text_config, "rope_parameters", None):
        # Rotary positions have no end.
        return int(stated)
    return min(filter(None, (int(stated), max_positions(text_config))))


def _prompt(checkpoint: Checkpoint, settings: dict[str, Any]) -> str:
    name = settings.get("default_prompt_name")
    prompts = settings.get("prompts") or {}
    if name is not None and name not in prompts:
        raise ConfigError(f"-m {checkpoint.id}: default_prompt_name {name!r} is not among its prompts")
    return str(prompts.get(name) or "")


def _modes(pooling: Module) -> tuple[str, ...]:
    """The poolings whose vectors are joined."""
    settings = pooling.settings
    mode = settings.get("pooling_mode")
    if mode is None:
        return tuple(name for flag, name in _POOLING_FLAGS.items() if settings.get(flag)) or ("mean",)
    return (mode,) if isinstance(mode, str) else tuple(mode)


def _size(checkpoint: Checkpoint, pipeline: Pipeline) -> int:
    """D of the vectors, from the settings alone. Raises ConfigError when no module makes one vector per text."""
    tokens = vector = int(checkpoint.config.get_text_config().hidden_size)
    pooled = pipeline.output == "pooler_output"
    for module in pipeline.modules:
        if module.kind == "Pooling":
            pooled, vector = True, tokens * len(_modes(module))
        elif module.kind == "Dense" and _output_name(module) == "sentence_embedding":
            vector = int(module.settings["out_features"])
        elif module.kind == "Dense":
            tokens = int(module.settings["out_features"])
    if not pooled:
        raise ConfigError(f"-m {checkpoint.id}: modules.json has no Pooling, so there is no vector per text")
    return min(filter(None, (vector, pipeline.truncate)))


def _input_name(module: Module) -> str:
    return str(module.settings.get("module_input_name") or "sentence_embedding")


def _output_name(module: Module) -> str:
    return str(module.settings.get("module_output_name") or _input_name(module))


def load(plan: EmbeddingPlan, device: torch.device) -> Loaded:
    """The tower of texts: the transformer, then its modules."""
    import transformers

    from mmcli.models.head import Similarity
    from mmcli.models.runner import Loaded, load_model

    pipeline: Pipeline = plan.detail
    name = _ENCODER_CLASSES.get(plan.checkpoint.config.model_type, "AutoModel")
    needs_pooler = pipeline.output == "pooler_output"
    model = load_model(getattr(transformers, name), plan, device, unused=() if needs_pooler else ("pooler.",))
    accepted = set(inspect.signature(model.forward).parameters)
    start = "sentence_embedding" if needs_pooler else "token_embeddings"
    steps = [_step(plan, module, device) for module in pipeline.modules]

    def tower(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        output = model(**{name: tensor for name, tensor in inputs.items() if name in accepted})
        features: Features = {start: output[pipeline.output], "mask": inputs["attention_mask"]}
        for step in steps:
            step(features)
        return features["sentence_embedding"][:, : pipeline.truncate]

    return Loaded({"text": tower}, Similarity(SCALE))


def _step(plan: EmbeddingPlan, module: Module, device: torch.device) -> Step:
    """What a module does to the features. Raises ModelError when its weights are missing."""
    import torch

    match module.kind:
        case "Pooling":
            return _pooling_step(plan, module)
        case "Dense":
            return _dense_step(plan, module, device)
        case "LayerNorm":
            weight, bias = _weights(plan, module, ("norm.weight", "norm.bias"), device)

            def layer_norm(features: Features) -> None:
                vectors = features["sentence_embedding"]
                features["sentence_embedding"] = torch.nn.functional.layer_norm(vectors, weight.shape, weight, bias)

            return layer_norm
        case "Normalize":

            def normalize(features: Features) -> None:
                vectors = features[_input_name(module)]
                features[_output_name(module)] = torch.nn.functional.normalize(vectors, dim=-1)

            return normalize
    # Dropout does nothing outside of training.
    return lambda features: None


def _pooling_step(plan: EmbeddingPlan, module: Module) -> Step:
    modes = _modes(module)
    skip = 0 if module.settings.get("include_prompt", True) else _prompt_tokens(plan)

    def pooling(features: Features) -> None:
        features["sentence_embedding"] = pool(features["token_embeddings"], features["mask"], modes, skip)

    return pooling


def _dense_step(plan: EmbeddingPlan, module: Module, device: torch.device) -> Step:
    """activation(W x + b), plus x (or R x where the sizes differ) when it is residual."""
    import torch

    settings = module.settings
    activation = _activation(module.folder, settings)
    has_bias = settings.get("bias", True)
    is_residual = bool(settings.get("use_residual"))
    has_residual_weight = is_residual and settings["in_features"] != settings["out_features"]
    names = ["linear.weight"] + ["linear.bias"] * has_bias + ["residual.weight"] * has_residual_weight
    weights = dict(zip(names, _weights(plan, module, names, device), strict=True))

    def dense(features: Features) -> None:
        vectors = features[_input_name(module)]
        out = activation(torch.nn.functional.linear(vectors, weights["linear.weight"], weights.get("linear.bias")))
        if is_residual:
            residual = weights.get("residual.weight")
            out = out + (vectors if residual is None else torch.nn.functional.linear(vectors, residual))
        features[_output_name(module)] = out

    return dense


def _weights(
    plan: EmbeddingPlan, module: Module, names: list[str] | tuple[str, ...], device: torch.device
) -> list[torch.Tensor]:
    """Tensors of a module by name, in the plan's dtype. Raises ModelError."""
    import torch
    from safetensors.torch import load_file

    checkpoint = plan.checkpoint
    folder = checkpoint.root / module.folder
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if safe.is_file():
        found = load_file(safe)
    elif pickled.is_file() and checkpoint.allow_pickle:
        found = torch.load(pickled, map_location="cpu", weights_only=True)
    else:
        hint = "add --allow-pickle if you trust pytorch_model.bin" if pickled.is_file() else None
        raise ModelError(f"-m {checkpoint.id}: {module.folder} has no model.safetensors", hint=hint)
    if missing := [name for name in names if name not in found]:
        raise ModelError(f"-m {checkpoint.id}: {module.folder} lacks the weight {missing[0]}")
    return [found[name].to(device, getattr(torch, plan.dtype)) for name in names]


def _prompt_tokens(plan: EmbeddingPlan) -> int:
    """How many tokens the prompt is, without a special token at its end."""
    from mmcli.models.inputs import TextProcessor, open_tokenizer

    spec = plan.inputs.text
    assert spec is not None
    if not spec.prefix:
        return 0
    tokenizer = open_tokenizer(plan.checkpoint)
    tokens = TextProcessor(tokenizer, replace(spec, prefix=""))(spec.prefix).arrays["input_ids"]
    return len(tokens) - (int(tokens[-1]) in tokenizer.all_special_ids)


def pool(hidden: torch.Tensor, mask: torch.Tensor, modes: tuple[str, ...], skip: int = 0) -> torch.Tensor:
    """Token vectors [n, T, D] -> [n, D * len(modes)], over the tokens whose mask is 1 after the first `skip`.

    Sequences are padded on the right.
    """
    import torch

    mask = mask.clone()
    mask[:, :skip] = 0
    wide = torch.promote_types(hidden.dtype, torch.float32)
    counts = mask.unsqueeze(-1).to(wide)
    total = counts.sum(dim=1).clamp(min=1e-9)
    rows = torch.arange(len(hidden), device=hidden.device)
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).unsqueeze(-1)
    pooled = []
    for mode in modes:
        if mode == "cls":
            pooled.append(hidden[rows, mask.argmax(dim=1)])
        elif mode == "max":
            pooled.append(hidden.masked_fill(counts == 0, float("-inf")).amax(dim=1))
        elif mode == "mean":
            pooled.append((hidden * counts).sum(dim=1) / total)
        elif mode == "mean_sqrt_len_tokens":
            pooled.append((hidden * counts).sum(dim=1) / total.sqrt())
        elif mode == "weightedmean":
            weights = counts * places
            pooled.append((hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9))
        else:
            last = (mask * places.squeeze(-1)).argmax(dim=1)
            pooled.append((hidden * counts)[rows, last])
    return torch.cat([vectors.to(hidden.dtype) for vectors in pooled], dim=-1)
