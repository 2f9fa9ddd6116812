"""The command line is frozen here: a new flag needs a line below, and a reason."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ganglion.bench.report import BENCHES
from ganglion.cli import docs
from ganglion.cli.commands import COMMANDS
from ganglion.cli.main import EXTRAS, build_parser, main, missing_dependency
from ganglion.cli.settings import gathered, read_key, resolve
from ganglion.config import paths
from ganglion.errors import ConfigError

SETTINGS = ["--config", "--explain", "--log-level"]
FROZEN = {
    "demo": [
        *("--arms", "--rate", "--tasks", "--world", "--execution", "--seed"),
        *("--seconds", "--headless", "--no-browser", "--json"),
        *("--policy", "--flow-steps", "--port", "--dtype"),
        *("--degree", "--context", "--warm-start", "--ladder"),
        *SETTINGS,
    ],
    "serve": [
        *("SERVED", "--adapter", "--flow-steps", "--dtype"),
        *("--host", "--port", "--api-key-file", "--allow-host"),
        *("--deadline-ms", "--max-sessions", "--memory", "--arena-bytes"),
        *("--degree", "--context", "--warm-start", "--ladder"),
        *SETTINGS,
    ],
    "run": [
        *("--world", "--episodes", "--rate", "--seed", "--prompt", "--execution"),
        *("--url", "--api-key-file"),
        *("--json", "--log-level"),
    ],
    "train": [
        *("STAGE", "--moe", "--dense", "--quick"),
        *("--data", "--run", "--checkpoint", "--json"),
        *("--episodes", "--steps", "--until", "--eval-episodes", "--workers", "--seed"),
        "--log-level",
    ],
    "plan": [
        *("MODEL", "--context", "--rows", "--dtype", "--arena-bytes", "--measure", "--json"),
        *SETTINGS,
    ],
    "doctor": ["--json"],
    "bench": ["WHAT", "--quick", "--seed", "--out", "--log-level"],
}
ROOT = Path(__file__).parents[2]


def test_every_flag_is_frozen() -> None:
    assert {name: [flag.name for flag in c.flags()] for name, c in COMMANDS.items()} == FROZEN


def test_no_command_has_more_than_25_flags_and_each_has_help() -> None:
    for command in COMMANDS.values():
        assert len(command.flags()) <= 25
        assert command.examples
        assert all(example.startswith("ganglion ") for example in command.examples)
        assert all(flag.help for flag in command.flags())
        dests = [flag.dest for flag in command.flags()]
        assert len(set(dests)) == len(dests)


def test_flags_set_paths_that_exist() -> None:
    used = {flag.path for command in COMMANDS.values() for flag in command.flags() if flag.path}
    assert used <= set(paths())


def test_the_examples_parse() -> None:
    for command in COMMANDS.values():
        for example in command.examples:
            build_parser().parse_args(example.split()[1:])


def test_abbreviations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["demo", "--head"])
    assert caught.value.code == 2
    assert "--head" in capsys.readouterr().err


def test_help_gives_examples_before_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    text = capsys.readouterr().out
    assert text.index("examples:") < text.index("--port")
    for title in ("models:", "network:", "limits:", "settings:"):
        assert title in text


def test_flags_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ganglion.toml").write_text("[serve]\nport = 9000\n[engine]\nmax_sessions = 7\n")
    (tmp_path / "key").write_text("abc\n")
    line = [
        "serve",
        "policy=here.py:Mine",
        "--port",
        "0",
        "--api-key-file",
        "key",
        "--allow-host",
        "box",
    ]
    resolved = resolve(build_parser().parse_args([*line, "--arena-bytes", "64 MiB"]))
    config = resolved.config
    assert (config.serve.port, config.engine.max_sessions) == (0, 7)
    assert config.policy.path == "here.py:Mine"
    assert config.serve.allowed_hosts == ("box",)
    assert config.serve.api_key == "abc"
    assert config.memory.arena_bytes == 64 * 1024 * 1024
    assert "serve.port = 0  (--port)" in resolved.explain()
    assert "engine.max_sessions = 7  (ganglion.toml)" in resolved.explain()
    assert re.search(r"engine\.lanes = .*\(auto: ", resolved.explain())


def test_a_setting_that_a_policy_would_ignore_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["serve", "policy=mine.py:Mine", "--dtype", "float32"]
    with pytest.raises(ConfigError, match=r"engine\.dtype from --dtype means nothing"):
        resolve(build_parser().parse_args(line))


@pytest.mark.parametrize("text", ["", "two words", "line\nline", "schlüssel"])
def test_a_key_that_cannot_travel_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "key").write_text(text)
    with pytest.raises(ConfigError, match="one line of printable ASCII"):
        read_key(str(tmp_path / "key"))


def test_explain_prints_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0] for line in lines] == list(paths())


def test_an_error_is_one_line_and_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ganglion.toml").write_text("[serve]\nprot = 1\n")
    assert main(["serve", "--explain"]) == 1
    error = capsys.readouterr().err
    assert "unknown key serve.prot; the nearest is serve.port" in error
    assert "next: " in error
    assert "Traceback" not in error


def test_missing_extras_are_named() -> None:
    missing = missing_dependency(ModuleNotFoundError("x", name="mujoco.renderer"))
    assert missing is not None
    assert "pip install 'ganglion[sim]'" in missing.advice
    assert missing_dependency(ModuleNotFoundError("x", name="ganglion.nowhere")) is None
    known = (ROOT / "pyproject.toml").read_text()
    assert all(f"{extra} = [" in known for extra in EXTRAS.values())


def test_help_needs_only_the_base_install() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'starlette', 'prometheus_client', 'mujoco', 'matplotlib', 'numpy'):\n"
        "    sys.modules[name] = None\n"
        "from ganglion.cli.main import build_parser\n"
        "build_parser().format_help()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_bench_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "wier"]) == 1
    known = ", ".join(BENCHES)
    assert f"expected names out of {known}, got wier" in capsys.readouterr().err
    assert main(["bench"]) == 1
    assert "got nothing" in capsys.readouterr().err


def test_generated_pages_are_written_once(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# x\n<!-- results:begin -->\n<!-- results:end -->\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "architecture.md").write_text("<!-- trace:begin --><!-- trace:end -->\n")
    written = docs.write_pages(tmp_path)
    assert {str(path) for path in written} == {
        "docs/cli.md",
        "docs/metrics.md",
        "docs/results/README.md",
        "docs/architecture.md",
        "README.md",
    }
    assert docs.write_pages(tmp_path) == []
    assert docs.stale_pages(tmp_path) == []
    (tmp_path / "docs" / "cli.md").write_text("old")
    assert docs.stale_pages(tmp_path) == ["docs/cli.md"]


def test_the_page_of_the_command_line_names_every_flag() -> None:
    page = docs.cli_page()
    for command in COMMANDS.values():
        assert f"## ganglion {command.name}" in page
        for flag in command.flags():
            assert f"`{flag.name}" in page
    assert "%(default)s" not in page


def test_what_is_named_is_all_that_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ganglion.toml").write_text('[policy]\npath = "a"\n[chat]\nmodels = ["b"]\n')

    def served(*words: str) -> tuple[str, tuple[str, ...]]:
        config = resolve(build_parser().parse_args(gathered(["serve", *words]))).config
        return config.policy.path, config.chat.models

    assert served() == ("a", ("b",))
    assert served("policy=x") == ("x", ())
    assert served("chat=y", "--port", "0", "chat=z,ttl_s=60") == ("", ("y", "z,ttl_s=60"))
    assert served("--port", "0", "policy=x", "chat=y") == ("x", ("y",))
    with pytest.raises(ConfigError, match="2 policies: x, y"):
        served("policy=x", "policy=y")
    with pytest.raises(ConfigError, match="'tiny-moe' says not what it is") as caught:
        served("tiny-moe")
    assert caught.value.advice == "write policy=tiny-moe or chat=tiny-moe"
    with pytest.raises(ConfigError, match=r"expected policy=\.\.\. or chat="):
        served("chta=x")
    with pytest.raises(ConfigError, match="nothing to serve"):
        served("policy=")
