"""Chat template: a conversation -> the text that the model was trained on, by the Jinja template of its folder.

Called by `models.text_tokenizer`. A template is code of the folder's author, so it runs in jinja2's sandbox with bounds on
its loops and its output; it reaches no file, no attribute of ours and no network. Knows no token ids.
"""

import datetime
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from ganglion.errors import CheckpointError, FieldError
from ganglion.generation import ChatMessage

MAX_TEMPLATE_BYTES = 1024 * 1024
MAX_LOOP_TURNS = 1_000_000
MAX_CHARACTERS = 16 * 1024 * 1024
_TURN = "ganglion_turn_of_a_loop"
_REFUSALS = (
    TemplateError,
    ArithmeticError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    MemoryError,
)

# For folders that have none: "user: ...", a blank line between turns, and the assistant's turn left open.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "assistant:"
)
PLAIN_PARTS_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}{{ '\\n\\n' }}{% endfor %}assistant:"
)


class ChatTemplate:
    """One template and, for models that have two, the one for requests with tools. Thread-safe."""

    def __init__(
        self,
        source: str,
        *,
        tool_source: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        is_in_parts: bool = False,
        today: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        """`is_in_parts`: the template reads content as a list of parts, of which pictures are some."""
        self._today, self._special_tokens = today, dict(special_tokens or {})
        self._as_content = _parts if is_in_parts else _text
        self._local = threading.local()
        self._environment = _Environment()
        self._environment.globals["strftime_now"] = lambda form: self._today().strftime(form)
        self._environment.globals["raise_exception"] = _raise
        self._environment.globals[_TURN] = self._count_turn
        self._environment.filters["tojson"] = _to_json
        self._template = self._compile(source)
        self._tool_template = self._compile(tool_source) if tool_source else self._template

    def render(
        self, messages: Sequence[ChatMessage], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """Text of the conversation up to where the assistant speaks next.

        Raises FieldError where the template refuses the messages or does not come to an end.
        """
        self._local.num_turns = 0
        template = self._tool_template if tools else self._template
        parts: list[str] = []
        num_characters = 0
        try:
            for part in template.generate(
                messages=[_as_dict(message, self._as_content) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            ):
                parts.append(part)
                num_characters += len(part)
                if num_characters > MAX_CHARACTERS:
                    raise SecurityError(f"it wrote more than {MAX_CHARACTERS} characters")
        except _REFUSALS as error:
            raise FieldError(
                "messages",
                expected="what the model's chat template takes",
                got=f"{error or type(error).__name__}",
                next_step="send roles in the order that the model knows, usually user and assistant in turn",
            ) from error
        return "".join(parts)

    def _compile(self, source: str) -> Any:
        try:
            if len(source) > MAX_TEMPLATE_BYTES or _TURN in source:
                raise SecurityError(f"a template of {len(source)} characters")
            tree = self._environment.parse(source)
            for loop in tree.find_all(nodes.For):
                turn = nodes.Call(nodes.Name(_TURN, "load"), [], [], None, None)
                loop.body.insert(0, nodes.ExprStmt(turn, lineno=loop.lineno))
            tree.set_environment(self._environment)
            return self._environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            raise CheckpointError(
                f"chat template: not readable: {error}", next_step="fix it in tokenizer_config.json"
            ) from error

    def _count_turn(self) -> None:
        self._local.num_turns += 1
        if self._local.num_turns > MAX_LOOP_TURNS:
            raise SecurityError(f"its loops take more than {MAX_LOOP_TURNS} turns")


def read_chat_template(
    folder: Path, config: Mapping[str, Any], *, is_in_parts: bool = False
) -> ChatTemplate:
    """The template of a model's folder: `chat_template.jinja`, or as `config` (tokenizer_config.json) has it, or the plain one.

    `is_in_parts`: as in ChatTemplate. Raises CheckpointError for one that cannot be read.
    """
    special_tokens = _special_tokens(config)
    named: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        named["default"] = inline
    elif isinstance(inline, list):
        for entry in inline:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                named[str(entry.get("name"))] = entry["template"]
    older = folder / "chat_template.json"
    if older.is_file():
        try:
            content = json.loads(older.read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{older}: not readable JSON: {error}") from error
        if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
            named["default"] = content["chat_template"]
    files = [("default", folder / "chat_template.jinja")]
    files += [
        (path.stem, path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    ]
    for name, path in files:
        if path.is_file():
            try:
                named[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}: not readable text: {error}") from error
    return ChatTemplate(
        named.get("default", PLAIN_PARTS_TEMPLATE if is_in_parts else PLAIN_TEMPLATE),
        tool_source=named.get("tool_use"),
        special_tokens=special_tokens,
        is_in_parts=is_in_parts,
    )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; newer folders write them as objects."""
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            found[name] = value
    return found


def _text(message: ChatMessage) -> str:
    return message.content


def _parts(message: ChatMessage) -> list[dict[str, str]]:
    """Pictures are only named: where they stand is all that a template says of them."""
    parts = message.parts or (message.content,)
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
        for part in parts
    ]


def _as_dict(message: ChatMessage, as_content: Callable[[ChatMessage], Any]) -> dict[str, Any]:
    """As templates know messages. Arguments of tool calls are objects there and JSON text in the API."""
    found: dict[str, Any] = {"role": message.role, "content": as_content(message)}
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        found["tool_calls"] = [_call_as_dict(call) for call in message.tool_calls]
    return found


def _call_as_dict(call: Mapping[str, object]) -> dict[str, Any]:
    found: dict[str, Any] = dict(call)
    function = found.get("function")
    if isinstance(function, Mapping):
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except ValueError as error:
                raise FieldError(
                    "tool_calls.function.arguments", expected="JSON", got=repr(arguments)[:200]
                ) from error
        found["function"] = {**function, "arguments": arguments}
    return found


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001 - the signature that templates are written for
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, as model folders expect it to be set, without operators that make much out of little."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed here")
        for one, other in ((left, right), (right, left)):
            is_repeated = isinstance(one, str | list | tuple) and isinstance(other, int)
            if is_repeated and len(one) * other > MAX_CHARACTERS:
                raise SecurityError(f"{len(one)} * {other} is too long")
        return SandboxedEnvironment.call_binop(self, context, operator, left, right)
