"""-m MODEL -> a plan: which family calls this checkpoint, before any weight is loaded."""

from __future__ import annotations

from mmcli.core.protocols import ModelPlan
from mmcli.models.options import ModelOptions


def resolve(options: ModelOptions) -> ModelPlan:
    """The plan of a model. Raises ConfigError for what is no model, or none that gives vectors."""
    from mmcli.models.fake import PREFIX, resolve_fake

    if options.model.startswith(PREFIX):
        return resolve_fake(options)
    from mmcli.models.families import plan_checkpoint

    return plan_checkpoint(options)
