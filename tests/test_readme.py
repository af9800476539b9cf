"""The README's code runs as it stands, and its figures are those of the committed results."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The results whose tables the README shows, and those of which it shows the first.
TABLES = (
    "accelerator",
    "accuracy-cluttered",
    "depthwise",
    "fold",
    "fusion",
    "pruning",
    "pruning_peer",
)
FIRST = ("benchmark", "quantization")


def test_code_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert "Metrics(loss=" in capsys.readouterr().out


def test_tables_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    for name in (*TABLES, *FIRST):
        text = (ROOT / "experiments" / "results" / f"{name}.md").read_text()
        if name in FIRST:
            text = text[text.index("\n|") :].strip().partition("\n\n")[0]
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows
        assert all(row in readme for row in rows), name


def test_files_that_it_names_exist():
    for readme in ("README.md", "README.zh.md"):
        links = re.findall(r"\]\(([\w./-]+)\)", (ROOT / readme).read_text())
        assert links
        assert all((ROOT / link).exists() for link in links)
