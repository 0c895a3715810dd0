"""Chat templates written for the tests. They behave like those of the family's releases without being them:

`family_template("3.5")`        thinks by default; knows `enable_thinking` only
`family_template("3.5-small")`  does not think by default (0.8B, 2B)
`family_template("3.6")`        and knows `preserve_thinking`, off by default
`family_template("3.8")`        and has it on by default, and knows `reasoning_effort`

All: one system message, first; an error without a real user query; past reasoning removed except behind the last user query; reasoning
from `reasoning_content` or split out of the content; tools as JSON lines; calls as XML-like blocks; tool results merged in a user turn.
"""

from __future__ import annotations

_FAMILY = """
{%- set say = namespace(query=-1, open=false, pictures=0, videos=0) %}
{%- macro text_of(content, count=false, system=false) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for part in content %}
            {%- if part.type == 'image' or 'image_url' in part %}
                {%- if system %}
                    {{- raise_exception('A system message cannot hold a picture.') }}
                {%- endif %}
                {%- set say.pictures = say.pictures + (1 if count else 0) %}
                {{- ('Picture ' ~ say.pictures ~ ': ' if add_vision_id else '') ~ '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {%- set say.videos = say.videos + (1 if count else 0) %}
                {{- ('Video ' ~ say.videos ~ ': ' if add_vision_id else '') ~ '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- else %}
                {{- raise_exception('Content part of unknown type.') }}
            {%- endif %}
        {%- endfor %}
    {%- elif content is not none and content is not undefined %}
        {{- raise_exception('Content of unknown type.') }}
    {%- endif %}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == 'user' and not text_of(message.content).startswith('<tool_response>') %}
        {%- set say.query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if say.query < 0 %}
    {{- raise_exception('There is no user query in the messages.') }}
{%- endif %}
{%- set system = text_of(messages[0].content, false, true) | trim if messages[0].role == 'system' else '' %}
@@EFFORT@@
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\nCallable functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' ~ tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nTo call one, write a tool_call block.' ~ ('\\n\\n' ~ system if system else '') ~ '<|im_end|>\\n' }}
{%- elif system %}
    {{- '<|im_start|>system\\n' ~ system ~ '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = text_of(message.content, true) | trim %}
    {%- if message.role == 'system' %}
        {%- if not loop.first %}
            {{- raise_exception('A system message must be the first.') }}
        {%- endif %}
        {%- continue %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\\n' ~ content ~ '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > say.query@@PRESERVE@@ %}
            {{- '<think>\\n' ~ reasoning | trim ~ '\\n</think>\\n\\n' }}
        {%- endif %}
        {% generation %}{{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n\\n' if content and loop.first else ('' if loop.first else '\\n') }}
            {{- '<tool_call>\\n<function=' ~ call.name ~ '>\\n' }}
            {%- for name, value in (call.arguments or {}) | items %}
                {{- '<parameter=' ~ name ~ '>\\n' ~ (value if value is string else value | tojson) ~ '\\n</parameter>\\n' }}
            {%- endfor %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}{% endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if not say.open %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
        {%- set say.open = not loop.last and loop.nextitem.role == 'tool' %}
        {%- if not say.open %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('Unknown role ' ~ message.role ~ '.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if @@NO_THINKING@@ %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
        {{- '<think>\\n' }}
    {%- endif %}
{%- endif %}
""".strip()

_OFF_ON_REQUEST = "enable_thinking is defined and enable_thinking is false"
_OFF_BY_DEFAULT = "enable_thinking is not defined or enable_thinking is not true"
_EFFORT = """{%- if reasoning_effort is defined %}
    {%- set system = ('Reasoning effort: ' ~ reasoning_effort ~ '\\n' ~ system) | trim %}
{%- endif %}"""

_VARIANTS = {
    "3.5": ("", "", _OFF_ON_REQUEST),
    "3.5-small": ("", "", _OFF_BY_DEFAULT),
    "3.6": ("", " or (preserve_thinking is defined and preserve_thinking is true)", _OFF_ON_REQUEST),
    "3.8": (_EFFORT, " or preserve_thinking is not defined or preserve_thinking is true", _OFF_ON_REQUEST),
}


def family_template(variant: str) -> str:
    """The Jinja source of one variant."""
    effort, preserve, no_thinking = _VARIANTS[variant]
    return _FAMILY.replace("@@EFFORT@@", effort).replace("@@PRESERVE@@", preserve).replace("@@NO_THINKING@@", no_thinking)


# Not of the family: no thinking, special tokens as variables, HTML-sensitive JSON, a date, in-template sorting and loop controls.
OTHER_TEMPLATE = """{{ bos_token }}{{ strftime_now("%Y") }}
{% for message in messages %}
    {% if message.role == "skip" %}{% continue %}{% endif %}
    {% if loop.index > 3 %}{% break %}{% endif %}
  [{{ message.role }}] {{ message.content | tojson }}
    {%- if message.extra is defined %} {{ message.extra | tojson(indent=2, sort_keys=true) }}{% endif %}

{% endfor %}
{% if documents is none and not tools %}no tools{% endif %}
{{ eos_token }}"""
