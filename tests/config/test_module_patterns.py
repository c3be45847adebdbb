"""Quantisation settings after a removal, compared with each dialect's rules written out anew."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from llm_pruner.config import module_patterns
from llm_pruner.config.layer_names import LayerNames
from llm_pruner.config.module_patterns import follow_config, follow_removal, module_names
from llm_pruner.config.pattern_dialects import AUTO_ROUND, GLOB, PART, REGEX, SKIP
from llm_pruner.errors import UnsupportedModelError

PREFIX = "model.layers."
PARTS = ("self_attn.q_proj", "mlp.gate", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")


def checkpoint(depth: int, prefix: str = PREFIX, past: int = 0, tower: int = 0) -> list[str]:
    """Names of tensors; layer 0 is dense, as in models of DeepSeek."""
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    names += [f"{prefix}{i}.{p}.weight" for i in range(depth) for p in PARTS[: 2 if i < 1 else 4]]
    names += [f"{prefix}{depth + i}.{p}.weight" for i in range(past) for p in (*PARTS, "eh_proj")]
    names += [f"vision_tower.encoder.layers.{i}.{p}.weight" for i in range(tower) for p in PARTS]
    return names


def brute_modules(tensors: Iterable[str]) -> set[str]:
    split = [name.split(".") for name in tensors]
    return {".".join(words[:end]) for words in split for end in range(1, len(words) + 1)}


def renamed(name: str, depth: int, kept: list[int], prefix: str = PREFIX) -> str | None:
    """The slow twin of LayerNames.rename."""
    if not re.match(re.escape(prefix) + r"\d+(\.|$)", name):
        return name
    number, dot, rest = name.removeprefix(prefix).partition(".")
    order = [*kept, *range(depth, depth + 100)]
    return f"{prefix}{order.index(int(number))}{dot}{rest}" if int(number) in order else None


# How those who read the settings decide that an entry selects a module.
def by_glob(entry: str, name: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return fnmatch.fnmatchcase(name, entry)


def by_dynamic(entry: str, name: str) -> bool:
    return re.match(entry.removeprefix("-:").removeprefix("+:"), name) is not None


def by_auto_round(entry: str, name: str) -> bool:
    special = any(character in r"*+?^$()[]{}|\\" for character in entry)
    return entry == name or (special and re.search(entry, name) is not None)


def by_transformers(entry: str, name: str) -> bool:
    words = name.split(".")
    modules = [".".join(words[:end]) for end in range(1, len(words) + 1)]
    return any(not should_convert_module(module, [entry]) for module in modules)


def by_part(entry: str, name: str) -> bool:
    return entry in name


def assert_follows(
    old: Iterable[str],
    new: Iterable[str],
    rule: Callable[[str, str], bool],
    names: Iterable[str],
    rename: Callable[[str], str | None],
) -> None:
    """That `new` selects, of the pruned model, what `old` selected, and nothing else."""
    names = list(names)
    want = {rename(name) for name in names if any(rule(entry, name) for entry in old)} - {None}
    after = {rename(name) for name in names} - {None}
    assert {name for name in after if any(rule(entry, name) for entry in new)} == want


def follow(settings, depth, kept, tensors, prefix=PREFIX):
    return follow_removal(settings, LayerNames((prefix,), depth), kept, module_names(tensors))


def without(depth: int, *removed: int) -> list[int]:
    return [index for index in range(depth) if index not in removed]


def test_modules_are_all_that_contain_a_tensor():
    tensors = checkpoint(3, past=1, tower=2)
    assert module_names(tensors) == brute_modules(tensors)
    assert module_names(iter(["a.b.c", "a.b"])) == {"a", "a.b", "a.b.c"}


DEPTHS = {  # removals of one layer, the first, the last, several; digit prefixes from 11 on
    3: [[1], [0], [2], [0, 1]],
    12: [[2, 3, 7], [0], [11], list(range(1, 12))],
    25: [[0, 1, 2], [10], list(range(5, 25)), [3, 13, 23]],
    130: [[0], [129], list(range(20, 110))],
}
REMOVALS = [(depth, removed) for depth, sets in DEPTHS.items() for removed in sets]
GLOBS = (
    "model.layers.0* model.layers.1* model.layers.2.* model.layers.2* *layers.1.mlp* *.mlp.gate "
    "model.layers.1?.mlp* model.layers.[12].self_attn* model.layers.* model.layers.1 *1* "
    "model.layers.?.mlp.gate *.2.mlp.experts.1* model.layers.2.mlp.gate lm_head *layers.1* *"
).split()
REGEXES = (
    r"re:.*layers\.2\..* re:model\.layers\.1\.mlp\..* re:.*\.(0|1|2)\.mlp\.gate re:model.layers.1 "
    r"re:.*layers\.[0-2]\..*gate re:.*layers\.(?:1|2)\.mlp re:.*self_attn.* re:model.layers.\d\. "
    r"re:^model\.layers\.(1\d|2)\.mlp\.experts\.1 re:.*layers.1..* re:.*mlp\.(gate|up)$ re:lm_head "
    r"re:(?!.*layers\.1\.).*gate re:model\.layers\.1[0-5]\.self_attn.*"
).split()


@pytest.mark.parametrize(("depth", "removed"), REMOVALS)
@pytest.mark.parametrize("tower", [0, 4])
def test_globs_and_regexes_follow_one_by_one(depth, removed, tower):
    tensors, kept = checkpoint(depth, past=1, tower=tower), without(depth, *removed)
    names = brute_modules(tensors)
    for entry in (*GLOBS, *REGEXES):
        new = follow({"ignore": [entry]}, depth, kept, tensors)["ignore"]
        assert_follows([entry], new, by_glob, names, lambda name: renamed(name, depth, kept))


@pytest.mark.parametrize(("depth", "removed"), REMOVALS)
@pytest.mark.parametrize("tower", [0, 4])
@pytest.mark.parametrize("rule", [by_transformers, by_part])
def test_lists_of_modules_to_skip_follow_one_by_one(depth, removed, tower, rule):
    tensors, kept = checkpoint(depth, past=1, tower=tower), without(depth, *removed)
    entries = (
        "layers.1.mlp model.layers.2. layers.2 model.layers.1 gate lm_head model.layers.1.mlp.gate "
        "vision_tower vision_tower.encoder.layers.1 layers.2.mlp.experts.1.up_proj self_attn "
        "model.layers.*.self_attn model.layers.[1-3]..*gate$ model.layers.(0|2|10).mlp"
    ).split()
    method = "awq" if rule is by_part else "fp8"
    for entry in entries:
        given = {"quant_method": method, "modules_to_not_convert": [entry]}
        new = follow(given, depth, kept, tensors)["modules_to_not_convert"]
        if rule is by_transformers and entry.endswith("."):
            continue  # to transformers that dot is any character, a slip: see the test below
        # A short name means what is below it as well, though transformers 5 asks for a root.
        short = [f".*{entry}"] if rule is by_transformers and entry.startswith("layers") else []
        assert_follows(
            [entry, *short],
            [*new, *(f".*{text}" for text in new if text.startswith("layers"))],
            rule,
            tensors,
            lambda name: renamed(name, depth, kept),
        )


def test_a_dot_at_the_end_of_a_name_is_a_dot():
    """Its author means layer 2, whether or not a reader takes it for a regex and 20 for a hit."""
    given = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.2."]}
    for removed, new in ((1, ["model.layers.1."]), (2, []), (20, ["model.layers.2."])):
        follows = follow(given, 25, without(25, removed), checkpoint(25))
        assert follows["modules_to_not_convert"] == new


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_pattern_follows_any_removal(data):
    depth = data.draw(st.sampled_from([3, 11, 24]))
    kept = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1)))
    tensors = checkpoint(
        depth, past=data.draw(st.integers(0, 2)), tower=data.draw(st.sampled_from([0, 3]))
    )
    number = st.integers(0, depth + 1).map(str)
    regex = data.draw(st.booleans())
    words = ["model.", "layers.", "mlp", ".mlp.gate", ".", "experts.", "*", "?", "[0-2]", "[!1]"]
    parts = [r"model\.", r"layers\.", "layers.", "mlp", r"\.", ".", ".*", r"\d", r"\d+", "(1|2)"]
    parts += ["[0-2]", "(?:0|10|3)", "gate$", r"(?=.*gate)", "1?", "^"]
    pieces = st.one_of(st.sampled_from(parts if regex else words), number)
    start = data.draw(st.sampled_from(["", ".*" if regex else "*", "model.layers."]))
    entry = "re:" * regex + start + "".join(data.draw(st.lists(pieces, max_size=5)))
    try:
        re.compile(entry)
    except re.error:
        return
    new = follow([entry], depth, kept, tensors)
    rename = lambda name: renamed(name, depth, kept)  # noqa: E731
    assert_follows([entry], new, by_glob, brute_modules(tensors), rename)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_first_pattern_that_matches_still_decides(data):
    """GPTQModel's and AutoRound's dicts, with values that tell who decided."""
    depth = 12
    kept = sorted(data.draw(st.sets(st.integers(0, depth - 1), min_size=1)))
    tensors = checkpoint(depth, past=1, tower=2)
    signs = st.sampled_from(["+:", "-:", ""])
    texts = st.sampled_from(
        [r".*layers\.1\..*", r".*\.[0-4]\.mlp.*", r"model\.layers\.(3|7|11)\.", "model.layers.1",
         r".*layers\.12\..*", r".*gate", "model.layers.4.mlp.gate", r"^.*\.1\d\.self_attn\.q_proj$"]
    )  # fmt: skip
    entries = data.draw(st.lists(st.tuples(signs, texts), max_size=6, unique=True))
    dynamic = {sign + text: {"bits": bits} for bits, (sign, text) in enumerate(entries)}
    extra = {text: {"bits": bits} for bits, (_, text) in enumerate(entries)}
    new = follow({"dynamic": dynamic, "extra_config": extra}, depth, kept, tensors)

    def decided(found, rule, name):
        exact = [part for key, part in found.items() if key == name and rule is by_auto_round]
        hits = [(key[:2] == "-:", part) for key, part in found.items() if rule(key, name)]
        return exact[:1] or hits[:1]

    for name in brute_modules(tensors):
        if (now := renamed(name, depth, kept)) is not None:
            assert decided(new["dynamic"], by_dynamic, now) == decided(dynamic, by_dynamic, name)
            after = decided(new["extra_config"], by_auto_round, now)
            assert after == decided(extra, by_auto_round, name)


def test_names_are_spelled_as_before():
    """What a reader sees: new numbers wherever they suffice."""
    tensors = checkpoint(12, past=1, tower=1)
    given = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "version": "0.31.0",
        "block_name_to_quantize": "model.layers",
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.gate"]],
        "ignore": ["lm_head", "model.layers.2.mlp.gate", "model.layers.4.mlp.gate", "re:.*gate$",
                   r"re:.*layers\.4\.mlp.*", r"re:model\.layers\.(2|4|12)\.mlp.*",
                   "vision_tower.encoder.layers.2.mlp.gate", "model.layers.12*",
                   "model.layers.4.qkv_proj", "language_model.model.layers.9.self_attn*",
                   r"re:language_model\.layers\.1.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "num_bits": 4},
                          "group_1": {"targets": [r"re:.*layers\.2\..*", r"re:.*layers\.9\..*"]}},
        "model.layers.9.mlp.gate": {"bits": 8},
        "model.layers.3.mlp.gate": {"bits": 8},
        "kept": [None, 1, 2.5, True, "awq"],
    }  # fmt: skip
    new = follow(given, 12, without(12, 2, 3, 7), tensors)
    assert list(new) == [
        *list(given)[:-3],
        "model.layers.6.mlp.gate",
        "kept",
    ]
    assert new["ignore"] == [
        "lm_head", "model.layers.2.mlp.gate", "re:.*gate$", r"re:.*layers\.2\.mlp.*",
        r"re:model\.layers\.(2|9)\.mlp.*", "vision_tower.encoder.layers.2.mlp.gate",
        "model.layers.9*", "model.layers.2.qkv_proj", "language_model.model.layers.6.self_attn*",
        r"re:^language_model\.layers\.(?:1|7|8|9)(?:\..*)?$",
    ]  # fmt: skip
    assert new["config_groups"] == {
        "group_0": given["config_groups"]["group_0"],
        "group_1": {"targets": [r"re:.*layers\.6\..*"]},
    }
    same = "quant_method format version block_name_to_quantize modules_in_block_to_quantize kept"
    assert all(new[key] == given[key] for key in same.split())


def test_a_short_pattern_that_hits_a_tower_too_is_expanded():
    tensors = checkpoint(6, tower=6)
    given = {"llm_int8_skip_modules": ["layers.4.mlp"], "ignore": ["*layers.4.mlp.gate"]}
    new = follow(given, 6, without(6, 1), tensors)
    assert new == {
        "llm_int8_skip_modules": ["model.layers.3.mlp", "vision_tower.encoder.layers.4.mlp"],
        "ignore": ["model.layers.3.mlp.gate", "vision_tower.encoder.layers.4.mlp.gate"],
    }


def test_other_stacks_keep_their_numbers():
    """By name alone, whether their tensors are there or not."""
    tensors = [*checkpoint(6), "decoder.layers.4.fc.weight"]
    names = ["vision_tower.layers.4.fc", "mtp.layers.0*", "decoder.layers.4.fc", "my_layers.4"]
    for field in ("ignore", "modules_to_not_convert"):
        assert follow({field: names}, 6, [4, 5], tensors) == {field: names}


def test_settings_are_found_wherever_config_json_has_them():
    names = LayerNames(("language_model.model.layers.",), 6)
    tensors = checkpoint(6, prefix="language_model.model.layers.")
    ignore = {"ignore": ["language_model.model.layers.4.mlp.gate"]}
    exact = {"bits": 4, "language_model.model.layers.4.mlp.gate": {"bits": 8}}
    config = {
        "model_type": "x",
        "ignore": ["language_model.model.layers.4.mlp.gate"],
        "quantization": exact,
        "text_config": {"quantization_config": ignore, "num_hidden_layers": 6},
        "compression_config": ignore,
        "torch_dtype": "bfloat16",
    }
    new = follow_config(config, names, [0, 4], module_names(tensors))
    moved = {"ignore": ["language_model.model.layers.1.mlp.gate"]}
    assert new == config | {
        "quantization": {"bits": 4, "language_model.model.layers.1.mlp.gate": {"bits": 8}},
        "text_config": {"quantization_config": moved, "num_hidden_layers": 6},
        "compression_config": moved,
    }
    assert list(new) == list(config)
    assert config["compression_config"] is ignore
    assert ignore == {"ignore": ["language_model.model.layers.4.mlp.gate"]}


def test_layers_of_two_lists_follow_together():
    tensors = [f"{part}.{i}.w.weight" for part in ("enc.layers", "enc.blocks") for i in range(12)]
    names, kept = LayerNames(("enc.layers.", "enc.blocks."), 12), without(12, 0, 5)
    given = ["enc.layers.1*", r"re:enc\.\w+\.[0-6]\.w", "enc.blocks.7.w", "blocks.8.w"]
    new = follow_removal(given, names, kept, module_names(tensors))

    def rename(name):
        for prefix in names.prefixes:
            name = name and renamed(name, 12, kept, prefix)
        return name

    assert_follows(given, new, by_glob, brute_modules(tensors), rename)
    assert new[-2:] == ["enc.blocks.5.w", "blocks.6.w"]


def test_values_that_name_a_layer_follow_it():
    given = {"first": "model.layers.4.mlp", "gone": "model.layers.1.mlp", "none": None}
    new = follow(given, 6, without(6, 1), checkpoint(6))
    assert new == {"first": "model.layers.3.mlp", "none": None}
    assert follow("gptq", 6, [0], checkpoint(6)) == "gptq"


@pytest.mark.parametrize("method", [{"quant_method": "awq"}, {"zero_point": True}])
def test_awq_means_any_part_of_a_name(method):
    given = {**method, "modules_to_not_convert": ["model.layers.1", "model.layers.2."]}
    new = follow(given, 12, without(12, 0), checkpoint(12))["modules_to_not_convert"]
    assert new == ["model.layers.0.", "model.layers.10.", "model.layers.9.", "model.layers.1."]


def test_what_cannot_follow_is_refused_by_name():
    for bad in ({"ignore": ["re:model.layers.(1"]}, {"dynamic": {"-:*1": {}}}):
        with pytest.raises(UnsupportedModelError, match=r"\(1'|\*1'.*not a regular expression"):
            follow(bad, 6, [0, 2], checkpoint(6))
    # A name in full selects what ends so in another stack, and no list can except that.
    tensors = [*checkpoint(6), "x.model.layers.1.mlp.gate.weight"]
    message = r"'model.layers.4.mlp'.*removal of layers \[0, 1, 3\].*names of the modules"
    skip = {"modules_to_not_convert": ["model.layers.4.mlp"]}
    with pytest.raises(UnsupportedModelError, match=message):
        follow(skip, 6, [2, 4, 5], tensors)


class Counted(frozenset):
    """Names that count how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def large() -> list[str]:
    parts = [f"mlp.experts.{e}.{p}_proj" for e in range(250) for p in ("up", "gate", "down")]
    parts += [f"self_attn.{p}_proj" for p in "qkvo"]
    kinds = ("weight", "weight_scale")
    return [f"{PREFIX}{i}.{part}.{kind}" for i in range(60) for part in parts for kind in kinds]


