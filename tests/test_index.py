"""The index of experiments, and the one format of their results."""

import ast
import itertools
import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

from experiments import benchmark_report, common, dispatch, fold, index, int8_report
from tests.test_int8_speed import CASE, CHAIN

FOUND = index.every(index.RESULTS)
STEMS = [found.path.stem for found in FOUND]


def findings(results):
    return [f"{sum(results['rows'])} in all"]


def made(folder, **changes):
    """A file of results; a field that is None is left out."""
    path = folder / "made.json"
    common.write_json(path, {"rows": [1, 2.5]}, findings)
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def test_the_index_is_what_the_results_say():
    index.main(["--check"])


def test_a_page_that_is_not_is_refused(tmp_path, monkeypatch, capsys):
    stale = tmp_path / "README.md"
    monkeypatch.setattr(index, "README", stale)
    for text in (None, index.page(FOUND).replace("2026-11-21", "2026-11-20", 1)):
        if text:
            stale.write_text(text)
        with pytest.raises(SystemExit) as exit_:
            index.main(["--check"])
        assert exit_.value.code == 1
        said = "not what the results say; run python -m experiments.index\n"
        assert capsys.readouterr().err == f"{stale}: {said}"
    index.main([])
    index.main(["--check"])


@pytest.mark.parametrize("found", FOUND, ids=STEMS)
def test_findings_are_the_scripts_own_of_the_results(found):
    module = import_module(found.content["experiment"])
    assert found.content["findings"] == module.findings(found.content["results"])
    assert found.content["title"] == common.title(module.__doc__)
    assert all(re.search(r"\d", sentence) for sentence in found.content["findings"])


