"""Templates as models have them: what is rendered, what is learnt, what goes wrong."""

from __future__ import annotations

import json
import pickle

import pytest

from distilljax.data.text import ChatTemplate
from tests.data.text.tiny import CHATML, conversation

TALK = conversation("Who visits Bath?", "Her aunt.", "Why?", "By the sea.")
SYSTEM = [{"role": "system", "content": "Be brief."}, *TALK]

# In the manner of Llama 3: a date, a tool check, raise_exception, trim.
LLAMA = """\
{{- bos_token }}
{%- if tools is not none %}{{ raise_exception("no tools here") }}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|sys|>\\nToday Date: " + strftime_now("%d %b %Y") + "\\n" + system_message }}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception("Unknown role: " + message.role) }}
    {%- endif %}
    {{- '<|' + message.role + '|>\\n' + message.content | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
)


def learnt(template, messages, **tokens):
    rendered = template(**tokens)(messages)
    return [rendered.text[a:b] for a, b in rendered.spans]


def test_an_answer_is_what_comes_between_two_renderings():
    template = ChatTemplate(source=CHATML)
    assert learnt(template, TALK, eos="<|im_end|>") == [
        "Her aunt.<|im_end|>",
        "By the sea.<|im_end|>",
    ]
    assert learnt(template, SYSTEM, eos="<|im_end|>") == learnt(
        template, TALK, eos="<|im_end|>"
    )
    # without an eos to end at, the break behind it is part of the answer
    assert learnt(template, TALK)[0] == "Her aunt.<|im_end|>\n"
    assert learnt(template, TALK[:1]) == []


def test_a_template_of_llamas_kind_renders_as_it_does_elsewhere():
    template = ChatTemplate(source=LLAMA, today="2024-07-26")
    text = template(bos="<s>", eos="<|eot|>")(SYSTEM).text
    assert text == (
        "<s><|sys|>\nToday Date: 26 Jul 2024\nBe brief."
        "<|user|>\nWho visits Bath?<|eot|><|assistant|>\nHer aunt.<|eot|>"
        "<|user|>\nWhy?<|eot|><|assistant|>\nBy the sea.<|eot|>"
    )
    assert learnt(template, SYSTEM, eos="<|eot|>") == [
        "Her aunt.<|eot|>",
        "By the sea.<|eot|>",
    ]


def test_the_date_is_no_clock():
    source = "{{ strftime_now('%Y-%m-%d') }}"
    assert ChatTemplate(source=source)().render([]) == "2025-01-01"
    with pytest.raises(ValueError, match="today must be a date"):
        ChatTemplate(source=source, today="yesterday")()


def test_a_template_that_marks_its_generation_is_believed():
    template = ChatTemplate(source=MARKED)
    assert template().marks_generation
    assert learnt(template, TALK) == ["Her aunt.<end>", "By the sea.<end>"]
    assert template()(TALK).text == (
        "<user>Who visits Bath?<end><assistant>Her aunt.<end>"
        "<user>Why?<end><assistant>By the sea.<end>"
    )
    # that of a variable is no mark
    assert not ChatTemplate(source="{{ generation }}")().marks_generation


def test_marks_are_found_inside_of_macros_and_blocks():
    source = (
        "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{% set said %}{{ say(m) }}{% endset %}"
        "<{{ m.role }}>{{ said if m.role == 'assistant' else m.content }}{% endfor %}"
    )
    assert learnt(ChatTemplate(source=source), TALK) == ["Her aunt.", "By the sea."]


def test_marks_that_change_the_text_are_an_error():
    source = (
        "{% set said %}{% generation %} {{ messages[1].content }} {% endgeneration %}"
        "{% endset %}{{ said | trim }}"
    )
    with pytest.raises(ValueError, match="hold text that nothing outside of it"):
        ChatTemplate(source=source)()(TALK)
    inside = conversation("Who?", "\ufdd0 Emma \ufdd1")  # as if it knew the marks
    with pytest.raises(ValueError, match="hold text that nothing outside of it"):
        ChatTemplate(source=MARKED)()(inside)


def test_a_template_that_rewrites_earlier_messages_is_an_error():
    """As those do that hide the reasoning of all answers but the last."""
    source = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last else m.content.split('</think>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = conversation("Who?", "<think>Hm.</think>Emma.", "Why?", "So.")
    with pytest.raises(ValueError, match=r"another beginning after message 1 at a:7"):
        ChatTemplate(source=source)()(talk, lambda: "a:7")
    # its last answer is no question of what was before
    last = ChatTemplate(source=source, learn="last")
    assert learnt(last, talk) == ["So."]
    assert learnt(last, talk[:2]) == ["<think>Hm.</think>Emma."]


def test_the_last_answer_alone_may_be_learnt():
    for source in (CHATML, MARKED):
        last = ChatTemplate(source=source, learn="last")
        assert len(learnt(last, TALK)) == 1
        assert learnt(last, TALK)[0].startswith("By the sea.")
        # what is said after it is left out
        assert last()([*TALK, TALK[0]]) == last()(TALK)
        assert learnt(last, TALK[:1]) == []


def test_a_template_that_raises_says_where_and_why():
    wrong = [{"role": "critic", "content": "No."}]
    with pytest.raises(
        ValueError,
        match=r"at a:7 must be one that the template can ren"
        r"der, got TemplateError: Unknown role: critic",
    ) as error:
        ChatTemplate(source=LLAMA)()(wrong, lambda: "a:7")
    assert "Its roles are ['critic']" in str(error.value)
    with pytest.raises(ValueError, match="got TypeError: can only concatenate str"):
        ChatTemplate(source=CHATML)()([{"role": "user", "content": None}])
    with pytest.raises(ValueError, match="got UndefinedError"):
        ChatTemplate(source="{{ messages[3].content.x }}")()(TALK)


def test_a_template_cannot_reach_out_of_its_sandbox():
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__subclasses__() }}",
    ):
        with pytest.raises(ValueError, match="SecurityError"):
            ChatTemplate(source=source)()(TALK)


def test_what_templates_on_the_hub_rely_on_is_there():
    source = (
        "{%- for m in messages %}\n"
        "    {%- if m.role == 'user' %}{% continue %}{% endif %}\n"
        "    {%- set ns = namespace(x=0) %}{% set ns.x = 2 %}\n"
        "{{ {'a': '<é>', 'n': ns.x} | tojson }}{{ enable_thinking }}\n"
        "    {%- break %}\n"
        "{%- endfor %}\n"
    )
    template = ChatTemplate(source=source, variables={"enable_thinking": False})
    assert template().render(TALK) == '{"a": "<é>", "n": 2}False'


def test_a_template_is_found_in_the_folder_of_a_model(model, tmp_path):
    assert learnt(ChatTemplate(str(model)), TALK, eos="<|im_end|>")
    config = tmp_path / "tokenizer_config.json"
    named = [
        {"name": "tool_use", "template": "x"},
        {"name": "default", "template": "y"},
    ]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate(str(tmp_path))().render(TALK) == "y"
    (tmp_path / "chat_template.jinja").write_text("z")  # the newer place
    assert ChatTemplate(str(tmp_path))().render(TALK) == "z"
    assert ChatTemplate(str(config))().render(TALK) == "y"
    config.write_text("{}")
    with pytest.raises(ValueError, match="must have a chat_template"):
        ChatTemplate(str(config))()
    config.write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        ChatTemplate(str(config))()
    with pytest.raises(ValueError, match="path must be a file that exists"):
        ChatTemplate(str(tmp_path / "none"))()
    with pytest.raises(ValueError, match="path or source must be given, and not both"):
        ChatTemplate()()
    with pytest.raises(ValueError, match=r"be a Jinja template, got .* at line 2"):
        ChatTemplate(source="\n{% for %}")()


def test_the_fingerprint_is_that_of_what_is_rendered():
    chat = ChatTemplate(source=LLAMA)
    prints = {
        chat().fingerprint,
        chat(eos="<|eot|>").fingerprint,
        ChatTemplate(source=LLAMA, today="2024-07-26")().fingerprint,
        ChatTemplate(source=LLAMA, variables={"x": 1})().fingerprint,
        ChatTemplate(source=LLAMA, learn="last")().fingerprint,
        ChatTemplate(source=CHATML)().fingerprint,
    }
    assert len(prints) == 6
    assert chat().fingerprint in prints


def test_a_template_goes_to_worker_processes():
    chat = ChatTemplate(source=MARKED)()
    assert pickle.loads(pickle.dumps(chat))(TALK) == chat(TALK)


def test_a_lone_answer_may_be_learnt_as_the_last_one():
    alone = [{"role": "assistant", "content": "Emma."}]
    source = "{{ messages[0].role }}: " + MARKED
    template = ChatTemplate(source=source, learn="last")
    assert learnt(template, alone) == ["Emma.<end>"]


def test_a_template_that_treats_no_message_otherwise_is_told_apart():
    """SmolLM2's puts a system message before those that have none."""
    source = "{% if messages and messages[0].role != 'system' %}<sys>{% endif %}"
    with pytest.raises(ValueError, match="begin with a message that the assistant ans"):
        ChatTemplate(source=source + CHATML)()([TALK[1]])


def test_templates_of_other_names_are_told(tmp_path):
    named = [{"name": "tool_use", "template": CHATML}]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": named})
    )
    with pytest.raises(ValueError, match=r"one named default .*, got only tool_use"):
        ChatTemplate(str(tmp_path))()
