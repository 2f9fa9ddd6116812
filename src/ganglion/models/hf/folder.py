"""Folders of families without a native decoder: checked from headers, mapped, given to `hf.load`.

Called by `decoder_load`, for each `model_type` that it does not know itself. Knows files; no module.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ganglion.errors import CheckpointError
from ganglion.models.decoder_load import (
    Header,
    Progress,
    TensorReader,
    folder_version,
    generation_eos,
)
from ganglion.models.hf.load import load_module_language, outline_module_language
from ganglion.models.language import LanguageModel
from ganglion.models.weights import read_header
from ganglion.plan.headers import CONFIG_FILE, read_config, weight_files

_STORED = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")  # numbers as they are


def load_folder(
    folder: Path,
    *,
    dtype: torch.dtype,
    name: str,
    max_page_bytes: int,
    on_progress: Progress | None = None,
) -> LanguageModel:
    """As `decoder_load.load_language`."""
    config = _checked_config(folder)
    headers = _headers(folder)
    places = {tensor: path for path, header in headers.items() for tensor in header}
    reader = TensorReader(places, headers, on_progress)
    weights = {tensor: reader.read(tensor) for tensor in places}
    model = load_module_language(
        config,
        weights,
        source=str(folder),
        dtype=dtype,
        name=name,
        version=folder_version(folder, tuple(headers)),
        eos_ids=generation_eos(folder),
        max_page_bytes=max_page_bytes,
    )
    reader.report()
    return model


def outline_folder(
    folder: Path, *, dtype: torch.dtype, name: str, max_page_bytes: int
) -> LanguageModel:
    """As `decoder_load.outline_language`: for its `spec` and `groups`, never to be run."""
    config = _checked_config(folder)
    return outline_module_language(
        config,
        source=str(folder),
        dtype=dtype,
        name=name,
        version=folder_version(folder, tuple(_headers(folder))),
        eos_ids=generation_eos(folder),
        max_page_bytes=max_page_bytes,
    )


def _checked_config(folder: Path) -> Mapping[str, Any]:
    config = read_config(folder)
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: quantization_config: expected none for a {config['model_type']}, "
            "got quantised weights",
            next_step="use the folder with the unquantised weights (bfloat16 or float32)",
        )
    return config


def _headers(folder: Path) -> dict[Path, Header]:
    headers: dict[Path, Header] = {path: read_header(path) for path in weight_files(folder)}
    for path, header in headers.items():
        for tensor, (stored, _) in header.items():
            if stored not in _STORED:
                raise CheckpointError(
                    f"{path}: {tensor}: dtype expected one of {', '.join(_STORED)}, got {stored}"
                )
    return headers
