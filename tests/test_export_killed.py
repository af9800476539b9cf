"""Processes that are killed while they save: what is there is always whole."""

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import jaxaccel as jx
from jaxaccel.export._files import opened
from jaxaccel.export._manifest import FILES
from jaxaccel.export._save import exported
from tests.artefacts import FORMS, W, X, identical, net

SCRIPT = Path(__file__).with_name("save_again.py")
KILLS = 100


def program(seed):
    """With parameters of 2 MB, so that it takes a while."""
    w = np.random.default_rng(seed).normal(size=(3, 200_000)).astype("float32")
    return exported(net, {"w": w}, (X,), 0, ("cpu",)), w


@pytest.fixture
def saver(tmp_path):
    """A process that forks others, and the two arrays that they save in turn."""
    (one, first), (two, second) = program(0), program(1)
    (tmp_path / "programs").write_bytes(pickle.dumps([one, two]))

    def start(path):
        command = [sys.executable, str(SCRIPT), str(tmp_path / "programs"), str(path)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    started: list[subprocess.Popen] = []
    yield start, (first, second)
    for process in started:
        process.kill()
        process.communicate()


def ask(process):
    print(file=process.stdin, flush=True)
    return int(process.stdout.readline())


@pytest.mark.parametrize("form", FORMS)
def test_killed_while_saving(saver, form, tmp_path):
    start, arrays = saver
    path = tmp_path / "saved" / form
    jx.export.save(path, net, {"w": arrays[0]}, X, platforms=("cpu",))
    process, waits = start(path), random.Random(0)
    unfinished, met = 0, set()
    for kill in range(KILLS):
        child = ask(process)
        time.sleep(waits.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert process.stdout.readline() == "gone\n"
        left = [file.name for file in path.parent.iterdir() if file != path]
        assert len(left) <= 1, left  # the next one takes away what the last one left
        unfinished += len(left)
        with opened(path) as stored:
            met.add(stored.manifest.files["parameters"].sha256)
            for part in FILES:
                stored.read(part)
        if kill % 20 == 0:
            fn, params = jx.export.load(path)
            assert any(np.array_equal(params["w"], w) for w in arrays)
            assert fn(params, X).shape == (4, 200_000)
    assert len(met) == 2
    assert unfinished > KILLS / 4, "too few were killed at work"
    jx.export.save(path, net, {"w": arrays[0]}, X, platforms=("cpu",))
    assert os.listdir(path.parent) == [form]
    if path.is_dir():
        assert len(os.listdir(path)) == 3
    identical(jx.export.params(path), {"w": arrays[0]})


def test_read_while_another_saves(saver, tmp_path):
    """Each time one of the two, whole."""
    start, arrays = saver
    for form in FORMS:
        path = tmp_path / form
        jx.export.save(path, net, {"w": arrays[0]}, X, platforms=("cpu",))
        process = start(path)
        child, met, end = ask(process), [], time.monotonic() + 2
        while time.monotonic() < end:
            found = np.asarray(jx.export.params(path)["w"])
            met += [k for k, w in enumerate(arrays) if np.array_equal(found, w)] or [None]
        os.kill(child, signal.SIGKILL)
        assert {*met} == {0, 1}


@pytest.mark.parametrize("form", FORMS)
def test_several_save_at_once(saver, form, tmp_path):
    """One may not take what another just began for what a dead one left."""
    start, arrays = saver
    children = [ask(start(tmp_path / "saved" / form)) for _ in range(3)]
    time.sleep(2)
    for child in children:
        assert Path(f"/proc/{child}/stat").read_text().split()[2] != "Z", "one of them failed"
        os.kill(child, signal.SIGKILL)
    found = np.asarray(jx.export.params(tmp_path / "saved" / form)["w"])
    assert any(np.array_equal(found, w) for w in arrays)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_open_stays(form, tmp_path):
    path = tmp_path / form
    save = lambda w: jx.export.save(path, net, {"w": w}, X)
    save(W)
    with opened(path) as stored:
        other = threading.Thread(target=save, args=(W + 1,))
        other.start()
        other.join(1)
        for part in FILES:
            stored.read(part)
    other.join()
    identical(jx.export.params(path), {"w": W + 1})
