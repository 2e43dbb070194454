"""An adapter's weights, added to those of its base: what runs is a plain model, as if it had been saved merged."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from mmcli.core.errors import ConfigError, ModelError, one_line
from mmcli.core.records import Modality
from mmcli.models.adapters import PREFIX, Adapter
from mmcli.models.checkpoint import Checkpoint

# peft's own, of layers that it replaces and of those that are kept whole.
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")


def load_adapted(
    checkpoint: Checkpoint, adapter: Adapter, model_class: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """As `Checkpoint.load`: what the adapter has whole (heads, logit scales) is not missing in the base.

    Merged in float32 whatever the dtype. Raises ModelError for an adapter that does not fit.
    """
    dtype = options.get("dtype", torch.float32)
    model, info = _load_base(checkpoint, adapter, model_class, {**options, "dtype": torch.float32})
    given = merge(model, adapter, bool(options.get("ignore_mismatched_sizes")))
    info["missing_keys"] = {key for key in info["missing_keys"] if key not in given}
    left = [key for key in info["mismatched_keys"] if (key if isinstance(key, str) else key[0]) not in given]
    info["mismatched_keys"] = left
    if left and not options.get("ignore_mismatched_sizes"):
        raise _misfit(adapter, f"{left[0] if isinstance(left[0], str) else left[0][0]} has another shape")
    if dtype == torch.float32:
        return model, info
    # Some weights and all tables that are computed keep float32: as they do in a model that is loaded so.
    low, _ = _load_base(checkpoint, adapter, model_class, {**options, "dtype": dtype})
    if (words := _words(model)) is not None:
        _add_words(low, len(words))
    if _is_tied(low) and not _is_tied(model):
        _untie(low)
    low.load_state_dict(model.state_dict())
    return low, info


def _load_base(
    checkpoint: Checkpoint, adapter: Adapter, model_class: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Shaped as the adapter has it, with the base's weights."""
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    verbosity = get_verbosity()
    # It warns of heads that the base lacks.
    set_verbosity_error()
    try:
        if "" in adapter.bases:
            options = {**options, "ignore_mismatched_sizes": True}
            model, info = model_class.from_pretrained(checkpoint.directory, **options)
            return model, info
        return _load_joined(checkpoint, adapter, options)
    finally:
        set_verbosity(verbosity)


def _load_joined(checkpoint: Checkpoint, adapter: Adapter, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Encoders of several bases; all else is random, and the adapter's to give."""
    from transformers import VisionTextDualEncoderModel

    from mmcli.models.fusion import MultimodalTransformer, open_encoder
    from mmcli.models.joined import MultimodalDualEncoder

    classes = {
        one.__name__: one for one in (MultimodalTransformer, MultimodalDualEncoder, VisionTextDualEncoderModel)
    }
    attention, bases = options.get("attn_implementation"), dict(adapter.bases)
    made: dict[str, Any] = {
        name: open_encoder(base, cast(Modality, name), attn_implementation=attention)[0]
        for name, base in bases.items()
    }
    model_class: Any = classes[checkpoint.json("config.json")["architectures"][0]]
    config = model_class.config_class.from_pretrained(checkpoint.directory)
    if model_class is VisionTextDualEncoderModel:
        model = model_class(config, made["image"], made["text"])
    else:
        model = model_class(config, made)
    encoders = {id(parameter) for encoder in made.values() for parameter in encoder.parameters()}
    new = {name for name, parameter in model.named_parameters() if id(parameter) not in encoders}
    return model.to(options["dtype"]), {"missing_keys": new, "mismatched_keys": []}


# ----------------------------------------------------------------------------------------------- merging


def merge(model: Any, adapter: Adapter, reshaped: bool = False) -> set[str]:
    """Add an adapter to a model's weights, in place; names of weights that it has whole.

    reshaped  the model may have a head of another size, which stays as it is
    Raises ModelError for an adapter that is not of this model.
    """
    import peft
    from peft.utils import load_peft_weights

    with warnings.catch_warnings():
        # Of settings that a newer or older peft knows.
        warnings.simplefilter("ignore")
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter.directory))
            tensors = load_peft_weights(str(adapter.directory), device="cpu")
        except Exception as error:
            raise ModelError(f"-m {adapter.id}: cannot load it: {one_line(str(error))}") from error
        file = _sorted(model, config, tensors, adapter)
        own = next((name for name, p in model.named_parameters() if p is _words(model)), None)
        if own in file.whole:
            _add_words(model, len(file.whole[own]))
        _set_whole(model, file.whole, adapter, reshaped)
        if file.added:
            _add(model, config, file, adapter)
    return set(file.whole)


