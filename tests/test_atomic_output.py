"""Output: whole or absent, one writer at a time, nobody else's files lost, however a run ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from llm_pruner import atomic_output, output_rules
from llm_pruner.atomic_output import (
    NO_LOCKS,
    check_output,
    hold_output,
    staged_output,
    write_atomically,
)
from llm_pruner.errors import OutputError
from llm_pruner.output_rules import PLAN_FILE, check_file

CRASHING = Path(__file__).with_name("crashing.py")


def tree(folder):
    """All names below a folder, and what is in each file."""
    return {
        str(path.relative_to(folder)): content(path) if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def content(path):
    """What is in a file, without the list of files in a plan."""
    text = path.read_text()
    return json.loads(text)["text"] if path.name == PLAN_FILE else text


def write(out, text="new", **options):
    with staged_output(out, **options) as stage:
        (stage / PLAN_FILE).write_text(json.dumps({"text": text}))
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text(text)


def written(text):
    return {PLAN_FILE: text, "sub": None, "sub/file": text}


def python(code, *arguments):
    """A process of its own that runs `code`, and tells on stdout."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def file_size_limit(size):
    """No file can grow beyond `size` bytes inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- staging ----------------------------------------------------------------------------------


def test_nothing_is_seen_until_all_is_written(tmp_path):
    with staged_output(tmp_path / "deep" / "out") as stage:
        assert stage.parent == tmp_path / "deep"
        assert stage.name.startswith(".out.partial-")
        (stage / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert tree(tmp_path) == {"deep": None, "deep/out": None, "deep/out/file": "x"}


def test_modes_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with staged_output(tmp_path / "out") as stage:
            os.close(os.open(stage / "private", os.O_CREAT, 0o600))  # as safetensors does
        write_atomically(tmp_path / "single", "x")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {"out": 0o750, "private": 0o640, "single": 0o640}


def test_what_llm_pruner_did_not_write_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty: choose another, or replace it"):
        write(tmp_path / "out")
    with pytest.raises(OutputError, match=f"has no {PLAN_FILE}, so llm_pruner did not write"):
        write(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == {"notes.txt": "mine"}
    assert os.listdir(tmp_path) == ["out"]


def in_two_steps(monkeypatch):
    monkeypatch.setattr(atomic_output, "_swap", lambda left, right: False)


def in_one_step(monkeypatch):
    """As it is; and where it can be done, it is."""
    if sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    exchange = atomic_output._swap
    done = []
    monkeypatch.setattr(
        atomic_output, "_swap", lambda *pair: done.append(exchange(*pair)) or done[-1]
    )


@pytest.fixture(params=[in_one_step, in_two_steps])
def way(request, monkeypatch):
    """Both ways in which an earlier output is replaced."""
    request.param(monkeypatch)


def test_an_earlier_output_is_replaced_when_asked(tmp_path, way):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(OutputError, match="not empty"):
        write(out)
    assert tree(out) == written("old")
    write(out, overwrite=True)
    assert tree(out) == written("new")
    assert os.listdir(tmp_path) == ["out"]


def test_folders_are_swapped_in_one_step_where_the_system_can(tmp_path):
    (tmp_path / "left").mkdir()
    (tmp_path / "right").mkdir()
    (tmp_path / "left" / "file").write_text("x")
    if sys.platform == "linux":
        assert atomic_output._swap(tmp_path / "left", tmp_path / "right")
        assert tree(tmp_path) == {"left": None, "right": None, "right/file": "x"}
    with pytest.raises(FileNotFoundError, match="none"):
        atomic_output._swap(tmp_path / "left", tmp_path / "none")


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_file_system_that_cannot_swap_is_told_from_a_failure(tmp_path, monkeypatch, platform):
    class Libc:
        def __init__(self, code):
            self.code = code

        def renameat2(self, here, left, there, right, flags):
            assert (platform, here, there) == ("linux", -100, -100)
            return self.answer(left, right, flags)

        def renamex_np(self, left, right, flags):
            assert platform == "darwin"
            return self.answer(left, right, flags)

        def answer(self, left, right, flags):
            assert (left, right, flags) == (os.fsencode(tmp_path), os.fsencode(tmp_path), 2)
            atomic_output.ctypes.set_errno(self.code)
            return -1 if self.code else 0

    def swap(code):
        monkeypatch.setattr(atomic_output.ctypes, "CDLL", lambda name, use_errno: Libc(code))
        return atomic_output._swap(tmp_path, tmp_path)

    monkeypatch.setattr("sys.platform", platform)
    assert swap(0)
    assert not any(map(swap, atomic_output.CANNOT_SWAP))
    with pytest.raises(PermissionError):
        swap(atomic_output.errno.EACCES)


def test_the_old_output_is_put_back_if_the_new_one_cannot_be_put_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "old")
    in_two_steps(monkeypatch)
    rename = Path.rename

    def refused(self, target):
        if ".partial-" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(OutputError, match=r"failed: .*Input/output error\. Nothing was left"):
        write(out, overwrite=True)
    assert tree(tmp_path / "out") == written("old")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "too late to be seen"])
def test_what_appeared_meanwhile_is_not_replaced(tmp_path, monkeypatch, overwrite, seen):
    def appear(text):
        with staged_output(tmp_path / "out", overwrite=overwrite) as stage:
            (stage / "file").write_text("new")
            (tmp_path / "out").mkdir()
            if text:
                (tmp_path / "out" / "file").write_text(text)

    with monkeypatch.context() as patched:
        if not seen:
            for module in (atomic_output, output_rules):
                patched.setattr(module, "holds_something", lambda path: False)
        with pytest.raises(OutputError, match=r"not empty|has no pruning_plan"):
            appear("mine")
    assert tree(tmp_path) == {"out": None, "out/file": "mine"}
    (tmp_path / "out" / "file").unlink()
    (tmp_path / "out").rmdir()
    appear(None)
    assert tree(tmp_path) == {"out": None, "out/file": "new"}


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), SystemExit(143)])
def test_nothing_is_left_after_any_exception(tmp_path, error):
    def write_half():
        with staged_output(tmp_path / "deep" / "out") as stage:
            (stage / "half").write_text("x")
            raise error

    with pytest.raises(type(error)) as raised:
        write_half()
    assert raised.value is error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("(os error 28)")]
)
def test_what_the_system_refuses_is_an_output_error(tmp_path, error):
    def full():
        with staged_output(tmp_path / "out"):
            raise error

    with pytest.raises(OutputError, match=r"Writing .*out' failed: .*28.*Nothing was left\."):
        full()
    assert os.listdir(tmp_path) == []


def test_impossible_places_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(OutputError, match=f"{name}' is not a folder"):
            check_output(tmp_path / name)
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output("/proc/nothing/here")
    with pytest.raises(OutputError, match=r"cannot be written.*too long"):
        check_output(tmp_path / ("x" * 300))
    assert check_output(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert sorted(tree(tmp_path)) == ["file", "link"], "checking creates nothing"
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for name in (".", "..", "../../here"):
        with pytest.raises(OutputError, match="holds the current folder"):
            check_output(name, overwrite=True)
    monkeypatch.chdir("..")
    write("below")
    assert tree(tmp_path / "here" / "below") == written("new")


def test_a_disk_without_room_is_refused(tmp_path):
    with pytest.raises(OutputError, match=r"out' needs 1,\d{3},[\d,]+ bytes, and [\d,]+ are free"):
        write(tmp_path / "out", need=1 << 60)
    assert os.listdir(tmp_path) == []


def test_everything_is_on_the_disk_before_it_is_put_in_place(tmp_path, monkeypatch, way):
    """Each file and folder of the output first, the folder above it last."""
    out = tmp_path / "out"
    write(out, "old")
    done = []
    sync, put = os.fsync, atomic_output._put_in_place

    def watched(descriptor):
        done.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def putting(stage, path):
        assert {path.stat().st_ino for path in (stage, *stage.rglob("*"))} == set(done)
        done.clear()
        put(stage, path)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(atomic_output, "_put_in_place", putting)
    write(out, overwrite=True)
    assert done == [tmp_path.stat().st_ino]


# --- killed runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fresh", "over", "over-in-two-steps", "file"])
def test_a_run_killed_at_any_step_leaves_the_old_or_the_new(tmp_path, kind):
    """And the next run removes what it left; see crashing.py."""
    done = subprocess.run(
        [sys.executable, CRASHING, tmp_path, kind], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps, found = zip(*json.loads(done.stdout), strict=True)
    before = "absent" if kind == "fresh" else "old"
    between = ["gone"] if kind == "over-in-two-steps" else []  # until the next run, see below
    olds = found.index("new") - len(between)
    assert list(found) == [before] * olds + between + ["new"] * found.count("new")
    assert steps[-1] == "end"
    assert {"open", "os.fsync", "os.chmod"} <= set(steps)
    assert steps[olds - 1] == ("ctypes.dlsym" if kind == "over" else "os.rename")
    assert len(steps) > (10 if kind == "file" else 30)


@pytest.mark.parametrize("next_run", [check_output, hold_output, staged_output])
def test_an_old_output_between_two_steps_is_put_back(tmp_path, next_run):
    out, old = tmp_path / "out", tmp_path / ".out.old-abcd_123"
    write(out, "old")
    out.rename(old)
    if next_run is check_output:
        with pytest.raises(OutputError, match="not empty"):
            check_output(out)
        check_output(out, overwrite=True)
    elif next_run is hold_output:
        with hold_output(out):
            assert tree(out) == written("old")
    else:
        with pytest.raises(OutputError, match="not empty"):
            write(out)
    assert tree(out) == written("old")
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_output_is_removed_where_the_new_one_stands(tmp_path):
    write(tmp_path / "out")
    write(tmp_path / ".out.old-abcd_123", "old")
    with hold_output(tmp_path / "out"):
        assert os.listdir(tmp_path / "out")
    assert tree(tmp_path / "out") == written("new")
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_exactly_this_output_are_removed(tmp_path):
    ours = [".out.partial-abcd_123", ".out.partial-00000000"]
    others = [
        ".out.v2.partial-abcd_123",
        ".out.v2.old-abcd_123",
        ".outer.partial-abcd_123",
        "out.partial-abcd_123",
        ".out.partial-abcd_1234",
        ".out.partial-abcd_12",
        ".out.partial-ABCD_123",
        ".oxut.partial-abcd_123",
        ".out.partial",
    ]
    for name in (*ours, *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".out.partial-thatfile").write_text("no folder")
    write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".out.partial-thatfile", "out"])
    write(tmp_path / "o.ut")
    assert (tmp_path / ".oxut.partial-abcd_123").exists(), "a name is no pattern"


# --- one writer -------------------------------------------------------------------------------

HOLD = """
import sys
from llm_pruner.atomic_output import hold_output
with hold_output(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_at_once(tmp_path, monkeypatch):
    """However the output is spelled; other outputs are free; a dead run holds nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    other = python(HOLD, tmp_path / "out")
    assert other.stdout.readline() == "held\n"
    for spelled in ("out", "./out", "link/out", tmp_path / "x" / ".." / "out"):
        for attempt in (check_output, write):
            with pytest.raises(OutputError, match=r"Another run is writing '.*out': wait for it"):
                attempt(spelled)
    write(tmp_path / "out.v2")
    other.kill()
    other.communicate()
    assert ".out.lock" in os.listdir(tmp_path)
    write(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["link", "out", "out.v2"]


def test_a_run_that_ends_leaves_no_lock(tmp_path):
    other = python(HOLD, tmp_path / "deep" / "out")
    assert other.stdout.readline() == "held\n"
    assert tree(tmp_path / "deep") == {".out.lock": ""}
    other.communicate()
    assert os.listdir(tmp_path) == [], "nor the folder that was made for it"


def test_holds_of_one_thread_are_nested_and_keep_others_out(tmp_path):
    out, refused = tmp_path / "out", []

    def attempt():
        try:
            write(out)
        except OutputError as error:
            refused.append(str(error))

    with hold_output(out):
        write(out)
        with hold_output(out), staged_output(out, overwrite=True) as stage:
            check_output(out, overwrite=True)
            assert stage.exists(), "only the outermost hold removes leftovers"
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "Another run is writing" in refused[0]
    write(out, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


CONTEND = """
import os, sys
from pathlib import Path
from llm_pruner.errors import OutputError
from llm_pruner.atomic_output import hold_output
place, held, refused = Path(sys.argv[1]), 0, 0
print("ready", flush=True)
sys.stdin.readline()
while held < 150:
    try:
        with hold_output(place / "out"):
            os.close(os.open(place / "inside", os.O_CREAT | os.O_EXCL))
            os.unlink(place / "inside")
            held += 1
    except OutputError as error:
        assert "Another run" in str(error), error
        refused += 1
print(refused)
"""


def test_removing_the_lock_never_lets_two_in(tmp_path):
    """Four processes take and release it as fast as they can; inside, each is alone."""
    processes = [python(CONTEND, tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    refused = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum(refused) > 0, "they met"
    assert os.listdir(tmp_path) == []


# --- single files -----------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["text \u00e9\n", b"bytes \xff"])
def test_a_file_is_written_whole(tmp_path, content):
    path = tmp_path / "deep" / "file"
    for _ in range(2):
        write_atomically(path, content)
        data = content if isinstance(content, bytes) else content.encode()
        assert path.read_bytes() == data
        assert os.listdir(path.parent) == ["file"]


def test_a_file_that_cannot_be_written_keeps_its_content(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with file_size_limit(100), pytest.raises(OutputError, match=r"Cannot write .*too large"):
        write_atomically(path, "new" * 100)
    assert tree(tmp_path) == {"file": "old"}
    (tmp_path / "folder").mkdir()
    for impossible in (tmp_path / "folder", path / "below"):
        with pytest.raises(OutputError, match="Cannot write"):
            write_atomically(impossible, "new")
    assert tree(tmp_path) == {"file": "old", "folder": None}


def test_links_are_followed_and_what_is_no_file_is_written_to(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = python("import sys; print(open(sys.argv[1]).read())", tmp_path / "pipe")
    write_atomically(tmp_path / "pipe", "told")
    assert reader.communicate(timeout=30)[0] == "told\n"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


# --- what may not be replaced -------------------------------------------------------------------
@pytest.mark.parametrize("name", ["notes.txt", "sub/mine", ".hidden", "link"])
def test_a_file_that_was_put_into_an_output_is_never_lost(tmp_path, name):
    write(tmp_path / "out", "old")
    if name == "link":
        (tmp_path / "out" / name).symlink_to(tmp_path)
    else:
        (tmp_path / "out" / name).write_text("mine")
    before = tree(tmp_path)
    for attempt in (check_output, write):
        with pytest.raises(OutputError, match=f"holds '{name}' .1 such.*would be lost: move it"):
            attempt(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == before


def test_a_file_that_is_put_into_an_output_while_it_is_replaced_is_not_lost(tmp_path):
    write(tmp_path / "out", "old")

    def write_late():
        with staged_output(tmp_path / "out", overwrite=True) as stage:
            (stage / PLAN_FILE).write_text("{}")
            (tmp_path / "out" / "late").write_text("mine")

    with pytest.raises(OutputError, match=r"holds 'late'"):
        write_late()
    assert (tmp_path / "out" / "late").read_text() == "mine"
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_whose_files_are_not_listed_is_not_replaced(tmp_path):
    write(tmp_path / "out", "old")
    for text in ("{}", "[", '{"output_files": 7}', "[" * 10_000):
        (tmp_path / "out" / PLAN_FILE).write_text(text)
        with pytest.raises(OutputError, match="does not list which files llm_pruner wrote"):
            check_output(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("spelled", ["out/model", "out", "link/model"])
def test_what_a_run_reads_is_not_replaced(tmp_path, monkeypatch, spelled):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "model").mkdir()
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(OutputError, match="which this run reads"):
        check_output("out", overwrite=True, reads=["hub/model", spelled])
    check_output("out.v2", reads=["hub/model", spelled, "x" * 5000, "a\0b"])


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (None, "Output None is no path"),
        ("", "Output '' is no path"),
        (7, "Output 7 is no path"),
        ("a\0b", "cannot be a path"),
        ("x" * 300, "cannot be a path .File name too long"),
        ("~nobody-of-this-name/x", "cannot be a path"),
        ("loop/x", "cannot be a path .Too many levels of symbolic links"),
        ("\ud800", "cannot be a path"),
    ],
    ids=str,
)
def test_what_is_no_path_is_refused(tmp_path, monkeypatch, output, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for attempt in (check_output, write, lambda path: check_file(path, lambda there: True)):
        with pytest.raises(OutputError, match=reason):
            attempt(output)
    assert os.listdir(tmp_path) == ["loop"]


def test_a_single_file_is_checked_before_the_work(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    (tmp_path / "ours.yaml").write_text("ours")
    (tmp_path / "file").write_text("x")

    def check(path, reads=()):
        check_file(tmp_path / path, lambda there: there.read_text() == "ours", reads=reads)

    check("ours.yaml")
    check("deep/new.yaml")
    for path, reason in (
        ("mine.yaml", "llm_pruner did not write it"),
        ("", "is a folder"),
        ("file/new.yaml", "Not a directory"),
    ):
        with pytest.raises(OutputError, match=reason):
            check(path)
    with pytest.raises(OutputError, match="is read by this run"):
        check("ours.yaml", [tmp_path / "ours.yaml"])
    assert sorted(os.listdir(tmp_path)) == ["file", "mine.yaml", "ours.yaml"]


@pytest.mark.parametrize("kind", ["text", "folder"])
def test_a_lock_that_is_not_ours_is_left_alone(tmp_path, kind):
    lock = tmp_path / ".out.lock"
    lock.mkdir() if kind == "folder" else lock.write_text("mine")
    with pytest.raises(OutputError, match=r"\.out\.lock' is where the lock of this output goes"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == [".out.lock"]


@pytest.mark.parametrize("code", sorted(NO_LOCKS))
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    write(tmp_path / "out")
    assert (tmp_path / "out").is_dir()
    assert "has no locks" in caplog.text or code == errno.ENOSYS  # filelock has a way of its own


def test_a_lock_refused_once_leaves_nothing(tmp_path, monkeypatch):
    """Some file systems answer EACCES, which filelock takes for another run's lock."""
    flock, refusals = fcntl.flock, [errno.EACCES]

    def refuse_once(*arguments):
        if refusals:
            raise OSError(refusals.pop(), "refused")
        return flock(*arguments)

    monkeypatch.setattr("fcntl.flock", refuse_once)
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert not refusals


def test_a_stage_is_removed_when_no_descriptors_are_left(tmp_path):
    held = []

    def write_until_none_is_left():
        with staged_output(tmp_path / "out") as stage:
            (stage / "sub").mkdir()
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        with pytest.raises(OutputError, match="Too many open files"):
            write_until_none_is_left()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in held:
            os.close(descriptor)
    assert os.listdir(tmp_path) == []
