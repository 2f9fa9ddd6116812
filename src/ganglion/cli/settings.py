"""Settings: from parsed flags to the resolved config. Called by the commands that serve."""

import argparse
from pathlib import Path
from typing import Any

from ganglion.cli.commands import COMMANDS
from ganglion.config import AUTO, Resolved, load
from ganglion.errors import ConfigError
from ganglion.plan.auto import auto_values
from ganglion.plan.hardware import read_hardware

DEFAULT_FILE = Path("ganglion.toml")


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
    if getattr(args, "no_policy", False):
        if "policy.path" in flags:
            raise ConfigError(
                f"--no-policy beside the policy {flags['policy.path'][1]!r}",
                next_step="leave one of them out",
            )
        flags["policy.path"] = ("--no-policy", "")
    file = Path(args.config) if args.config else DEFAULT_FILE if DEFAULT_FILE.exists() else None
    hardware = read_hardware()
    asked = load(file=file, flags=flags, autos=auto_values(hardware)).config
    has_policy, has_chat = bool(asked.policy.path), bool(asked.chat.models)
    if not has_policy and not has_chat:
        raise ConfigError(
            "no policy and no language model: nothing to serve",
            next_step="name a language model: --chat tiny-moe, or --chat FOLDER",
        )
    autos = auto_values(hardware, has_policy=has_policy, has_chat=has_chat)
    resolved = load(file=file, flags=flags, autos=autos)
    origins = {setting.path: setting.origin for setting in resolved.settings}
    path = resolved.config.policy.path
    if ".py" in path and not origins["engine.dtype"].startswith(AUTO):
        raise ConfigError(
            f"engine.dtype from {origins['engine.dtype']} means nothing to the class in {path}",
            next_step="remove it: a policy of one's own computes in what it likes",
        )
    return resolved


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