@dataclass(slots=True)
class _File:
    """What an adapter's file holds, by the model's names.

    whole   tensors that take the place of the model's
    added   those of the adapter itself
    layers  that it changes
    rename  the file's names of layers -> the model's
    """

    whole: dict[str, torch.Tensor]
    added: dict[str, torch.Tensor]
    layers: set[str]
    rename: dict[str, str]


def _sorted(model: Any, config: Any, tensors: Mapping[str, torch.Tensor], adapter: Adapter) -> _File:
    """Layers of a part that the model has not at all (a head, a decoder, another tower) are left out."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    mark = f".{PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, 'lora_')}"
    names = {name: name.removeprefix(PREFIX) for name in tensors}
    owners = {name: own.split(mark)[0] for name, own in names.items() if mark in own and own != name}
    plain = {name: _WRAPPERS.sub("", own) for name, own in names.items() if name not in owners}
    rename = _renaming(model, set(owners.values()), {name.rpartition(".")[0] for name in plain.values()})
    known, state = dict(model.named_modules()), model.state_dict()
    file = _File({}, {}, set(), rename)
    for name, tensor in tensors.items():
        if name in owners:
            layer = rename.get(owners[name])
            if layer is not None and layer in known:
                file.added[PREFIX + layer + names[name][len(owners[name]) :]] = tensor
                file.layers.add(layer)
            elif layer is not None and layer.partition(".")[0] in known:
                raise _misfit(adapter, f"it changes {owners[name]}, which that has not")
        elif (whole := _renamed(plain[name], rename)) in state:
            file.whole[whole] = tensor
        elif not name.startswith(PREFIX) or ".trainable_tokens_" in name:
            # What layers share (VeRA's matrices), and single rows of embeddings.
            file.added[name] = tensor
    if not file.added and owners:
        raise _misfit(adapter, f"it changes {next(iter(owners.values()))}, which that has not")
    return file


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    owner, _, own = name.rpartition(".")
    layer = rename.get(owner, owner)
    return f"{layer}.{own}" if layer else own


def _renaming(model: Any, layers: Collection[str], others: Collection[str]) -> dict[str, str]:
    """Names of layers in an adapter's file -> the model's, where there is something to say.

    The class that it was made for may have the encoder as a part (`vit.`), or be a part itself; transformers has
    renamed layers since, as it does when it loads weights. What fits most layers is taken; layers that are outside
    of the part (a head) are in no mapping.
    """
    known = {name for name, _ in model.named_modules()}
    best: tuple[int, dict[str, str]] = (-1, {})
    for rename in _renamings(model):
        mapping = {name: new for name in (*layers, *others) if (new := rename(name)) is not None}
        fitting = sum(mapping.get(name) in known for name in layers or others)
        if fitting > best[0]:
            best = (fitting, mapping)
    return best[1]


def _renamings(model: Any) -> Iterator[Callable[[str], str | None]]:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for named in (str, _modern(model)):
        yield named
        yield partial(_inside, prefix, named)
        yield partial(_outside, prefix, named)


def _inside(prefix: str, named: Callable[[str], str], name: str) -> str | None:
    """The name in a part alone."""
    renamed = named(name)
    return renamed.removeprefix(prefix) if renamed.startswith(prefix) else None


def _outside(prefix: str, named: Callable[[str], str], name: str) -> str:
    return prefix + named(name)


def _modern(model: Any) -> Callable[[str], str]:
    """As transformers renames the weights of older checkpoints."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    found = [one for one in get_model_conversion_mapping(model) or () if isinstance(one, WeightRenaming)]

    def named(name: str) -> str:
        renamed, _ = rename_source_key(f"{name}.weight", found, [])
        return str(renamed).removesuffix(".weight")

    return named


