"""Chat templates are foreign programs: they fail, never end, or flood, and the run says so."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import weakref

import pytest
from conftest import items, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_pruner import chat_template
from llm_pruner.chat_template import render_chat, render_within_limits
from llm_pruner.data.tokens import encode_pair
from llm_pruner.errors import LoadError
from llm_pruner.evaluation.likelihood import perplexity
from llm_pruner.evaluation.tasks import HolisticEvaluator
from llm_pruner.utils import render_prompt, tokenizer_fingerprint

USUAL = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LOOP = "{% for i in range(99999) %}" * 3 + "{{ i }}" + "{% endfor %}" * 3
MESSAGES = [{"role": "user", "content": "the cat"}]


def tokenizer_with(template):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def renderers():
    return [thread for thread in threading.enumerate() if "chat template" in thread.name]


def gone(threads):
    """Whether they end: nothing goes on burning time."""
    for thread in threads:
        thread.join(10)
    return not any(thread.is_alive() for thread in threads)


FAILING = {
    "{{ raise_exception('no\n users') }}": r"fails \(TemplateError: no users\)",
    "{% for %}": r"fails \(TemplateSyntaxError: ",
    "{{ messages[0].content + 1 }}": r"fails \(TypeError: ",
    "{{ messages[9].content.x }}": r"fails \(UndefinedError: ",
    "{{ 1 / 0 }}": r"fails \(ZeroDivisionError: ",
    "{{ {}['a']['b'] }}": r"fails \(UndefinedError: ",
    "{{ ''.__class__.__mro__ }}": r"fails \(SecurityError: ",
    "{{ messages.append(1) }}": r"fails \(SecurityError: ",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": r"fails \(RecursionError: ",
    "{{ '%d' | format('a') }}": r"fails \(TypeError: ",
    "{{ 'x' * (10 ** 17) }}": r"fails \(MemoryError",
    "{% for i in range(9999999) %}{% endfor %}": r"fails \(OverflowError: ",
    "{{ '\\ud800' }}": "gives text that is not valid Unicode",
    "{{ 'x' * 20000000 }}": "gives 20,000,000 characters, more than 10,000,000",
}


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_named(template):
    tokenizer = tokenizer_with(template)
    message = f"The chat template of the tokenizer {FAILING[template]}.*: fix or remove chat_templ"
    with pytest.raises(LoadError, match=message):
        render_chat(tokenizer, MESSAGES)
    with pytest.raises(LoadError, match=message):
        render_prompt(tokenizer, "the cat")
    with pytest.raises(LoadError, match=message):
        encode_pair(tokenizer, "the cat", "sat")


@pytest.mark.parametrize("template", [5, {"other": USUAL}, ["a"], object()])
def test_a_template_of_no_known_kind(template):
    with pytest.raises(LoadError, match=r"The chat template of the tokenizer fails \("):
        render_chat(tokenizer_with(template), MESSAGES)


def test_a_template_may_fail_where_the_answer_is_added():
    tokenizer = tokenizer_with("{% if not add_generation_prompt %}{{ 1 / 0 }}{% endif %}a")
    assert render_prompt(tokenizer, "the cat") == "a"
    with pytest.raises(LoadError, match="ZeroDivisionError"):
        encode_pair(tokenizer, "the cat", "sat")


@pytest.mark.parametrize("template", [LOOP, LOOP.replace("{{ i }}", "")])
def test_a_template_that_does_not_end_is_stopped(monkeypatch, llama, template):
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    tokenizer = tokenizer_with(template)
    for door in (
        lambda: perplexity(llama, tokenizer, items()),
        lambda: HolisticEvaluator(llama, tokenizer).generate(["the cat"]),
    ):
        before = renderers()
        with pytest.raises(LoadError, match=r"does not end within 0\.3 seconds: fix or remove ch"):
            door()
        assert gone(set(renderers()) - set(before))
    monkeypatch.undo()
    assert render_chat(tokenizer_with(USUAL), MESSAGES).startswith("<|user|>the cat")


def test_an_interruption_stops_the_template():
    tokenizer = tokenizer_with(LOOP)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            render_chat(tokenizer, MESSAGES)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert gone([thread for thread in renderers() if thread not in chat_template._idle])


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(TEXTS, TEXTS, st.booleans())
def test_usual_rendering_is_what_transformers_gives(question, answer, opened):
    tokenizer = tokenizer_with(USUAL)
    messages = [*MESSAGES, {"role": "assistant", "content": answer}]
    messages[0] = {"role": "user", "content": question}
    options = {"add_generation_prompt": opened}
    direct = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert render_chat(tokenizer, messages, **options) == direct
    assert messages[0] == {"role": "user", "content": question}


def test_one_thread_serves_one_caller_after_the_other():
    tokenizer = tokenizer_with(USUAL)
    render_chat(tokenizer, MESSAGES)
    before = renderers()
    assert {render_prompt(tokenizer, f"{i} cats")[8:9] for i in range(50)} == {*"0123456789"}
    assert renderers() == before


def test_callers_at_the_same_time_get_their_own():
    tokenizer = tokenizer_with(USUAL)
    found = {}

    def ask(number):
        found[number] = [render_prompt(tokenizer, f"cat {number}") for _ in range(50)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    assert gone(threads)
    for number in range(8):
        assert set(found[number]) == {f"<|user|>cat {number}</s>\n<|assistant|>"}


def _in_child(template, results):
    results.put(render_chat(tokenizer_with(template), MESSAGES))


def test_a_forked_process_renders_too():
    render_chat(tokenizer_with(USUAL), MESSAGES)  # the parent has a thread, the child none
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(USUAL, results))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert results.get() == render_chat(tokenizer_with(USUAL), MESSAGES)


def test_nothing_is_kept_between_two_texts():
    class Work:
        def __call__(self):
            return "text"

    work = Work()
    weak = weakref.ref(work)
    assert render_within_limits(work) == "text"
    del work
    assert weak() is None


def test_a_template_of_half_characters_has_a_fingerprint():
    one, other = (tokenizer_with(text) for text in ("\ud800", "\ud801"))
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
