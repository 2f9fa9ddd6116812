"""`ganglion train lm`: the shipped tiny language models again, from text of this installation. Called by `cli.train`."""

import argparse
import platform
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from ganglion.errors import FieldError
from ganglion.train.lm import LmFitConfig, LmProgress, LmResult, fit_lm
from ganglion.train.lm_card import LmFacts, write_lm_card
from ganglion.train.lm_corpus import Corpus, read_corpus
from ganglion.train.lm_evaluate import evaluate_lm
from ganglion.train.lm_model import DENSE, MOE, LmConfig
from ganglion.train.lm_ship import ship_lm

RUN_DIR = "runs/language"
CHECKPOINT = "checkpoint"  # folder beside the training state
MODELS = {"tiny-moe": MOE, "tiny-dense": DENSE}
QUICK_STEPS = 20
QUICK_CORPUS_BYTES = 1_500_000
QUICK_HELD_OUT_TOKENS = 8192


def run(args: argparse.Namespace) -> None:
    """Train, ship and measure the models that are asked for (default: both), one after the other."""
    for flag, stage in (
        ("checkpoint", "evaluate"),
        ("json", "evaluate"),
        ("episodes", "collect"),
        ("eval_episodes", "evaluate"),
    ):
        if getattr(args, flag) is not None:
            name = f"--{flag.replace('_', '-')}"
            raise FieldError(name, expected=f"with `ganglion train {stage}` only", got="with lm")
    names = tuple(
        name for name, is_asked in (("tiny-moe", args.moe), ("tiny-dense", args.dense)) if is_asked
    )
    corpus = read_corpus(max_bytes=QUICK_CORPUS_BYTES if args.quick else None)
    print(
        f"{len(corpus.train):,} bytes to train on, {corpus.num_held_out_tokens:,} held out, "
        f"corpus {corpus.sha256[:12]}"
    )
    for name in names or tuple(MODELS):
        _make(name, args, corpus)


def _make(name: str, args: argparse.Namespace, corpus: Corpus) -> None:
    config, folder = _fit_config(args), Path(args.run) / name
    with tqdm(total=args.until or config.num_steps, desc=name, unit="step") as bar:

        def on_progress(progress: LmProgress) -> None:
            bar.update(progress.step - bar.n)
            bar.set_postfix(nats_per_byte=f"{progress.loss:.3f}", balance=f"{progress.balance:.2f}")

        result = fit_lm(config, MODELS[name], corpus, folder, on_progress, until_step=args.until)
    if result.step < config.num_steps and not args.quick:
        print(f"{name}: step {result.step} of {config.num_steps}; without --until it goes on")
    target = folder / CHECKPOINT
    ship_lm(result.model, config, target)
    with tqdm(desc="held out", unit="window") as bar:

        def on_window(num_done: int, num_all: int) -> None:
            bar.total = num_all
            bar.update(num_done - bar.n)

        figures = evaluate_lm(
            result.model,
            corpus,
            max_tokens=QUICK_HELD_OUT_TOKENS if args.quick else None,
            on_progress=on_window,
        )
    write_lm_card(facts_of(name, config, result, corpus), figures, target)
    print(f"{name}: {figures.loss:.3f} nats per byte held out; ganglion serve chat={target}")


def facts_of(
    name: str, config: LmFitConfig, result: LmResult, corpus: Corpus, *, notes: str = ""
) -> LmFacts:
    """What the card says of how the model was made."""
    sizes = result.model.config
    return LmFacts(
        name=name,
        model=sizes,
        fit=config,
        step=result.step,
        train_s=result.train_s,
        num_parameters=sum(value.numel() for value in result.model.parameters()),
        num_active_parameters=_num_active(result, sizes),
        num_documents=corpus.num_documents,
        num_train_tokens=len(corpus.train),
        corpus_sha256=corpus.sha256,
        python_version=platform.python_version(),
        notes=notes,
    )


def _num_active(result: LmResult, sizes: LmConfig) -> int:
    num_all = sum(value.numel() for value in result.model.parameters())
    expert = 3 * sizes.hidden_size * sizes.intermediate_size
    return num_all - sizes.num_layers * (sizes.num_experts - sizes.num_experts_per_token) * expert


def _fit_config(args: argparse.Namespace) -> LmFitConfig:
    config = replace(LmFitConfig(), seed=args.seed)
    if args.quick:
        config = replace(config, num_steps=QUICK_STEPS, num_warmup_steps=QUICK_STEPS // 4)
    return config if args.steps is None else replace(config, num_steps=args.steps)
