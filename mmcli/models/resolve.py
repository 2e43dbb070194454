"""-m MODEL -> a plan: which family calls this checkpoint, before any weight is loaded."""

from __future__ import annotations

import os

from mmcli.core.errors import ConfigError
from mmcli.core.protocols import EmbeddingModelPlan, WriterPlan
from mmcli.models.options import Generation, ModelOptions


def resolve(options: ModelOptions) -> EmbeddingModelPlan:
    """The plan of a model for vectors. Raises ConfigError for what is no model, or none that gives vectors."""
    from mmcli.models import endpoint
    from mmcli.models.fake import PREFIX, resolve_fake

    if options.model.startswith(PREFIX):
        return resolve_fake(options)
    if options.model.startswith(endpoint.PREFIX):
        raise ConfigError(f"-m {options.model}: a server gives captions and answers: mmcli caption, mmcli ask")
    from mmcli.models.families import plan_checkpoint

    return plan_checkpoint(options)


def resolve_writer(options: ModelOptions, generation: Generation) -> WriterPlan:
    """The plan of a model for captions or answers. Raises ConfigError for what is no model, or none that writes."""
    from mmcli.models import endpoint
    from mmcli.models.fake import PREFIX, resolve_fake_writer

    if options.model.startswith(PREFIX):
        return resolve_fake_writer(options, generation)
    if options.model.startswith(endpoint.PREFIX):
        return endpoint.resolve_endpoint(options, generation)
    from mmcli.models.families import plan_writer

    return plan_writer(options, generation)


def processor_imports(model: str) -> tuple[str, ...]:
    """Modules that the processor of `-m model` will need, as far as its name and files tell (see Nursery).

    None without a model: inputs are vectors.
    """
    from mmcli.models import endpoint
    from mmcli.models.fake import PREFIX

    if not model or model.startswith((PREFIX, endpoint.PREFIX)) or os.path.isfile(model):
        return ()
    names = ("torch", "transformers.models.auto.tokenization_auto")
    settings = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    if os.path.isdir(model) and not any(os.path.isfile(os.path.join(model, name)) for name in settings):
        return names
    return (*names, "transformers.image_processing_backends")
