"""The file system refuses any one step: the old output or the new one, and nothing beside it."""

from __future__ import annotations

import errno
import os
import sys
import traceback

import pytest
from conftest import tiny_llama

from llm_pruner import prune_checkpoint
from llm_pruner.errors import LLMPrunerError

STEPS = {"open", "os.chmod", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}
REFUSED, WRONG = 3, 5


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "source"
    tiny_llama(4).save_pretrained(folder)
    return folder


def attempt(source, out, number, code):
    """How a fork ends in which the step `number` fails: 0, or REFUSED; and if there was a step."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        left = [number]

        def refuse(step, arguments):
            if step not in STEPS or not str(arguments[0]).startswith(str(source.parent)):
                return
            left[0] -= 1
            if left[0] == -1:
                os.write(writing, b"x")
                raise OSError(code, os.strerror(code), str(arguments[0]))

        status = WRONG
        try:
            sys.addaudithook(refuse)
            prune_checkpoint(source, [2], out, overwrite=True)
            status = 0
        except LLMPrunerError:
            status = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    _, ended = os.waitpid(child, 0)
    reached = bool(os.read(reading, 1))
    os.close(reading)
    return os.waitstatus_to_exitcode(ended), reached


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE, errno.EROFS], ids=errno.errorcode.get)
def test_a_step_that_fails_leaves_the_old_output_or_the_new(source, code):
    out = source.parent / f"out-{code}"
    prune_checkpoint(source, [1], out)
    before, around = names(out), sorted(os.listdir(source.parent))
    outcomes = set()
    for number in range(300):
        status, reached = attempt(source, out, number, code)
        assert status in (0, REFUSED), number
        outcomes.add(status)
        assert names(out) == before
        left = set(os.listdir(source.parent)) - set(around)
        if left:  # only where removing failed, and only until the next run
            prune_checkpoint(source, [1], out, overwrite=True)
            assert sorted(os.listdir(source.parent)) == around, number
        if not reached:
            break
    assert not reached, "all steps were tried"
    assert outcomes == {0, REFUSED}
