"""Finding the files of a model in GGUF, reading them together, and joining them."""

from __future__ import annotations

import shutil

import pytest
from ggufs import contents, make_gguf, metadata

from llm_pruner.errors import LoadError
from llm_pruner.storage.gguf_models import (
    SPLIT_KEYS,
    find_gguf,
    is_companion,
    read_gguf_checkpoint,
    write_joined,
)


@pytest.fixture
def parts(tmp_path):
    """The files of a split model, of which the first one holds metadata alone."""
    make_gguf(tmp_path / "split" / "m.gguf", split_max_tensors=8, small_first_shard=True)
    return sorted((tmp_path / "split").glob("*.gguf"))


TENSOR = {"a": ("F32", 1, 8)}


def split(*values):
    """What a part of a model says of itself."""
    return dict(zip(SPLIT_KEYS, values, strict=False))


def test_a_file_is_its_own_model(tmp_path):
    path = make_gguf(tmp_path / "m.gguf")
    assert find_gguf(path) == find_gguf(str(path)) == find_gguf(tmp_path) == [path]
    checkpoint = read_gguf_checkpoint([path])
    assert checkpoint.architecture == "llama"
    assert checkpoint.values["llama.block_count"] == 4
    assert checkpoint.tensors.keys() == contents(path).keys()
    assert checkpoint.bytes == sum(len(raw) for _, _, raw in contents(path).values())


def test_any_part_means_all_of_them(parts):
    assert len(parts) > 3
    for path in (*parts, parts[0].parent):
        assert find_gguf(path) == parts
    checkpoint = read_gguf_checkpoint(parts)
    assert checkpoint.tensors.keys() == contents(*parts).keys()
    assert list(checkpoint.metadata) == list(checkpoint.files) == [x.name for x in parts]
    assert checkpoint.values["llama.block_count"] == 4


def test_joined_parts_are_the_whole(parts, tmp_path):
    whole = make_gguf(tmp_path / "whole.gguf")
    with (tmp_path / "joined.gguf").open("wb") as target:
        write_joined(read_gguf_checkpoint(parts), target)
    assert contents(tmp_path / "joined.gguf") == contents(whole) == contents(*parts)
    assert metadata(tmp_path / "joined.gguf") == metadata(whole)


@pytest.mark.parametrize(
    "name", ["demo", "org/model", "no-such-folder", "model.safetensors", "model.GGUF.bin"]
)
def test_what_is_no_gguf_is_left_to_others(name):
    assert find_gguf(name) == []


def test_a_path_in_the_home_folder_is_found(tmp_path, monkeypatch):
    path = make_gguf(tmp_path / "m.gguf")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert find_gguf("~/m.gguf") == [path]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(LoadError, match=r"There is no folder or file '.*none\.gguf'"):
        find_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("lost", [0, 1, -1])
def test_missing_parts_are_named(parts, lost):
    gone = parts.pop(lost)
    gone.unlink()
    for path in (*parts, parts[0].parent):
        with pytest.raises(LoadError, match=rf"1 of them are not beside it, such as '{gone.name}'"):
            find_gguf(path)


@pytest.mark.parametrize("name", ["m-00000-of-00002", "m-00003-of-00002", "m-00001-of-00000"])
def test_a_name_that_is_no_parts_name_is_that_of_a_file(tmp_path, name):
    path = make_gguf(tmp_path / f"{name}.gguf")
    assert find_gguf(path) == find_gguf(tmp_path) == [path]


@pytest.mark.parametrize("others", [["b.gguf"], ["b.gguf", "mmproj-a.gguf", "c.gguf"]])
def test_a_folder_with_several_models_names_them(tmp_path, others):
    for name in ("a.gguf", *others):
        make_gguf(tmp_path / name)
    with pytest.raises(LoadError, match=r"models in GGUF \(a.gguf, b.gguf.*e\.g\. '.*a\.gguf'"):
        find_gguf(tmp_path)


def test_parts_of_two_divisions_are_two_models(tmp_path):
    for name in ("a-00001-of-00002", "a-00002-of-00002", "a-00001-of-00003"):
        make_gguf(tmp_path / f"{name}.gguf")
    with pytest.raises(LoadError, match="holds 2 models in GGUF"):
        find_gguf(tmp_path)


@pytest.mark.parametrize(
    "companion", ["mmproj-model-f16.gguf", "model.imatrix.gguf", "Model-Imatrix.gguf"]
)
def test_companions_are_no_models(tmp_path, companion):
    path = make_gguf(tmp_path / "m.gguf")
    make_gguf(tmp_path / companion)
    assert is_companion(companion)
    assert find_gguf(tmp_path) == [path]


def test_a_model_may_be_called_like_a_companion(tmp_path):
    path = make_gguf(tmp_path / "m-imatrix-Q4_K.gguf")
    assert find_gguf(tmp_path) == [path]


