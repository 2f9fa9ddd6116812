"""What a newcomer reads first: the order of the README's first screen, and links that lead somewhere."""

import re
from pathlib import Path

import pytest

from ganglion.bench.result import read_all
from ganglion.cli.commands import COMMANDS
from ganglion.cli.main import build_parser
from ganglion.config import paths

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.split("#")[0]).exists(), f"{page}: {target}"


def test_the_first_screen_of_the_readme_keeps_its_order() -> None:
    text = (ROOT / "README.md").read_text()
    marks = [
        "An inference server for embodied AI",
        "](docs/images/dashboard.",
        "make demo",
        "make test",
        "| what is served |",
        "<!-- results:begin -->",
        "[Quickstart](docs/quickstart.md)",
        "Not a safety function",
        "Non-goals:",
    ]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places)
    assert text.count("shields.io") <= 3


def test_commands_in_the_pages_parse() -> None:
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.splitlines():
                words = line.split("#")[0].split()
                if words[:1] == ["ganglion"]:
                    build_parser().parse_args(words[1:])


def test_settings_in_the_pages_exist() -> None:
    known = set(paths())
    for page in PAGES:
        for name in re.findall(
            r"`((?:serve|engine|memory|policy|demo)\.[a-z_]+)`", page.read_text()
        ):
            is_module = (
                (ROOT / "src" / "ganglion" / name.replace(".", "/")).with_suffix(".py").exists()
            )
            assert name in known or is_module or name.endswith(".py"), f"{page}: {name}"


def test_every_result_names_a_command_that_parses() -> None:
    for result in read_all(ROOT / "docs" / "results"):
        words = result["command"].split()
        assert words[0] == "ganglion"
        assert build_parser().parse_args(words[1:]).command in COMMANDS
