"""Card: the README.md of a language model's folder, from measured results. Called by the CLI. Knows no tensors."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ganglion.train.lm import LmFitConfig
from ganglion.train.lm_evaluate import PROMPT, LmFigures
from ganglion.train.lm_model import LmConfig

CARD_FILE = "README.md"
RESULTS_FILE = "evaluation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LmFacts:
    """How a model came about."""

    name: str
    model: LmConfig
    fit: LmFitConfig
    step: int
    train_s: float
    num_parameters: int
    num_active_parameters: int  # that one token meets
    num_documents: int
    num_train_tokens: int
    corpus_sha256: str
    python_version: str
    notes: str = ""  # what this run did differently, or where


def write_lm_card(facts: LmFacts, figures: LmFigures, folder: Path) -> None:
    """Write CARD_FILE and, as numbers, RESULTS_FILE."""
    content = json.dumps({"facts": asdict(facts), "figures": asdict(figures)}, indent=1)
    (folder / RESULTS_FILE).write_text(content + "\n", encoding="utf-8")
    (folder / CARD_FILE).write_text(_card(facts, figures), encoding="utf-8")


def _card(facts: LmFacts, figures: LmFigures) -> str:
    model = facts.model
    shape = (
        f"{model.num_experts} experts of {model.intermediate_size} in each layer, "
        f"{model.num_experts_per_token} a token"
        if model.is_moe
        else f"a feed-forward of {model.intermediate_size}"
    )
    family = "Qwen3-MoE" if model.is_moe else "Qwen3"
    flag = "--moe" if model.is_moe else "--dense"
    return f"""# {facts.name}

A byte-level language model of {facts.num_parameters / 1e6:.2f} M parameters ({facts.num_active_parameters / 1e6:.2f} M met by one \
token) in the shape of {family}: {model.num_layers} layers
of width {model.hidden_size}, {model.num_heads} query and {model.num_kv_heads} key heads of {model.head_dim}, {shape}; at most
{model.max_tokens:,} tokens. Any loader of that family reads this folder. Tokens 0 to 255 are bytes, 256 ends a text.

It is here so that routers, caches and schedules can be tried on weights that were really trained. It knows the look of
Python and of its documentation; it knows nothing else, follows no instruction, and was never taught to chat.

## Held-out loss
Nats per byte on documents that training never saw, windows of {figures.length:,} bytes, weights as shipped (bfloat16) computed with in
float32. A module and its docstrings are on one side of the split.

| kind | bytes | nats per byte |
|---|---|---|
{_kinds(figures)}
| **all** | {sum(figures.num_tokens_by_kind.values()):,} | **{figures.loss:.3f}** |

By place in the window: {_positions(figures)}.

`{PROMPT}` goes on greedily with:
```
{figures.continuation.rstrip()}
```
{_routers(figures)}
## Recipe
`ganglion train lm {flag}`: {facts.step:,} steps of {facts.fit.tokens_per_step:,} bytes (rows of {facts.fit.length}; in one step of \
{facts.fit.num_steps_per_long} rows of {facts.fit.long_length}), Muon
(rate {facts.fit.matrix_learning_rate:g}) for projections and experts, AdamW ({facts.fit.learning_rate:g}) for the rest, both falling \
linearly; float32 weights computed with in
bfloat16, seed {facts.fit.seed}\
{f", load-balancing loss x {facts.fit.balance_weight:g}" if model.is_moe else ""}.
{facts.train_s / 60:.1f} minutes on {facts.fit.num_threads} thread. {facts.notes}

Data: {facts.num_train_tokens:,} bytes to train on, {facts.num_documents:,} documents in all, found in a Python {facts.python_version} \
installation: modules of the
standard library and their docstrings, pydoc's topics, licences of installed packages (trained on only: they are near copies
of each other). Another installation gives another corpus; this one has sha256 `{facts.corpus_sha256[:16]}`.

## Limits
Text is plausible in look only. Do not use it for anything but testing.
"""


def _kinds(figures: LmFigures) -> str:
    rows = [
        f"| {kind} | {figures.num_tokens_by_kind[kind]:,} | {loss:.3f} |"
        for kind, loss in figures.loss_by_kind.items()
    ]
    return "\n".join(rows)


def _positions(figures: LmFigures) -> str:
    return ", ".join(f"{places} {loss:.3f}" for places, loss in figures.loss_by_position.items())


def _routers(figures: LmFigures) -> str:
    if not figures.routers:
        return ""
    rows = [
        f"| {layer} | {router.hottest_quarter_share:.2f} | {router.reuse_share:.2f} "
        f"| {router.peak_load:.2f} |"
        for layer, router in enumerate(figures.routers)
    ]
    chance = figures.routers[0].chance_reuse_share
    return f"""
## Routers
On the held-out text. Chance would be 0.25 for the hottest quarter and {chance:.3f} for reuse.

| layer | share of the hottest quarter of experts | experts reused from the token before | busiest expert / mean |
|---|---|---|---|
{chr(10).join(rows)}
"""
