"""Chat templates: what they may do, what they may not, and how they refuse."""

from datetime import datetime
from typing import Any

import pytest
from octavo.errors import CheckpointError, RequestError
from octavo.text.chat import render_chat

USER = [{"role": "user", "content": "Hi"}]
CHATML = """\
{% for message in messages %}
{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{% endif %}
"""


def test_a_template_sees_messages_and_tokens() -> None:
    text = render_chat(CHATML, USER, bos_token="<s>", eos_token="</s>")
    assert text == "<|user|>Hi</s>\n<|assistant|>\n"  # blocks leave no blank lines
    assert render_chat(CHATML, USER, add_generation_prompt=False) == "<|user|>Hi\n"


def test_further_variables_and_tools() -> None:
    template = "{{ tools | tojson }} {{ enable_thinking }} {{ bos_token }}|{{ documents }}"
    text = render_chat(template, USER, tools=[{"name": "é<b>"}], enable_thinking=False)
    assert text == '[{"name": "é<b>"}] False |'  # JSON as it is, not escaped for HTML


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
        ("{{ {'a': [1, 2]} | tojson(indent=1) }}", '{\n "a": [\n  1,\n  2\n ]\n}'),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 3 %}{{ ns.n }}", "3"),
    ],
)
def test_what_templates_in_use_need(template: str, text: str) -> None:
    assert render_chat(template, USER) == text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("x", "x"),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ([], ""),
    ],
)
def test_contents_are_one_string(content: Any, text: str) -> None:
    assert render_chat("{{ messages[0]['content'] }}", [{"role": "user", "content": content}]) == text


def test_messages_keep_their_other_fields() -> None:
    messages = [{"role": "assistant", "tool_calls": [{"id": "1"}]}]
    assert render_chat("{{ messages[0].tool_calls[0].id }}{{ messages[0].content }}", messages) == "1"
    assert messages == [{"role": "assistant", "tool_calls": [{"id": "1"}]}]


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {}}, {"type": "text"}, "text", 3])
def test_parts_that_are_no_text_are_refused(part: Any) -> None:
    with pytest.raises(RequestError, match="only text is supported") as caught:
        render_chat("x", [{"role": "user", "content": [part]}])
    assert caught.value.field == "messages"


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render_chat("{{ raise_exception('roles must alternate') }}", USER)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ range(10 ** 9) | list }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages | tojson | int + 'x' }}",
        "{% include 'passwd' %}",
    ],
)
def test_what_fails_or_is_not_allowed_is_a_refusal(template: str) -> None:
    with pytest.raises(RequestError, match="The chat template refuses these messages"):
        render_chat(template, USER)


@pytest.mark.parametrize("template", ["{% if %}", "{{", "{% nonsense %}", "{% generation %}"])
def test_what_is_no_template_is_the_checkpoints_fault(template: str) -> None:
    with pytest.raises(CheckpointError, match="no valid jinja2 template"):
        render_chat(template, USER)
