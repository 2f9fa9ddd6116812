"""Hugging Face: transformers' own `generate` in this process, same weights, dtype and threads. Called by bench.

The only place, besides `bench.shapes`, that imports transformers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ganglion.clock import RealClock
from ganglion.errors import GanglionError


class HuggingFaceGenerator:
    """Eager torch with SDPA attention and a dynamic cache: transformers' defaults on a CPU."""

    name = "transformers"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        factory: Any = AutoModelForCausalLM
        self._model = factory.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._clock = RealClock()

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        ids = torch.tensor([list(prompt) for prompt in prompts])
        start_s = self._clock.now_s()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )
        took_s = self._clock.now_s() - start_s
        if out.shape[1] != ids.shape[1] + num_tokens:
            raise GanglionError(
                f"transformers made {out.shape[1] - ids.shape[1]} tokens a row, {num_tokens} were asked for"
            )
        return took_s

    def close(self) -> None:
        del self._model
