"""Damaged journals: whatever becomes of them, the same layers are chosen."""

from __future__ import annotations

import random

import pytest
from conftest import items, tiny_llama

from llm_pruner import SmartPruner
from llm_pruner.errors import OutputError

DAMAGES = {
    "a digit": lambda lines, draw: _edit(lines, draw, digits=True),
    "a byte": lambda lines, draw: _edit(lines, draw, digits=False),
    "cut": lambda lines, draw: [*lines[:-1], lines[-1][: draw.randrange(len(lines[-1]))]],
    "doubled": lambda lines, draw: [*lines, draw.choice(lines)],
    "shuffled": lambda lines, draw: draw.sample(lines, len(lines)),
    "swapped": lambda lines, draw: _swap(lines, draw, b'"values"'),
    "of others": lambda lines, draw: _swap(lines, draw, b'"removed"'),
    "infinite": lambda lines, draw: [line.replace(b"[[", b"[[Infinity, ") for line in lines],
    "nested": lambda lines, draw: [*lines, b"[" * 5000, b'{"key": ' + b"[" * 5000],
    "not text": lambda lines, draw: [*lines, bytes(range(128, 256))],
    "huge": lambda lines, draw: [*lines, b'{"chunk": ' + b"9" * 5000 + b"}"],
}


def _edit(lines, draw, digits):
    number = draw.randrange(len(lines))
    line = bytearray(lines[number])
    places = [n for n, byte in enumerate(line) if not digits or chr(byte).isdigit()]
    line[draw.choice(places)] = draw.choice(b"0123456789" if digits else bytes(range(256)))
    return [*lines[:number], bytes(line), *lines[number + 1 :]]


def _swap(lines, draw, field):
    """Give a line what another has from a field on."""
    left, right = draw.sample(range(len(lines)), 2)
    lines = list(lines)
    heads, tails = zip(*(lines[n].split(field, 1) for n in (left, right)), strict=True)
    lines[left], lines[right] = heads[0] + field + tails[1], heads[1] + field + tails[0]
    return lines


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def chosen(model, tokenizer, journal):
    pruner = SmartPruner(model, tokenizer, journal=journal, batch_size=2)
    plan = pruner.plan(items(12), n_layers=3)
    return plan.remove, pruner.steps[-1]["change"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_changes_nothing(model, tokenizer, tmp_path, damage, caplog):
    journal = tmp_path / "j.jsonl"
    wanted = chosen(model, tokenizer, None)
    assert chosen(model, tokenizer, journal) == wanted
    whole = journal.read_bytes().splitlines()
    for seed in range(4):
        journal.write_bytes(b"\n".join(DAMAGES[damage](whole, random.Random(seed))))
        assert chosen(model, tokenizer, journal) == wanted
    if damage in ("infinite", "nested", "huge"):
        assert "damaged, and are made again" in caplog.text


def test_a_journal_of_other_weights_is_not_used(model, tokenizer, tmp_path):
    """Also where they differ in a value that no sample looks at, changed in place."""
    other = tiny_llama()
    journal = tmp_path / "j.jsonl"
    chosen(other, tokenizer, journal)
    other.model.layers[4].mlp.down_proj.weight.data[3, 5:11] *= 40
    assert chosen(other, tokenizer, journal) == chosen(other, tokenizer, None)


def test_what_is_no_journal_is_left_alone(model, tokenizer, tmp_path):
    for content in (b"notes\n", b'{"a": 1}\n' * 2000, b"\0" * 50):
        path = tmp_path / "mine.jsonl"
        path.write_bytes(content)
        with pytest.raises(OutputError, match="it is no journal of llm_pruner"):
            chosen(model, tokenizer, path)
        assert path.read_bytes() == content
