"""The study of objectives and calibration in `benchmarks/choices.py`, by slow twins."""

from __future__ import annotations

import json
import math
import sys

import choices
import peer_judge
import pytest
import torch
from conftest import items, tiny_llama

from llm_pruner import SmartPruner

LETTERS = "abc def ghi jkl mno pqr stu vwx yz "


def files(folder):
    texts = [LETTERS[n:] + LETTERS[:n] for n in range(len(LETTERS))]
    found = {}
    for name, some in (("one", texts[:12]), ("two", texts[12:24]), ("judge", texts[24:])):
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(json.dumps({"text": text * 4}) for text in some))
    rows = [{"prompt": text, "choices": ["ab", "cd"], "reference": "ab"} for text in texts[:6]]
    found["asked"] = folder / "asked.jsonl"
    found["asked"].write_text("\n".join(map(json.dumps, rows)))
    found["prompts"] = folder / "prompts.jsonl"
    found["prompts"].write_text("\n".join(map(json.dumps, items(8))))
    return found


def test_a_study_chooses_on_every_calibration_and_resumes(tokenizer, tmp_path, monkeypatch, capsys):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = files(tmp_path)
    monkeypatch.setattr(peer_judge, "WINDOW", 30)
    options = f"--model {tmp_path / 'model'} --calibrate one={found['one']} "
    options += f"both={found['one']},{found['two']} --own-words {found['prompts']} "
    options += f"--questions {found['asked']} --objective nll kl --n-tokens 400 --k 2 "
    options += f"--judge text={found['judge']} other={found['two']} --judge-tokens 200 "
    options += f"--tasks asked={found['asked']} --out {tmp_path / 'out.json'}"
    monkeypatch.setattr(sys, "argv", ["choices.py", *options.split()])
    choices.main()
    table = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert [(line[1], line[2]) for line in lines] == [
        (name, by) for name in ("one", "both", "own words", "questions") for by in ("nll", "kl")
    ] + [("questions", "accuracy=0.5,nll=0.5")]
    assert all(len(line[3].split(",")) == 2 for line in lines)

    def refused(*_, **__):
        raise AssertionError("chosen again")

    monkeypatch.setattr(SmartPruner, "plan", refused)
    choices.main()
    assert capsys.readouterr().out == table


def test_changes_are_weighted_means_with_their_standard_errors():
    full = {"a": {"loss": [2.0, 4.0], "tokens": [1.0, 2.0]}, "b": {"acc": [1.0, 1.0, 0.0, 0.0]}}
    cut = {"a": {"loss": [3.0, 8.0], "tokens": [1.0, 2.0]}, "b": {"acc": [0.0, 1.0, 0.0, 0.0]}}
    texts, tasks = peer_judge.changes(full, cut)
    spread = math.sqrt((1 - 5 / 3) ** 2 + (4 - 10 / 3) ** 2) / 3
    assert texts["a"] == pytest.approx((5 / 3, 1.96 * spread))
    assert texts["all kinds"] == pytest.approx(texts["a"])
    assert tasks[0] == -0.25
    draws = torch.tensor([-1.0, 0, 0, 0]).double()
    assert tasks[1] == pytest.approx(1.96 * float(draws.std(correction=0)) / 2)


def test_kinds_count_alike_and_their_errors_add_up_as_squares():
    assert peer_judge._together([(1.0, 0.3), (2.0, 0.4)]) == pytest.approx((1.5, 0.25))
