"""Settings: from parsed flags to the resolved config. Called by the commands that serve."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ganglion.cli.commands import COMMANDS
from ganglion.config import AUTO, Resolved, load
from ganglion.errors import ConfigError
from ganglion.plan.auto import auto_values
from ganglion.plan.hardware import read_hardware

DEFAULT_FILE = Path("ganglion.toml")
SERVED_KEYS = ("policy", "chat")


def resolve(args: argparse.Namespace) -> Resolved:
    """Defaults, auto values of this machine, the config file, the flags of `args`: resolved once."""
    flags: dict[str, tuple[str, Any]] = {}
    for flag in COMMANDS[args.command].flags():
        value = getattr(args, flag.dest, None)
        if flag.path and value is not None:
            flags[flag.path] = (flag.name, value)
    key = read_key(getattr(args, "api_key_file", None))
    if key is not None:
        flags["serve.api_key"] = ("--api-key-file", key)
    flags |= read_served(getattr(args, "served", None) or ())
    file = Path(args.config) if args.config else DEFAULT_FILE if DEFAULT_FILE.exists() else None
    hardware = read_hardware()
    asked = load(file=file, flags=flags, autos=auto_values(hardware)).config
    has_policy, has_chat = bool(asked.policy.path), bool(asked.chat.models)
    if not has_policy and not has_chat:
        raise ConfigError(
            "no policy and no language model: nothing to serve",
            next_step="name a policy or a language model: policy=metaworld-ten, chat=tiny-moe",
        )
    autos = auto_values(
        hardware,
        has_policy=has_policy,
        has_chat=has_chat,
        budget_bytes=asked.memory.budget_bytes,
    )
    resolved = load(file=file, flags=flags, autos=autos)
    origins = {setting.path: setting.origin for setting in resolved.settings}
    path = resolved.config.policy.path
    if ".py" in path and not origins["engine.dtype"].startswith(AUTO):
        raise ConfigError(
            f"engine.dtype from {origins['engine.dtype']} means nothing to the class in {path}",
            next_step="remove it: a policy of one's own computes in what it likes",
        )
    return resolved


def read_served(words: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Config path -> (origin, value) of `policy=...` and `chat=...`; none: nothing is said about either.

    What is named is all that is served, whatever the config file names. Raises ConfigError for any other word.
    """
    if not words:
        return {}
    policies: list[str] = []
    chats: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in SERVED_KEYS:
            nearest = word if equals else f"={word}"
            raise ConfigError(
                f"{word!r} says not what it is: expected {' or '.join(f'{k}=...' for k in SERVED_KEYS)}",
                next_step=f"write policy{nearest} or chat{nearest}"
                if not equals
                else "name one of these keys",
            )
        (policies if key == "policy" else chats).append(value)
    if len(policies) > 1:
        raise ConfigError(
            f"{len(policies)} policies: {', '.join(policies)}; a server has one",
            next_step="start one server for each, on ports of their own",
        )
    return {
        "policy.path": ("policy=", policies[0]) if policies else ("none is named", ""),
        "chat.models": ("chat=", tuple(chats)) if chats else ("none is named", ()),
    }


def gathered(argv: Sequence[str]) -> list[str]:
    """The same line with `policy=...` and `chat=...` side by side: the parser takes them from one place only."""
    keys = tuple(f"{key}=" for key in SERVED_KEYS)
    named = [word for word in argv[1:] if word.startswith(keys)]
    return [*argv[:1], *named, *(word for word in argv[1:] if not word.startswith(keys))]


def read_key(file: str | None) -> str | None:
    """The API key in `file`, without white space around it."""
    if file is None:
        return None
    try:
        key = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--api-key-file {file}: {error}", next_step="name a readable file"
        ) from error
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"--api-key-file {file}: holds {len(key)} characters, not one line of printable ASCII",
            next_step="write one key into it: openssl rand -hex 32",
        )
    return key