def test_a_large_checkpoint_costs_a_look_per_pattern(monkeypatch):
    """90,000 tensors: names are not searched at all, patterns only where they may match."""
    tensors = large()
    assert len(tensors) > 90_000
    modules = Counted(module_names(tensors))
    names, kept = LayerNames((PREFIX,), 60), without(60, 7, 8, 30)
    exact = [f"{PREFIX}{i}.self_attn.q_proj" for i in range(60)]
    given = {"ignore": exact, "modules_in": ["self_attn.q_proj"], "quant_method": "fp8"}
    new = follow_removal(given, names, kept, modules)
    assert new["ignore"] == [f"{PREFIX}{i}.self_attn.q_proj" for i in range(57)]
    assert modules.passes == 0
    looks = 0
    containing = module_patterns._Names.containing

    def counted(self, part):
        nonlocal looks
        for name in containing(self, part):
            looks += 1
            yield name

    monkeypatch.setattr(module_patterns._Names, "containing", counted)
    given = [f"{PREFIX}{i}.self_attn*" for i in range(60)]
    assert follow_removal(given, names, kept, modules) == given[:57]
    given = [rf"re:.*layers\.{i}\.self_attn.*" for i in range(60)]
    assert follow_removal(given, names, kept, modules) == given[:57]
    assert modules.passes == 2
    assert looks < 10 * len(tensors) // 100


DIALECTS = [(GLOB, GLOBS), (SKIP, GLOBS), (PART, GLOBS)]
DIALECTS += [(dialect, [r.removeprefix("re:") for r in REGEXES]) for dialect in (REGEX, AUTO_ROUND)]


@pytest.mark.parametrize(("dialect", "entries"), DIALECTS)
def test_what_a_pattern_requires_is_in_all_that_it_selects(dialect, entries):
    names = brute_modules(checkpoint(12, tower=2))
    for entry in (*entries, "a?b", "model.l*ayers", "mode.+", "x|model"):
        try:
            matches, required = dialect.matcher(entry), dialect.required(entry)
        except re.error:
            continue
        assert all(required in name for name in names if matches(name)), entry
