"""An index of all experiments, made from their results: experiments/README.md.

    python -m experiments.index            # writes it
    python -m experiments.index --check    # exits with 1 where it is not what the results say
    python -m experiments.index --again    # titles and findings anew, from code and results, first

Every JSON file of results has the one format of `experiments.common`; one that has not is refused
by its path and field. ``NAME-runs.json`` is no result: it is what an interrupted run goes on from.
"""

import ast
import json
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from experiments import common
from jaxaccel.measure import table

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE / "README.md"
COLUMNS = ("experiment", "question", "findings", "hardware", "date", "results")
INTRODUCTION = """# Experiments

One script for each technique, and what came out. Run any of them in the folder of the repository,
with the arguments that stand behind its name below, by `python -m experiments.NAME` (of the tests'
tables by `python -m tests.NAME`); `--help` tells the rest. What a script writes lies in `out/NAME`,
or where `--out` says: a page (`.md`), plots (`.png`), and a `.json` with every number, the command,
and the machine. What is kept of it lies in [results](results); the findings are computed from there
by the script itself, and a slower or missed result is told like a faster one. `x86_64` is the
processor where a run did not keep its model.

This page is written by `python -m experiments.index`."""
OTHERS = "Scripts of which no results are kept:"


class FormatError(ValueError):
    """A file of results that is not of the format."""


class Result(NamedTuple):
    """A file of results, and what it holds."""

    path: Path
    content: dict[str, Any]


def texts(value: Any) -> bool:
    """Whether it is a list of text, with at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value)


def text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def filled(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def module_file(name: str) -> Path:
    """Of experiments.NAME or tests.NAME."""
    return HERE.parent / f"{name.replace('.', '/')}.py"


ANEW = "say them anew by `python -m experiments.index --again`"
WRITE = "write the file by experiments.common.write, publish or write_json"
# Of each field: whether it is right, what it must be, and how to mend it.
FIELDS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "format": (lambda x: x == common.FORMAT, f"the number {common.FORMAT}", WRITE),
    "experiment": (
        lambda x: text(x) and module_file(x).is_file(),
        "a module of this repository, as experiments.fold",
        "give common.write the `findings` of the script itself",
    ),
    "title": (text, "one line", "write a docstring for the script, and " + ANEW),
    "command": (text, "what was run, as python -m experiments.fold", WRITE),
    "measured": (
        lambda x: texts(x) and all(re.search(r", \d{4}-\d\d-\d\d$", line) for line in x),
        "a list of lines of common.machine_line(), each with its date at the end",
        WRITE,
    ),
    "machine": (filled, "what common.machine() returns", WRITE),
    "findings": (
        lambda x: texts(x) and all(re.search(r"\d", line) for line in x),
        "a list of sentences, each with a figure",
        "mend `findings` of the script, and " + ANEW,
    ),
    "results": (filled, "a dict of what was measured", WRITE),
}


def read(path: Path) -> Result:
    """A file of the format."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise FormatError(f"{path}: not JSON ({error}); {WRITE}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path}: a {type(content).__name__} and no object; {WRITE}")
    for field, (right, wanted, mend) in FIELDS.items():
        if field not in content:
            raise FormatError(f"{path}: {field}: missing, must be {wanted}; {mend}")
        if not right(content[field]):
            found = json.dumps(content[field])[:60]
            raise FormatError(f"{path}: {field}: {found} must be {wanted}; {mend}")
    for field in content.keys() - FIELDS.keys():
        raise FormatError(f"{path}: {field}: not one of {', '.join(FIELDS)}; put it into results")
    return Result(path, content)


def every(folder: Path) -> list[Result]:
    """All files of results, by name."""
    return [read(p) for p in sorted(folder.glob("*.json")) if not p.stem.endswith("-runs")]


def again(found: Result) -> Result:
    """The title and the findings as the script says them now; the file changes where they do."""
    module = import_module(found.content["experiment"])
    said = {"title": common.title(module.__doc__)}
    said |= {"findings": module.findings(found.content["results"])}
    if said.items() <= found.content.items():
        return found
    common.replace(found.path, found.content | said)
    return read(found.path)


def scripts(folder: Path) -> dict[Path, str]:
    """Those that can be run, with the first lines of their docstrings."""
    found = {path: path.read_text() for path in sorted(folder.glob("*.py"))}
    return {
        path: common.title(ast.get_docstring(ast.parse(code)))
        for path, code in found.items()
        if '\nif __name__ == "__main__":\n' in code
    }


def link(name: str, path: Path) -> str:
    """As a link from the page."""
    target = path.relative_to(HERE.parent)
    inside = target.is_relative_to(HERE.name)
    return f"[{name}]({target.relative_to(HERE.name) if inside else f'../{target}'})"


def files(found: Result, stems: Iterable[str]) -> Iterator[str]:
    """Links to the page, the plots and the numbers, where they are there; the first by its name."""
    stem, folder = found.path.stem, found.path.parent
    page = folder / f"{stem}.md"
    plots = sorted(p for p in folder.glob(f"{stem}*.png") if owner(p, stems) == stem)
    there = [path for path in (page, *plots, found.path) if path.is_file()]
    for path in there:
        label = path.name if path is there[0] else path.name.removeprefix(stem)
        yield link(label, HERE / "results" / path.name)


def owner(plot: Path, stems: Iterable[str]) -> str | None:
    """The results that a plot belongs to: forms-int8.png to forms-int8, not to forms."""
    fitting = [stem for stem in stems if plot.stem == stem or plot.stem.startswith(f"{stem}-")]
    return max(fitting, key=len, default=None)


def line(found: Result, stems: Iterable[str]) -> tuple[str, ...]:
    """A row of the table."""
    content = found.content
    script = content["experiment"]
    arguments = content["command"].removeprefix(f"python -m {script}").strip()
    machines, dates = zip(*(on.rsplit(", ", 1) for on in content["measured"]), strict=True)
    return (
        link(script.removeprefix("experiments."), module_file(script))
        + (arguments and f" `{arguments}`"),
        content["title"],
        "<br>".join(content["findings"]),
        "; ".join(dict.fromkeys(machines)),
        ", ".join(sorted({*dates})),
        " ".join(files(found, stems)),
    )


def page(found: list[Result]) -> str:
    """The whole text."""
    stems = [one.path.stem for one in found]
    told = {module_file(one.content["experiment"]) for one in found}
    others = [
        (link(path.stem, path), title) for path, title in scripts(HERE).items() if path not in told
    ]
    results = table(COLUMNS, [line(one, stems) for one in found], "markdown")
    rest = table(("script", "what it is"), others, "markdown")
    return "\n\n".join((INTRODUCTION, results, OTHERS, rest)) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = common.Parser(
        prog="python -m experiments.index",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--again", action="store_true", help="titles and findings anew, first")
    args = parser.parse_args(argv)
    try:
        found = every(RESULTS)
    except FormatError as error:
        parser.exit(1, f"{error}\n")
    if args.again:
        found = list(map(again, found))
    made = page(found)
    if not args.check:
        README.write_text(made)
    elif not README.is_file() or README.read_text() != made:
        parser.exit(1, f"{README}: not what the results say; run {parser.prog}\n")


if __name__ == "__main__":
    main()
