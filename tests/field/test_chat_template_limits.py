"""Templates that loop or allocate end with one message; limits change nothing that a template may do."""

from __future__ import annotations

import threading

import pytest

from qwen_export.errors import TemplateError
from qwen_export.runtimes.text.chat_template import ChatTemplate
from qwen_export.runtimes.text.template_limits import MAX_CHARS

MESSAGES = [{"role": "user", "content": "x"}]


def growing(step: str, start: str = "'a'", after: str = "{{ ns.s }}") -> str:
    return f"{{% set ns = namespace(s={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{after}"


ENDLESS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "loops with conditions": "{% for i in range(99999) if i < 0 %}{% endfor %}" * 50,
    "recursive loop": "{% for i in range(99999) recursive %}{{ loop(range(99999)) if loop.depth < 3 }}{% endfor %}",
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "slices": "{% set s = 'a' * 10**7 %}{% for i in range(99999) %}{% set t = s[1:] %}{% endfor %}",
    "searches": "{% set s = 'a' * 10**7 %}{% for i in range(99999) %}{{ 'b' in s }}{{ s.find('b') }}{% endfor %}",
    "tests": "{% set s = 'a' * 10**7 %}{% for i in range(99999) %}{{ 'b' is in s }}{% endfor %}",
    "sum": "{{ ([[1]] * 99999) | sum(start=[]) }}",
}
LARGE = {
    "multiplied": "{{ 'a' * 10**10 }}",
    "multiplied list": "{{ [1] * 10**9 }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 ** 9 }}",
    "center": "{{ 'a' | center(10**10) }}",
    "center method": "{{ 'a'.center(10**10) }}",
    "center by map": "{{ ['a'] | map('center', 10**10) | list }}",
    "center by attr": "{{ ('a' | attr('center'))(10**10) }}",
    "filter block": "{% filter center(10**10) %}a{% endfilter %}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "tabs": "{{ ('\t' * 10**7).expandtabs(10**6) }}",
    "indent": "{{ ('\n' * 10**6) | indent(10**6) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent computed": "{{ '%*d' % (10**10, 1) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format computed": "{{ '{:{w}}'.format(1, w=10**10) }}",
    "replace": "{{ ('a' * 10**7).replace('a', 'b' * 10**7) }}",
    "replace filter": "{{ ('a' * 10**7) | replace('a', 'b' * 10**7) }}",
    "translate": "{{ 'abc'.translate({97: 'b' * 10**7, 98: 'b' * 10**7}) }}",
    "join": "{{ ('b' * 10**7).join('a' * 10**5) }}",
    "join filter": "{{ range(90000) | join('b' * 10**7) }}",
    "batch": "{{ [1] | batch(10**10, 1) | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "round": "{{ 1.5 | round(10**10, 'ceil') }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "json": "{{ range(99999) | list | tojson(indent=10**6) }}",
    "doubled by ~": growing("{% set ns.s = ns.s ~ ns.s %}"),
    "doubled by +": growing("{% set ns.s = ns.s + ns.s %}"),
    "doubled by a block": growing("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    "squared": growing("{% set ns.s = ns.s * ns.s %}", "3"),
    "lists of lists": growing("{% set ns.s = [ns.s, ns.s] %}", "[1]"),
    "mappings": growing("{% set ns.s = {'a': ns.s, 'b': ns.s} %}", "1", "{{ ns.s | tojson }}"),
    "tuples compared": growing("{% set ns.s = (ns.s, ns.s) %}", "1", "{{ ns.s == (1, 2) }}"),
    "dicts": growing("{% set ns.s = dict(a=ns.s, b=ns.s) %}", "1", "{{ ns.s | string }}"),
    "namespaces": growing("{% set ns.s = namespace(a=ns.s, b=ns.s) %}", "1", "{{ ns.s | string }}"),
    "batches": growing("{% set ns.s = [ns.s] | batch(2, ns.s) | first %}", "[1]", "{{ ns.s | string }}"),
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("source", (ENDLESS | LARGE).values(), ids=(ENDLESS | LARGE).keys())
def test_what_would_not_end_or_not_fit_is_one_message(source: str) -> None:
    with pytest.raises(TemplateError, match="too much time or memory") as caught:
        ChatTemplate(source).render(MESSAGES)
    assert caught.value.fix


def test_the_budget_is_that_of_one_render_in_one_thread() -> None:
    template = ChatTemplate("{% for i in range(30000) %}{% for j in range(20) %}{% endfor %}{% endfor %}ok")
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(template.render(MESSAGES))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [template.render(MESSAGES), *results] == ["ok"] * 4


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex }}{{ loop.last }}{{ loop.nextitem }} {% endfor %}",
        "{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }},{% endfor %}",
        "{% for k, v in {'b': 1, 'a': [1, 'x']} | dictsort %}{{ k ~ '=' ~ v ~ none }}{% else %}none{% endfor %}",
        "{% for x in missing %}{{ x }}{% else %}none{% endfor %}{{ missing ~ 'a' }}{{ 'a' in [missing, 'a'] }}",
        "{% set ns = namespace(n=0) %}{% for x in messages if x.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{{ [1, 2] + [3] }}{{ (1, 2) * 2 }}{{ 'ab' * 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ '%s-%03d' % ('a', 7) }}{{ '%s' | format('x') }}",
        "{{ 'a,b'.split(',') | join('-') }}{{ '{:>4}|{a}'.format(1, a=2) }}{{ 'x'.center(5) }}{{ 'ab' | center(6) | trim }}",
        "{{ [3, 1, 2] | sort | first }}{{ [[1], [2]] | sum(start=[]) }}{{ [{'a': 1}, {'a': 2}] | sum('a') }}{{ [1, 2] | sum }}",
        "{{ 'abc'[::-1] }}{{ messages[0:1] | length }}{{ (1 < 2 < 3) and 'a' != 'b' }}{{ {'a': [1]} | tojson(indent=2) }}",
        "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller else '' }}{% endmacro %}{{ f(1) }}{% call f(3) %}in{% endcall %}",
        "{% autoescape true %}{{ messages[0].role ~ '<' ~ ('<b>' | safe) }}{% endautoescape %}{{ '<' | e }}{{ ['<'] | join('&') }}",
        "{{ 'a\nb' | indent(2, true) }}{{ [1, 2, 3] | batch(2, 0) | list }}{{ 1.25 | round(1) }}{{ {'a': 1}.items() | list }}",
    ],
)
def test_what_a_template_may_do_is_as_in_transformers(source: str) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    (expected,), _ = render([MESSAGES], chat_template=source)
    assert ChatTemplate(source).render(MESSAGES, add_generation_prompt=False) == expected


def test_a_prompt_of_a_million_tokens_is_far_from_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 1000}] * 1000
    source = "{% for m in messages %}{% if '</think>' not in m.content %}{{ m.role ~ (m.content | trim) }}{% endif %}{% endfor %}"
    assert 4_900_000 < len(ChatTemplate(source).render(messages)) < MAX_CHARS
