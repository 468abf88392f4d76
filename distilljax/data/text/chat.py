"""Conversations as text, by the template of a model, and who is learnt from in them.

Only what the assistant says is learnt: the student never has to predict a question. A
template that marks it with ``{% generation %}`` is believed. For any other the
conversation is rendered up to each answer, with and without it, and the answer is what
comes between; that is right only if every rendering continues the one before, and this
is checked.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn

from distilljax._checks import fail
from distilljax.data.text.documents import Messages, digest
from distilljax.data.text.filters import check_choice

# What a rendering has where the assistant begins and ends, until both are taken out.
# Unicode keeps these two for a program's own use: no text may hold them.
_BEGIN, _END = "\ufdd0", "\ufdd1"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
      text: What the model reads.
      spans: First and last character (exclusive) of what the assistant says, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """How a model writes a conversation: the Jinja template that comes with it.

    It runs in a sandbox, with what templates on the hub rely on: ``raise_exception``,
    ``tojson``, loop controls and ``strftime_now``. The latter gives ``today``, not the
    clock: else the same data would be other tokens tomorrow.

    Attributes:
      path: A ``.jinja`` file, a ``tokenizer_config.json``, or a folder with either.
      source: The template itself, in place of a path.
      learn: "all" that the assistant says, or its "last" message alone, which works
        with templates that rewrite earlier messages, too.
      variables: What else the template reads, such as ``{"enable_thinking": False}``.
      today: The date that ``strftime_now`` gives.

    Example:
      >>> source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\\n{% endfor %}"
      >>> source += "{% if add_generation_prompt %}<assistant>{% endif %}"
      >>> chat = ChatTemplate(source=source)()
      >>> rendered = chat([
      ...     {"role": "user", "content": "Two and two?"},
      ...     {"role": "assistant", "content": "Four."},
      ... ])
      >>> [rendered.text[a:b] for a, b in rendered.spans]
      ['Four.\\n']
    """

    path: str | None = None
    source: str | None = None
    learn: Literal["all", "last"] = "all"
    variables: Mapping[str, Any] = field(default_factory=dict)
    today: str = "2025-01-01"

    def __call__(self, *, bos: str | None = None, eos: str | None = None) -> Chat:
        """Compile it for a tokenizer whose special tokens are written ``bos``, ``eos``.

        A text is supervised up to and including ``eos``: the line break that many
        templates put behind it is never generated.
        """
        if (self.path is None) == (self.source is None):
            fail(
                "ChatTemplate",
                "path or source",
                "be given, and not both",
                f"path={self.path!r} and source={self.source!r}",
                "The folder of an instruct model has the template.",
            )
        check_choice("ChatTemplate", "learn", self.learn, ("all", "last"))
        source = self.source
        if source is None:
            source = _read_template(Path(self.path or ""))
        try:
            today = datetime.datetime.fromisoformat(self.today)
        except ValueError:
            fail(
                "ChatTemplate",
                "today",
                "be a date such as 2025-01-01",
                repr(self.today),
                "It is what strftime_now gives.",
            )
        variables = {"bos_token": bos or "", "eos_token": eos or "", **self.variables}
        return Chat(source, variables, today, eos, self.learn)


class Chat:
    """A compiled template: from messages to text, and to what is learnt in it."""

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any],
        today: datetime.datetime,
        eos: str | None,
        learn: Literal["all", "last"] = "all",
    ):
        self._source, self._variables = source, variables
        self._today, self._eos, self._learn = today, eos, learn
        self._template()  # a mistake in it is found now

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides what it renders."""
        variables, today = dict(self._variables), self._today.isoformat()
        return digest(self._source, variables, today, self._eos, self._learn)

    @property
    def marks_generation(self) -> bool:
        """True if the template says itself what the assistant generates."""
        return self._template().marks

    def __call__(
        self, messages: Messages, where: Callable[[], str] = lambda: "(not named)"
    ) -> Rendered:
        """The text of a conversation, and which of it the assistant says.

        Args:
          messages: The conversation.
          where: Tells where it is from; asked if something is wrong.
        """
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self._learn == "last" and answers:
            answers = answers[-1:]
            messages = messages[: answers[0] + 1]  # nothing is learnt of what follows
        if self.marks_generation:
            return self._marked(messages, where)
        text = self.render(messages, where)
        spans = []
        for i in answers:
            before = self.render(messages[:i], where, add_generation_prompt=True)
            last = i + 1 == len(messages)
            after = text if last else self.render(messages[: i + 1], where)
            if not (after.startswith(before) and text.startswith(after)):
                self._not_a_prefix(i, where)
            spans.append((len(before), self._end(text, len(before), len(after))))
        return Rendered(text, tuple(spans))

    def render(
        self,
        messages: Messages,
        where: Callable[[], str] = lambda: "(not named)",
        *,
        add_generation_prompt: bool = False,
        marked: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
          messages: The conversation.
          where: Tells where it is from; asked if something is wrong.
          add_generation_prompt: End where the assistant would begin to answer.
          marked: Put marks around what the template says is generated.
        """
        import jinja2

        try:
            return self._template(marked).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                # a template may ask whether they are none, which undefined is not
                **{"tools": None, "documents": None, **self._variables},
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            return fail(
                "ChatTemplate",
                f"the conversation at {where()}",
                "be one that the template can render",
                f"{type(error).__name__}: {error}",
                f"Its roles are {[message.get('role') for message in messages]}.",
            )

    def _marked(self, messages: Messages, where: Callable[[], str]) -> Rendered:
        text = self.render(messages, where)
        pieces = self.render(messages, where, marked=True).split(_BEGIN)
        found, spans, whole = pieces[0], [], True
        for piece in pieces[1:]:
            generated, *rest = piece.split(_END)
            whole = whole and len(rest) == 1
            spans.append((len(found), len(found) + len(generated)))
            found += generated + "".join(rest)
        if not whole or found != text:
            fail(
                "ChatTemplate",
                "{% generation %} of the template",
                "hold text that nothing outside of it changes",
                f"another text with its marks, at {where()}",
                "Move filters such as trim inside of it, and do not nest it.",
            )
        if self._learn == "last" and spans and len(messages) > 1:
            before = self.render(messages[:-1], where, marked=True).count(_BEGIN)
            spans = spans[before:]
        return Rendered(text, tuple(spans))

    def _end(self, text: str, start: int, stop: int) -> int:
        """Where a generation stops: after the last eos, if only space follows it."""
        at = text.rfind(self._eos, start, stop) if self._eos else -1
        if at >= 0 and not text[at + len(self._eos or "") : stop].strip():
            return at + len(self._eos or "")
        return stop

    def _not_a_prefix(self, i: int, where: Callable[[], str]) -> NoReturn:
        if i == 0:
            fail(
                "ChatTemplate",
                f"the conversation at {where()}",
                "begin with a message that the assistant answers",
                "one that the assistant begins, which this template writes otherwise "
                "than a prompt of no message",
                "Leave it out, put a system message before it, or mark what is "
                "generated in the template: {% generation %}...{% endgeneration %}.",
            )
        fail(
            "ChatTemplate",
            "the template",
            "continue a conversation where it ended before, or mark what is generated",
            f"another beginning after message {i} at {where()}",
            "It rewrites earlier messages (hides their reasoning, say): put "
            "{% generation %}...{% endgeneration %} around the assistant's text in it, "
            'or pass learn="last".',
        )

    def _template(self, marked: bool = False) -> Any:
        key = "_with_marks" if marked else "_without_marks"
        if key not in self.__dict__:
            self.__dict__[key] = _compile(self._source, self._today, marked)
        return self.__dict__[key]

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes compile the template themselves."""
        return {k: v for k, v in self.__dict__.items() if not k.endswith("_marks")}


def _compile(source: str, today: datetime.datetime, marked: bool) -> Any:
    """The template, in a sandbox that can neither call out nor change its arguments."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    found = []

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            found.append(True)
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_between")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _between(self, caller: Callable[[], str]) -> str:
            return f"{_BEGIN}{caller()}{_END}" if marked else caller()

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # jinja2's own escapes <, > and &, which is right in HTML and wrong here
        return json.dumps(x, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = today.strftime
    try:
        template: Any = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        fail(
            "ChatTemplate",
            "the template",
            "be a Jinja template",
            f"{error.message} at line {error.lineno}",
            "Copy it again from the model.",
        )
    template.marks = bool(found)
    return template


def _read_template(path: Path) -> str:
    """The template of a folder, a ``tokenizer_config.json`` or a file of its own."""
    if path.is_dir():
        own = path / "chat_template.jinja"
        path = own if own.is_file() else path / "tokenizer_config.json"
    if not path.is_file():
        fail(
            "ChatTemplate",
            "path",
            "be a file that exists",
            str(path),
            "It is chat_template.jinja or tokenizer_config.json in a model's folder.",
        )
    text = path.read_text()
    if path.suffix != ".json":
        return text
    try:
        found = json.loads(text).get("chat_template")
    except ValueError as error:
        fail("ChatTemplate", str(path), "be JSON", error, "Copy it again.")
    named: dict[str, str] = {}
    if isinstance(found, list):  # several, by name
        named = {one["name"]: one["template"] for one in found}
        found = named.get("default")
    if found is None:
        fail(
            "ChatTemplate",
            str(path),
            "have a chat_template, one named default if there are several",
            f"only {', '.join(named)}" if named else "none",
            "Pass source= with the one that you mean; base models have none: give the "
            "template of the instruct model.",
        )
    return found
