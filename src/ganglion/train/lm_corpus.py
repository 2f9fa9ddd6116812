"""Corpus of the tiny language models: text that every Python installation has, as bytes.

Owns what is read, its order and the split by document. Called by `train.lm` and the CLI. Knows no model.

Kinds: `source` (standard library modules), `docstring` (of the same modules), `topic` (pydoc's language reference) and
`licence` (of installed packages). A module and its docstrings are always on the same side of the split. Licences are near
copies of each other, so they are trained on only: held out they would measure memory.
"""

import ast
import hashlib
import importlib
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ganglion.errors import GanglionError

END_OF_TEXT = 256  # the ids below it are the bytes
VOCAB_SIZE = 257
# tests are long and of little prose; encodings are tables; pydoc_data is what `topic` holds already
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "encodings", "idlelib", "pydoc_data", "site-packages", "test", "tests"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "__phello__")
LICENCE_NAMES = ("licen", "copying", "notice")
MAX_DOCUMENT_BYTES = 200_000
MIN_DOCUMENT_BYTES = 64
HELD_OUT_ONE_IN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text. `name` decides the side of the split; documents of one module share it."""

    name: str
    kind: str
    text: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Token ids, each document followed by END_OF_TEXT: `train` and, kind by kind, `held_out`."""

    train: NDArray[np.uint16]
    held_out: dict[str, NDArray[np.uint16]]
    num_documents: int
    sha256: str  # of everything above, in order

    @property
    def num_held_out_tokens(self) -> int:
        """Of all kinds."""
        return sum(len(tokens) for tokens in self.held_out.values())


def read_corpus(*, max_bytes: int | None = None) -> Corpus:
    """Read this installation. The same installation gives the same corpus, byte by byte.

    `max_bytes`: stop after about so much (quick runs). Raises GanglionError when an installation has too little text.
    """
    documents: list[Document] = []
    num_bytes = 0
    for document in _documents():
        documents.append(document)
        num_bytes += len(document.text)
        if max_bytes is not None and num_bytes >= max_bytes:
            break
    return corpus_of(documents)


def corpus_of(documents: list[Document]) -> Corpus:
    """Split and join documents. Texts that occur twice count once. Raises GanglionError when a side stays empty."""
    seen: set[bytes] = set()
    train: list[NDArray[np.uint16]] = []
    held_out: dict[str, list[NDArray[np.uint16]]] = {}
    digest = hashlib.sha256()
    for document in documents:
        key = hashlib.sha256(document.text).digest()
        if key in seen or len(document.text) < MIN_DOCUMENT_BYTES:
            continue
        seen.add(key)
        digest.update(f"{document.kind}/{document.name}/{len(document.text)}\n".encode() + key)
        tokens = encode(document.text)
        if document.kind != "licence" and is_held_out(document.name):
            held_out.setdefault(document.kind, []).append(tokens)
        else:
            train.append(tokens)
    if not train or not held_out:
        raise GanglionError(
            f"the corpus has {len(train)} documents to train on and {len(held_out)} kinds held out",
            next_step="train with a Python installation that has its standard library as sources",
        )
    return Corpus(
        train=np.concatenate(train),
        held_out={kind: np.concatenate(parts) for kind, parts in sorted(held_out.items())},
        num_documents=len(seen),
        sha256=digest.hexdigest(),
    )


def encode(text: bytes) -> NDArray[np.uint16]:
    """Token ids of one document, END_OF_TEXT last."""
    tokens = np.empty(len(text) + 1, np.uint16)
    tokens[:-1] = np.frombuffer(text, np.uint8)
    tokens[-1] = END_OF_TEXT
    return tokens


def is_held_out(name: str) -> bool:
    """One name in HELD_OUT_ONE_IN, by its hash: the side does not change when other documents come or go."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def _documents() -> Iterator[Document]:
    # topics first: small quick runs then hold prose too
    yield from _topics()
    yield from _modules(Path(sysconfig.get_path("stdlib")))
    yield from _licences()


def _topics() -> Iterator[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in sorted(topics.items()):
        yield Document(name=f"topic/{name}", kind="topic", text=text.strip().encode())


def _modules(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).parts
        if SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[-1].startswith(SKIPPED_PREFIXES):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, UnicodeDecodeError, SyntaxError):
            continue  # lib2to3 and turtledemo ship files that are wrong on purpose
        name = "/".join(parts)
        prose = "\n\n".join(_docstrings(tree))
        yield Document(name=name, kind="docstring", text=prose.encode()[:MAX_DOCUMENT_BYTES])
        yield Document(name=name, kind="source", text=source.encode()[:MAX_DOCUMENT_BYTES])


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"


def _licences() -> Iterator[Document]:
    found: dict[str, Path] = {}
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            if file.name.lower().startswith(LICENCE_NAMES) and not file.name.endswith(".py"):
                path = Path(str(file.locate()))
                found[f"{distribution.name}/{file.as_posix()}"] = path
    for name, path in sorted(found.items()):
        try:
            text = path.read_bytes()[:MAX_DOCUMENT_BYTES]
        except OSError:
            continue
        yield Document(name=f"licence/{name}", kind="licence", text=text.strip())
