"""``python -m jaxaccel`` as its users type it: usage, statuses, what it survives."""

import io
import json
import os
import subprocess
import sys

import pytest

import jaxaccel
from jaxaccel.__main__ import main
from jaxaccel._commands import _doctor, _facts, _layout, _runtime

QUICK = ["doctor", "--quick"]


def run(*arguments, **environment):
    """In a process of its own."""
    command = [sys.executable, "-m", "jaxaccel", *arguments]
    environment = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def broken(tmp_path):
    """A folder with a jax that cannot be imported, for PYTHONPATH."""
    (tmp_path / "jax.py").write_text("raise RuntimeError('jaxlib is of\\nanother version')")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["examine"], "invalid choice: 'examine'"),
        (["doctor", "--fast"], "unrecognized arguments: --fast"),
        (["report"], "the following arguments are required: DIR"),
        (["report", "x", "--batch", "3"], "--batch: give --time too"),
        (["report", "x", "--time", "--batch", "0"], "'0' is not a whole number from 1 on"),
        (["report", "x", "--time", "--batch", "two"], "'two' is not a whole number from 1 on"),
        (["report", "x", "\x1b[2J"], r"unrecognized arguments: \x1b[2J"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("python -m jaxaccel")
    assert out == ""


def test_help_and_version(capsys):
    for arguments in (["--help"], ["--version"], ["doctor", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "doctor         what is here, how fast it is, what to mend" in out
    assert "report         what is in an artefact of jx.export.save" in out
    assert f"jaxaccel {jaxaccel.__version__}\n" in out
    assert out.count("Status: 0") == 2


def test_without_jax(broken):
    found = run("doctor", "--json", PYTHONPATH=broken, XLA_FLAGS="")
    content = json.loads(found.stdout)
    assert (found.returncode, found.stderr) == (1, "")
    assert content["runtime"]["imported"] is False
    (fault,) = [one for one in content["findings"] if one["fault"]]
    assert fault["what"] == "JAX does not start"
    assert fault["why"] == "RuntimeError: jaxlib is of"
    assert fault["mend"].startswith("pip install 'jax>=0.10,<")
    assert content["packages"]["required"][0]["name"] == "jax"

    found = run("report", "x", PYTHONPATH=broken)
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr == (
        "python -m jaxaccel report: jaxlib is of another version; `python -m jaxaccel doctor` "
        "says what to mend\n"
    )


def test_who_reads_may_stop(broken):
    command = [sys.executable, "-m", "jaxaccel", *QUICK]
    environment = os.environ | {"PYTHONPATH": broken, "XLA_FLAGS": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a disk that is full")
def test_a_full_disk(broken):
    command = [sys.executable, "-m", "jaxaccel", *QUICK]
    environment = os.environ | {"PYTHONPATH": broken, "XLA_FLAGS": ""}
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    assert found.returncode == 1
    assert found.stderr == "python -m jaxaccel doctor: No space left on device\n"


def test_flags_that_end_the_process():
    """XLA ends the whole process for one that it does not know."""
    found = run(*QUICK, XLA_FLAGS="--xla_no_such_flag=1")
    assert found.returncode == 1
    assert "FAULT  JAX does not start\n" in found.stdout
    words = " ".join(found.stdout.split())  # lines break by how long the process number is
    assert "Unknown flag in XLA_FLAGS: --xla_no_such_flag=1" in words
    assert "-> unset XLA_FLAGS\n" in found.stdout
    assert "Reached by the default device\n  not measured\n" in found.stdout


def test_what_a_probe_tells():
    assert _runtime.aborted("print('Python goes on')") is None
    assert (
        _runtime.aborted("import os; os.abort()") == "starting it ends the process, with status -6"
    )
    ended = "starting it ends the process, with status 1: "
    assert _runtime.aborted("raise SystemExit('why')") == f"{ended}why"
    assert _runtime.aborted("input()") == f"{ended}EOFError: EOF when reading a line"
    slow = "import time; time.sleep(9)"
    assert _runtime.aborted(slow, 0.1) == "starting it takes longer than 0.1 seconds"


def test_it_loads_neither_flax_nor_optax():
    code = (
        "import sys; from jaxaccel.__main__ import main; status = main(['doctor', '--quick']); "
        "print([m for m in ('flax', 'optax', 'onnx', 'rich') if m in sys.modules], status)"
    )
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert found.stdout.endswith("\n[] 0\n")
    assert "  flax " in found.stdout
    assert found.stderr == ""


def test_interrupted(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(_doctor, "facts", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr() == ("", "python -m jaxaccel doctor: interrupted\n")


@pytest.mark.parametrize("arguments", [QUICK, ["doctor"], [*QUICK, "--json"]])
def test_what_doctor_passes_on(arguments, monkeypatch, capsys):
    monkeypatch.setattr(_runtime, "_may_abort", lambda: False)  # for the flags of the tests
    given, found = [], _facts.facts(measure=False)
    monkeypatch.setattr(_doctor, "facts", lambda measure, show: given.append(measure) or found)
    status = main(arguments)
    assert given == [arguments == ["doctor"]]
    out = capsys.readouterr().out
    if "--json" in arguments:
        content = json.loads(out)
        assert content["machine"]["cores"]["allowed"] == found.machine.cores.allowed
        assert content["broken"] is bool(status)
    else:
        assert out.startswith(f"jaxaccel {jaxaccel.__version__}\n\nMachine\n  Python ")


def test_what_a_terminal_would_obey_is_written_out(capsys):
    _layout.show("a\x1b[31m\u202eb\ud800\nc")
    assert capsys.readouterr().out == "a\\x1b[31m\\u202eb\\ud800\nc\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        _layout.show("caf\xe9")
        sys.stdout.flush()
        assert sys.stdout.buffer.getvalue() == b"caf\\xe9\n"  # pyright: ignore[reportAttributeAccessIssue]
    _layout.complain("report", "one\nline \x07\xe9")
    assert capsys.readouterr().err == "python -m jaxaccel report: one line \\x07\xe9\n"