def changed(value, factors):
    """Each number is another one, also in tables of text; what was equal need not stay so."""
    if isinstance(value, dict):
        return {key: changed(one, factors) for key, one in value.items()}
    if isinstance(value, list):
        return [changed(one, factors) for one in value]
    if isinstance(value, str) and re.fullmatch(r"[\d.,]+(e-\d+)?", value):
        return re.sub(r"\d", "7", value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value**2 + 1  # the same for the same, since some are names: batch sizes, seeds
    return next(factors) * value if isinstance(value, float) else value


@pytest.mark.parametrize("found", FOUND, ids=STEMS)
def test_other_results_have_other_findings(found):
    module = import_module(found.content["experiment"])
    factors = itertools.cycle((0.5, 0.9, 1.7, 0.6, 1.2, 0.7, 1.4))
    other = module.findings(changed(found.content["results"], factors))
    same = {sentence for sentence in other if sentence in found.content["findings"]}
    assert {sentence for sentence in same if " fails on " not in sentence} == set()


def test_every_script_that_runs_is_on_the_page():
    results, _, others = index.README.read_text().partition(index.OTHERS)
    listed = lambda text: set(re.findall(r"^\| \[[\w.]+\]\(([\w./]+)\)", text, re.M))
    runs = {
        path.name
        for path in index.HERE.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    }
    assert {"fold.py", "mnist.py"} <= runs
    assert {name for name in listed(results) if "/" not in name} | listed(others) == runs
    assert not listed(results) & listed(others)
    assert "mnist.py" in listed(others)


def test_links_of_the_page_exist_and_every_result_has_one():
    links = re.findall(r"\]\(([^)]+)\)", index.README.read_text())
    assert all((index.HERE / link).exists() for link in links)
    kept = {f"results/{path.name}" for path in index.RESULTS.iterdir()}
    assert kept - set(links) == {"results/quantization-runs.json"}


def test_only_what_is_there_is_linked(tmp_path):
    found = index.read(made(tmp_path))
    assert list(index.files(found, ["made"])) == ["[made.json](results/made.json)"]
    for name in ("made.md", "made-layers.png", "made-other.png"):
        (tmp_path / name).touch()
    assert list(index.files(found, ["made", "made-other"])) == [
        "[made.md](results/made.md)",
        "[-layers.png](results/made-layers.png)",
        "[.json](results/made.json)",
    ]


def test_a_plot_belongs_to_the_nearest_results():
    assert index.owner(Path("forms-int8.png"), ["forms", "forms-int8"]) == "forms-int8"
    assert index.owner(Path("forms-survey.png"), ["forms", "forms-int8"]) == "forms"
    assert index.owner(Path("formsint.png"), ["forms"]) is None


def test_what_is_written_is_of_the_format(tmp_path):
    found = index.read(made(tmp_path)).content
    assert list(found) == list(index.FIELDS)
    assert found["experiment"] == "tests.test_index"
    assert found["title"] == "The index of experiments, and the one format of their results."
    assert found["findings"] == ["3.5 in all"]
    assert found["measured"] == [common.machine_line()]
    assert found["command"].split()[0] == "python"


@pytest.mark.parametrize(
    ("field", "value", "wanted", "mend"),
    [
        ("format", 2, "2 must be the number 1", "experiments.common.write"),
        (
            "experiment",
            "experiments.nothing",
            '"experiments.nothing" must be a module',
            "`findings",
        ),
        ("title", " ", '" " must be one line', "docstring"),
        ("command", ["fold"], '["fold"] must be what was run', "experiments.common.write"),
        ("measured", ["an old CPU"], '["an old CPU"] must be a list of lines', "common.write"),
        ("machine", {}, "{} must be what common.machine()", "common.write"),
        ("findings", ["It is faster."], 'faster."] must be a list of sentences', "--again"),
        ("findings", [], "[] must be a list of sentences, each with a figure", "--again"),
        ("results", [1], "[1] must be a dict", "experiments.common.write"),
        ("results", None, "missing, must be a dict of what was measured", "common.write"),
        ("rows", [1], "not one of format, experiment,", "put it into results"),
    ],
)
def test_what_is_not_is_refused_by_path_and_field(
    field, value, wanted, mend, tmp_path, monkeypatch, capsys
):
    path = made(tmp_path, **{field: value})
    monkeypatch.setattr(index, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as exit_:
        index.main(["--check"])
    error = capsys.readouterr().err
    assert exit_.value.code == 1
    assert error.startswith(f"{path}: {field}: ")
    assert wanted in error
    assert mend in error.partition(";")[2]
    assert error.count("\n") == 1


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON (Expecting"), ("[]", "a list and no")])
def test_what_is_no_object_is_refused_by_path(text, said, tmp_path):
    (tmp_path / "cut.json").write_text(text)
    with pytest.raises(index.FormatError, match="cut.json: " + re.escape(said)):
        index.every(tmp_path)


def test_what_runs_go_on_from_is_no_result(tmp_path):
    path = made(tmp_path)
    common.store(tmp_path / "made-runs.json", {"runs": []})
    assert [found.path for found in index.every(tmp_path)] == [path]


def test_findings_are_said_again(tmp_path, monkeypatch):
    right = made(tmp_path).read_text()
    path = made(tmp_path, title="Once", findings=["1 thing"])
    monkeypatch.setattr(index, "RESULTS", tmp_path)
    monkeypatch.setattr(index, "README", tmp_path / "README.md")
    index.main(["--again"])
    assert json.loads(path.read_text()) == json.loads(right)
    assert "| 3.5 in all |" in index.README.read_text()


def test_a_mistake_in_the_words_keeps_what_was_measured(tmp_path):
    def findings(results):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        common.write_json(tmp_path / "made.json", {"rows": [1]}, findings)
    found = json.loads((tmp_path / "made.json").read_text())
    assert (found["results"], found["findings"]) == ({"rows": [1]}, [])


def test_the_command_and_the_module_are_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "orig_argv", ["/bin/python3", "-m", "experiments.fold", "--out", "a b"]
    )
    common.write_json(tmp_path / "made.json", {"rows": [1]}, findings)
    found = index.read(tmp_path / "made.json").content
    assert found["command"] == "python -m experiments.fold --out 'a b'"


def test_machines_are_those_of_the_records():
    one, other = {"machine": "one, 2026-11-21"}, {"machine": "other, 2026-11-22"}
    assert common.machines([one, other, one]) == ["one, 2026-11-21", "other, 2026-11-22"]
    assert common.machines([{}]) == [common.machine_line()]


def test_no_gain_is_told_as_it_is():
    row = {"kernels": [10, 9], "speedup": 0.8, "speedup_quartiles": [0.7, 1.1]}
    kernels, speed = fold.findings({"rows": [row, row | {"speedup_quartiles": [0.7, 0.9]}]})
    assert kernels == "The compiled program has 10% to 10% fewer kernels."
    assert speed.startswith("It is 0.80 to 0.80 times as fast: in 1 of 2 cases the quartiles")


def test_missed_targets_and_faster_peers_are_told():
    case, peers, chain = int8_report.words([CASE, CHAIN])
    assert case == "int8, times as fast as float32: infer-net 2.50 (target 1.5, met)."
    said = "0.50 to 0.50 times as fast as openvino, int8, faster in 0 of 1."
    assert peers == f"int8, beside the peers: {said}"
    assert chain == "Pruned and int8, times as fast as plain: net 2.50 (target 3, missed)."


def timed(candidate, family, *seconds):
    row = {"candidate": candidate, "family": family, "precision": "float32"}
    return row | {"seconds": seconds}


def test_a_benchmark_without_peers_or_with_a_faster_one():
    rows = [timed("plain Flax", "plain", 2, 2), timed("jaxaccel", "jaxaccel", 1, 1)]
    record = {"case": "some", "targets": {"plain": 1.5, "peer": 1.2}, "rows": rows}
    plain, targets = benchmark_report.words([record])
    assert plain == "jaxaccel is 2.00 to 2.00 times as fast as plain Flax: faster in 1 of 1 cases."
    assert targets.endswith(
        "met in 0 of 1 cases that have them; missed in some (peer: 0.00 of 1.2)."
    )
    record["rows"] = [*rows, timed("torch", "peer", 0.5, 0.5)]
    _, peer, targets = benchmark_report.words([record])
    assert (
        peer == "jaxaccel is 0.50 to 0.50 times as fast as the best peer: faster in 0 of 1 cases."
    )
    assert targets.endswith("missed in some (peer: 0.50 of 1.2).")


def test_a_part_of_an_experiment_has_findings():
    row = {"part": "cache", "subject": "net", "ratio": 1.0, "quartiles": [1, 1]}
    rows = [row | {"setting": "none"}, row | {"setting": "kept", "ratio": 1.5}]
    failed = row | {"setting": "unknown", "ratio": None, "quartiles": None}
    (said,) = dispatch.findings({"rows": [*rows, failed]})
    assert said == "Cache, time over that of none: 1.50 (1.00-1.00; kept, net)."
    assert dispatch.findings({"rows": [rows[0], failed]}) == [
        "Cache, time over that of none: 0 others ran."
    ]