@pytest.mark.parametrize(
    ("others", "found"),
    [
        (["model.safetensors"], False),
        (["config.json", "pytorch_model.bin"], False),
        (["config.json"], True),
        (["imatrix.dat", "README.md"], True),
        ([], True),
    ],
)
def test_a_folder_with_a_checkpoint_of_another_form_is_that_one(tmp_path, others, found):
    path = make_gguf(tmp_path / "m.gguf")
    (tmp_path / "folder.gguf").mkdir()
    for name in others:
        (tmp_path / name).touch()
    assert find_gguf(tmp_path) == ([path] if found else [])


def test_a_folder_without_models_holds_none(tmp_path):
    (tmp_path / "more").mkdir()
    assert find_gguf(tmp_path) == []


def test_models_in_folders_below_are_named(tmp_path):
    for name in ("Q4_K", "Q8_0"):
        make_gguf(tmp_path / name / "m.gguf")
    with pytest.raises(LoadError, match=r"in folders of their own: name one .*Q4_K"):
        find_gguf(tmp_path)
    (tmp_path / "config.json").touch()  # a checkpoint without its weights
    assert find_gguf(tmp_path) == []


def test_parts_in_another_order_are_refused(parts):
    parts[1].rename(parts[1].with_name("x"))
    parts[2].rename(parts[1])
    parts[1].with_name("x").rename(parts[2])
    with pytest.raises(LoadError, match=rf"'{parts[1].name}' .* it is part 2 of \d .* it is 1 of"):
        read_gguf_checkpoint(parts)


def test_a_part_under_another_name_is_refused(parts, tmp_path):
    alone = tmp_path / "alone.gguf"
    shutil.copy(parts[1], alone)
    with pytest.raises(LoadError, match=r"'alone.gguf' .* is one of \d parts .* keep their names"):
        read_gguf_checkpoint(find_gguf(alone))


def test_parts_that_share_a_tensor_are_refused(tmp_path):
    first = make_gguf(tmp_path / "m-00001-of-00002.gguf", split(0, 2), tensors=TENSOR)
    make_gguf(tmp_path / "m-00002-of-00002.gguf", split(1, 2), tensors=TENSOR)
    with pytest.raises(LoadError, match=rf"tensor 'a' stands in '{first.name}' too"):
        read_gguf_checkpoint(find_gguf(first))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (split(0, 1, 2), "says that the model has 2 tensors, not 1"),
        (split(0, 0, 2), "says that the model has 2 tensors, not 1"),
        (split(0, 3, 1), "is one of 3 parts"),
        ({SPLIT_KEYS[2]: 5}, "says that the model has 5 tensors, not 1"),
        (split(None, None, "many"), "says that the model has many tensors"),
    ],
)
def test_counts_that_are_wrong_are_refused(tmp_path, said, message):
    path = make_gguf(tmp_path / "m.gguf", said, tensors=TENSOR)
    with pytest.raises(LoadError, match=rf"'m\.gguf' of .*{message}"):
        read_gguf_checkpoint([path])


@pytest.mark.parametrize(
    "said",
    [
        {},
        split(0, 1, 1),
        split(0, 0, 1),
        split(None, 0, 0),
        {SPLIT_KEYS[1]: 1, SPLIT_KEYS[2]: 1},
        split("none", "none", 1),
    ],
)
def test_a_file_may_say_that_it_is_the_only_one(tmp_path, said):
    path = make_gguf(tmp_path / "m.gguf", said, tensors=TENSOR)
    assert read_gguf_checkpoint([path]).tensors.keys() == TENSOR.keys()


@pytest.mark.parametrize("said", [{}, split(1), split(1, "2"), split("1", 2), split(1, 3)])
def test_a_part_that_does_not_say_which_is_refused(tmp_path, said):
    first = make_gguf(tmp_path / "m-00001-of-00002.gguf", split(0, 2), tensors=TENSOR)
    second = make_gguf(tmp_path / "m-00002-of-00002.gguf", said, tensors={"b": ("F32", 1, 8)})
    with pytest.raises(LoadError, match=rf"'{second.name}' of"):
        read_gguf_checkpoint(find_gguf(first))


def test_a_damaged_part_is_named(parts):
    parts[2].write_bytes(parts[2].read_bytes()[:-40])
    with pytest.raises(LoadError, match=rf"'{parts[2].name}' of"):
        read_gguf_checkpoint(find_gguf(parts[0].parent))


def test_a_file_is_known_by_its_beginning_whatever_it_is_called(tmp_path):
    (tmp_path / "sha256-abc").write_bytes(b"GGUF and more")
    (tmp_path / "MODEL.GGUF").write_bytes(b"hi")
    (tmp_path / "notes.txt").write_text("GG")
    assert find_gguf(tmp_path / "sha256-abc") == [tmp_path / "sha256-abc"]
    assert find_gguf(tmp_path / "notes.txt") == []
    with pytest.raises(LoadError, match="does not begin with 'GGUF'"):
        read_gguf_checkpoint(find_gguf(tmp_path / "MODEL.GGUF"))
