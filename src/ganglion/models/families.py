"""Families: which code serves a `model_type`: a native decoder, transformers' module over our pages, or none.

Called by `decoder_load` and by `plan`, before anything else is read of a folder. Imports transformers for families that
are not native, and only then.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from ganglion.models.decoder_spec import FAMILIES, unsupported


class ServedBy(StrEnum):
    """What runs a family."""

    NATIVE = "native"
    TRANSFORMERS = "transformers"


def served_by(config: Mapping[str, Any], *, source: str) -> ServedBy:
    """Of a config.json. Raises CheckpointError where nothing does: it names the family, the nearest and the next step."""
    family = config.get("model_type")
    if family in FAMILIES:
        return ServedBy.NATIVE
    try:
        from ganglion.models.hf.load import knows
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "ganglion":
            raise
        raise unsupported(
            source,
            config,
            next_step="pip install 'ganglion[hf]' runs families of transformers too; or serve a "
            f"model of one of: {', '.join(FAMILIES)}",
        ) from error
    if not knows(family):
        raise unsupported(
            source,
            config,
            next_step="the installed transformers has no causal decoder of it either; serve a model "
            f"of one of its families, or of: {', '.join(FAMILIES)}",
        )
    return ServedBy.TRANSFORMERS
