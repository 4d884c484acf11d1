"""The hooks, their table and their page in the docs say the same; the tutorial's plugin runs."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from octavo.plugins.hookspecs import HookSpecs
from octavo.plugins.kinds import KINDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
HOOKS = {name: function for name, function in vars(HookSpecs).items() if name.startswith("octavo_")}


def test_the_page_has_each_hook_with_its_exact_arguments() -> None:
    documented = dict(re.findall(r"^### `(octavo_\w+)\((.*)\)`$", PAGE, flags=re.MULTILINE))
    actual = {name: ", ".join(list(inspect.signature(function).parameters)[1:]) for name, function in HOOKS.items()}
    assert documented == actual


@pytest.mark.parametrize("name", HOOKS)
def test_each_hook_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(HOOKS[name])


def test_every_kind_has_a_hook_of_its_own_and_a_row_on_the_page() -> None:
    offering = [name for name, function in HOOKS.items() if list(inspect.signature(function).parameters) == ["self"]]
    assert sorted(kind.hook for kind in KINDS.values()) == sorted(offering)
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (?:`(--[\w-]+)`|none) \|", PAGE, flags=re.MULTILINE)
    assert rows == [(name, str(kind.api), kind.flag or "") for name, kind in KINDS.items()]


def test_the_table_has_the_interfaces_own_api_numbers() -> None:
    homes = {"attention": "attention", "kv_cache": "kv_cache", "checkpoint_reader": "checkpoints"}
    for kind, folder in homes.items():
        source = (ROOT / "core" / "octavo" / folder / "interface.py").read_text(encoding="utf-8")
        values = [
            ast.literal_eval(node.value)
            for node in ast.parse(source).body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "API"
        ]
        assert values == [KINDS[kind].api]


def test_the_tutorials_plugin_runs(tmp_path: Path) -> None:
    tutorial = PAGE.partition("step by step")[2]
    project, hook, command = re.findall(r"   ```\w+\n(.*?)   ```", tutorial, flags=re.DOTALL)
    package = tmp_path / "octavo_hello"
    package.mkdir()
    (package / "__init__.py").touch()
    for name, text in (("plugin", hook), ("command", command)):
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    info = tmp_path / "octavo_hello-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: octavo-hello\nVersion: 0.1\n")
    entry = re.search(r"entry-points.octavo\]\n\s+(.*) = \"(.*)\"", project)
    assert entry
    (info / "entry_points.txt").write_text(f"[octavo]\n{entry[1]} = {entry[2]}\n")
    code = f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]!r}; from octavo.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "hello", "World"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "Hello World\n"), done.stderr