@torch.no_grad()
def _set_whole(model: Any, tensors: dict[str, torch.Tensor], adapter: Adapter, reshaped: bool) -> None:
    state = model.state_dict()
    for name in list(tensors):
        if state[name].shape == tensors[name].shape:
            state[name].copy_(tensors[name])
        elif reshaped:
            del tensors[name]
        else:
            shapes = f"{list(tensors[name].shape)}, not {list(state[name].shape)}"
            raise _misfit(adapter, f"its {name} has the shape {shapes}")


def _add(model: Any, config: Any, file: _File, adapter: Adapter) -> None:
    """Add what is no whole tensor: peft makes its layers, and takes them out again."""
    import peft

    config.task_type, config.inference_mode, config.modules_to_save = None, True, None
    _name_layers(config, file)
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    if _is_tied(model) and model.get_output_embeddings() in [model.get_submodule(name) for name in file.layers]:
        _untie(model)
    try:
        adapted = peft.get_peft_model(model, config)
        found = peft.set_peft_model_state_dict(adapted, file.added)
        lacking = [name for name in found.missing_keys if _is_own(name, config, file)]
        if found.unexpected_keys or lacking:
            raise _misfit(adapter, f"{(found.unexpected_keys or lacking)[0]} is in one of them alone")
        merged = adapted.merge_and_unload()
    except (NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"-m {adapter.id}: a {config.peft_type.value} adapter cannot be merged: {one_line(str(error))}"
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise _misfit(adapter, one_line(str(error), 200)) from error
    assert merged is model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learning.get(name, False))


def _is_own(name: str, config: Any, file: _File) -> bool:
    """Whether a weight is the adapter's, and no second name of one that layers share."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    shared = {own.rpartition(".")[2] for own in file.added if not own.startswith(PREFIX)}
    mark = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "lora_")
    return f".{mark}" in name and ".default" in name and not any(f".{one}." in name for one in shared)


def _name_layers(config: Any, file: _File) -> None:
    """Say which layers by their full names: patterns of the file's names may fit others, or none."""
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, name):
            setattr(config, name, None)
    if file.layers and getattr(config, "target_modules", None) is not None:
        config.target_modules = set(file.layers)
    for name in ("rank_pattern", "alpha_pattern"):
        if patterns := getattr(config, name, None):
            setattr(config, name, {file.rename.get(key, key): value for key, value in patterns.items()})


def _misfit(adapter: Adapter, why: str) -> ModelError:
    bases = ", ".join(base.id for base in adapter.bases.values())
    return ModelError(
        f"-m {adapter.id}: an adapter that does not fit its base {bases}: {why}",
        hint="--base-model DIR is another base",
    )


def _words(model: Any) -> torch.Tensor | None:
    """The vectors of tokens, [V, H]; None for a model that reads none."""
    try:
        found: torch.Tensor | None = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    return found


def _add_words(model: Any, count: int) -> None:
    """To a vocabulary, for tokens that a tokenizer has got since: an adapter has the vectors of all."""
    words = _words(model)
    if words is not None and words.ndim == 2 and len(words) != count:
        model.resize_token_embeddings(count, mean_resizing=False)


def _is_tied(model: Any) -> bool:
    """Whether the layer that gives words shares the weights of the one that reads them."""
    try:
        given = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return False
    return given is not None and _words(model) is getattr(given, "weight", 0)


def _untie(model: Any) -> None:
    layer = model.get_output_embeddings()
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
    model.config.tie_word_embeddings = False
