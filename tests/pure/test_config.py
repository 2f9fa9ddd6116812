import re
from pathlib import Path

import pytest

from ganglion.config import LIMITS, Auto, Config, load, paths
from ganglion.errors import ConfigError
from ganglion.units import MIB


def write(folder: Path, text: str) -> Path:
    file = folder / "ganglion.toml"
    file.write_text(text)
    return file


def origin(resolved_path: str, **kwargs: object) -> str:
    resolved = load(**kwargs)  # type: ignore[arg-type]
    return next(s.origin for s in resolved.settings if s.path == resolved_path)


def test_nothing_given_is_the_defaults_and_says_so() -> None:
    resolved = load()
    assert resolved.config == Config()
    assert {setting.origin for setting in resolved.settings} == {"default"}
    assert [setting.path for setting in resolved.settings] == list(paths())


def test_flags_lie_over_the_file_over_auto_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, '[serve]\nport = 9000\nhost = "::1"\n[engine]\ndtype = "float32"\n')
    resolved = load(
        file=file,
        flags={"serve.port": ("--port", 9001)},
        autos={
            "engine.dtype": Auto(value="bfloat16", formula="amx"),
            "memory.arena_bytes": Auto(value=64 * MIB, formula="min(1, 2)"),
        },
    )
    assert resolved.config.serve.port == 9001
    assert resolved.config.serve.host == "::1"
    assert resolved.config.engine.dtype == "float32"
    assert resolved.config.memory.arena_bytes == 64 * MIB
    lines = resolved.explain().splitlines()
    assert "serve.port = 9001  (--port)" in lines
    assert "serve.host = '::1'  (ganglion.toml)" in lines
    assert "memory.arena_bytes = 64.0 MiB  (auto: min(1, 2))" in lines
    assert "engine.max_rows = 64  (default)" in lines
    assert len(lines) == len(paths())


def test_auto_may_be_asked_for_by_name(tmp_path: Path) -> None:
    file = write(tmp_path, '[memory]\narena_bytes = "auto"\n')
    autos = {"memory.arena_bytes": Auto(value=8 * MIB, formula="8")}
    assert load(file=file, autos=autos).config.memory.arena_bytes == 8 * MIB
    assert origin("memory.arena_bytes", file=file, autos=autos) == "auto: 8"


def test_sizes_may_be_text_and_ints_may_be_floats(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '[memory]\narena_bytes = "1.5 GiB"\n[demo]\nrate_hz = 10\ntasks = ["push"]\n'
        "[engine]\nlanes = [[0, 1], [2]]\n",
    )
    config = load(file=file).config
    assert config.memory.arena_bytes == 1536 * MIB
    assert config.demo.rate_hz == 10.0
    assert isinstance(config.demo.rate_hz, float)
    assert config.demo.tasks == ("push",)
    assert config.engine.lanes == ((0, 1), (2,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serve]\nprot = 1\n", "unknown key serve.prot; the nearest is serve.port"),
        ("[sreve]\nport = 1\n", "unknown key [sreve]; the nearest is serve"),
        ("[serve]\nport = '1'\n", "serve.port: expected an int, got '1' from ganglion.toml"),
        ("[serve]\nport = true\n", "serve.port: expected an int, got True"),
        ("[serve]\nport = 70000\n", "serve.port: expected a number from 0 to 65535, got 70000"),
        ("[engine]\ndtype = 'int4'\n", "engine.dtype: expected one of bfloat16, float32, auto"),
        (
            "[pipeline]\ncontext = 'auto'\n",
            "pipeline.context: expected one of public, private, got",
        ),
        ("[engine]\nlanes = [0, 1]\n", "engine.lanes: expected a list of lanes"),
        ("[engine]\nlanes = 'all'\n", "engine.lanes: expected a list of lanes"),
        ("[engine]\ndeadline_ms = nan\n", "engine.deadline_ms: expected a number from 1"),
        ("[memory]\narena_bytes = 'big'\n", "memory.arena_bytes: expected a size"),
        ("[memory]\narena_bytes = -1\n", "memory.arena_bytes: expected a number"),
        ("[serve]\nallowed_hosts = 'a'\n", "serve.allowed_hosts: expected a list of str"),
        ("[serve]\napi_key = 5\n", "serve.api_key: expected a str, got (not shown)"),
        ("serve = 3\n", "serve must be a table"),
        ("[serve\n", "not TOML"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(file=write(tmp_path, text))
    assert caught.value.advice


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: No such file"):
        load(file=tmp_path / "absent.toml")


def test_a_key_is_never_shown() -> None:
    resolved = load(flags={"serve.api_key": ("--api-key-file", "hunter2")})
    assert resolved.config.serve.api_key == "hunter2"
    assert "hunter2" not in resolved.explain()
    assert "serve.api_key = (set)  (--api-key-file)" in resolved.explain()


def test_limits_name_paths_that_exist() -> None:
    assert set(LIMITS) <= set(paths())
