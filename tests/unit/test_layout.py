"""The design's rules of layout, size and style (docs/design.md §1, §5, §7), read off the tree itself."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "core" / "octavo"
ENGINE = CORE / "engine"
SKIPPED = {".venv", ".git", "build", "dist", "mutants", "__pycache__", "node_modules"}

Offence = tuple[int, str]
Rule = Callable[[ast.Module], Iterable[Offence]]

# What the engine may know of the core: modules that are themselves free of torch.
ENGINE_MAY_IMPORT = tuple(
    f"octavo.{name}" for name in ("admission", "config", "engine", "errors", "outputs", "plugins", "sampling_params")
)
CORE_MUST_NOT_IMPORT = ("fastapi", "pydantic", "starlette", "uvicorn", "uvloop")
UNSAFE_MODULES = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
MODEL_CLASS = re.compile(r"^AutoModel|^PreTrainedModel$|ForCausalLM$|Model$")
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|\braise NotImplementedError\b")


def python_files(*folders: Path) -> list[Path]:
    """The Python files under `folders`, sorted, without what tools put there."""
    found = (path for folder in folders for path in folder.rglob("*.py"))
    return sorted(path for path in found if not SKIPPED & set(path.relative_to(ROOT).parts))


def packages() -> dict[str, Path]:
    """The product's import packages by name, in every import root of the tree."""
    roots = [ROOT / "core", ROOT / "server", ROOT / "workbench", *(ROOT / "plugins").glob("*/")]
    return {path.parent.name: path.parent for root in roots for path in root.glob("*/py.typed")}


def hook_modules() -> list[str]:
    """The modules that the project's entry points name for plugins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["entry-points"]["octavo"].values())


def product_files() -> list[Path]:
    """The files that the wheel carries."""
    return python_files(*packages().values())


def files_of_tests() -> list[Path]:
    """The tests of the tree and of its plugins."""
    return [path for path in python_files(ROOT) if "tests" in path.relative_to(ROOT).parts]


@cache
def parse(path: Path) -> ast.Module:
    """The file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_in(module: str, packages: Iterable[str]) -> bool:
    """Whether `module` is one of `packages` or inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports(tree: ast.AST) -> Iterator[Offence]:
    """Line and dotted name of all that a file imports, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, name) for _, name in texts(node.args[:1]))


def texts(nodes: Iterable[ast.AST]) -> Iterator[Offence]:
    """The string literals among `nodes`."""
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def offences(files: Iterable[Path], rule: Rule) -> list[str]:
    """What `rule` finds in `files`, as "path:line what"."""
    return [f"{path.relative_to(ROOT)}:{line} {what}" for path in files for line, what in rule(parse(path))]


def imports_of(*forbidden: str) -> Rule:
    """A rule against importing any of `forbidden`."""
    return lambda tree: [(line, name) for line, name in imports(tree) if is_in(name, forbidden)]


def imports_beside(own: str, *allowed: str) -> Rule:
    """A rule against importing, of the packages that begin with `own`, any but `allowed`."""
    return lambda tree: [
        (line, name) for line, name in imports(tree) if name.split(".")[0].startswith(own) and not is_in(name, allowed)
    ]


def relative_imports(tree: ast.Module) -> list[Offence]:
    """Imports that begin with a dot."""
    return [(line, name) for line, name in imports(tree) if name.startswith(".")]


def model_classes(tree: ast.Module) -> list[Offence]:
    """Uses of transformers' model classes or of its modelling code."""
    found = [
        (line, name)
        for line, name in imports(tree)
        if is_in(name, ["transformers"]) and (MODEL_CLASS.search(name.split(".")[-1]) or "modeling" in name)
    ]
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    of_transformers = (node for node in attributes if ast.unparse(node).startswith("transformers."))
    return found + [(node.lineno, node.attr) for node in of_transformers if MODEL_CLASS.search(node.attr)]


def unannotated(tree: ast.Module) -> Iterator[Offence]:
    """Functions that lack the annotation of a parameter or of what they return."""
    for function in functions(tree):
        spec = function.args
        named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, spec.vararg, spec.kwarg]
        missing = [arg.arg for arg in named if arg and not arg.annotation and arg.arg not in ("self", "cls")]
        if missing or function.returns is None:
            yield function.lineno, f"{function.name} {missing or '-> ?'}"


def undocumented(tree: ast.Module) -> list[Offence]:
    """Public functions and classes of a module that have no docstring."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return [(node.lineno, node.name) for node in named if not ast.get_docstring(node)]


def unsafe_calls(tree: ast.Module) -> Iterator[Offence]:
    """Ways to run code that comes with data: eval, exec, unpickling, a checkpoint's own modules."""
    yield from imports_of(*UNSAFE_MODULES)(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("eval", "exec", "torch.load"):
            yield node.lineno, name
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg == "trust_remote_code" and not off:
                yield node.lineno, "trust_remote_code"


def environment_writes(tree: ast.Module) -> Iterator[Offence]:
    """Assignments to os.environ and calls that change it."""
    writers = ("os.environ.setdefault", "os.environ.update", "os.environ.pop", "os.putenv", "os.unsetenv")
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value) == "os.environ":
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in writers:
            yield node.lineno, ast.unparse(node.func)


def num_lines(path: Path) -> int:
    """The file's lines, blank ones too."""
    return len(path.read_text(encoding="utf-8").splitlines())


def num_code_lines(path: Path) -> int:
    """The file's lines without blank ones, comments and docstrings."""
    tree = parse(path)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            prose.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return sum(
        1 for number, line in lines if number not in prose and line.strip() and not line.lstrip().startswith("#")
    )


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def loaded_after_importing(modules: Iterable[str], watched: Iterable[str]) -> str:
    """Which of `watched` are loaded once a fresh interpreter has imported `modules`."""
    names = ", ".join(modules)
    return run_python(f"import sys, {names}\nprint(*sorted({set(watched)!r} & set(sys.modules)))")


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (imports_of("torch"), "def f():\n    from torch.nn import Linear"),
        (imports_of("octavo_server"), "import_module('octavo_server.plugin')"),
        (imports_beside("octavo", "octavo.engine"), "from octavo.runtime import runner"),
        (relative_imports, "from . import step"),
        (model_classes, "from transformers import AutoModelForCausalLM"),
        (model_classes, "import transformers.models.llama.modeling_llama"),
        (model_classes, "import transformers\ntransformers.LlamaForCausalLM(config)"),
        (unannotated, "def f(x) -> int: ..."),
        (unannotated, "async def f(): ..."),
        (undocumented, "def f() -> None: ..."),
        (unsafe_calls, "import pickle"),
        (unsafe_calls, "torch.load(path)"),
        (unsafe_calls, "AutoTokenizer.from_pretrained(path, trust_remote_code=flag)"),
        (environment_writes, "os.environ['A'] = 'b'"),
        (environment_writes, "del os.environ['A']"),
        (environment_writes, "os.environ.setdefault('A', 'b')"),
    ],
)
def test_rules_see_what_they_are_for(rule: Rule, source: str) -> None:
    assert list(rule(ast.parse(source)))


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (imports_of("torch"), "import torchlike"),
        (imports_beside("octavo", "octavo.engine"), "import json\nfrom octavo.engine.step import StepInput"),
        (model_classes, "from transformers import AutoTokenizer, AutoConfig\nname = 'LlamaForCausalLM'"),
        (unannotated, "class A:\n    def f(self, x: int) -> int: ..."),
        (unsafe_calls, "AutoConfig.from_pretrained(path, trust_remote_code=False)\nmodel.eval()"),
        (environment_writes, "value = os.environ['A'] + os.environ.get('B', '')"),
    ],
)
def test_rules_let_the_rest_pass(rule: Rule, source: str) -> None:
    assert not list(rule(ast.parse(source)))


def test_every_package_is_found() -> None:
    assert {"octavo", "octavo_server", "octavo_workbench", "octavo_gguf"} <= set(packages())


def test_engine_imports_no_torch() -> None:
    assert offences(python_files(ENGINE), imports_of("torch", "transformers", "numpy")) == []


def test_engine_knows_only_what_is_free_of_torch() -> None:
    assert offences(python_files(ENGINE), imports_beside("octavo", *ENGINE_MAY_IMPORT)) == []


def test_importing_the_engine_loads_no_torch() -> None:
    modules = [f"octavo.engine.{path.stem}" for path in python_files(ENGINE) if path.stem != "__init__"]
    assert loaded_after_importing(modules, ["torch", "transformers", "numpy"]) == ""


@pytest.mark.parametrize("module", ["octavo", "octavo.cli", "octavo.config", *hook_modules()])
def test_start_loads_nothing_heavy(module: str) -> None:
    assert loaded_after_importing([module], ["torch", "transformers", "numpy", "fastapi"]) == ""


def test_core_knows_no_web_framework() -> None:
    assert offences(python_files(CORE), imports_of(*CORE_MUST_NOT_IMPORT)) == []


def test_core_knows_none_of_its_plugins() -> None:
    others = [name for name in packages() if name != "octavo"]
    assert offences(python_files(CORE), imports_of(*others)) == []


def test_core_names_none_of_its_plugins() -> None:
    others = [name for name in packages() if name != "octavo"]

    def mentions(tree: ast.Module) -> list[Offence]:
        return [(line, name) for line, text in texts(ast.walk(tree)) for name in others if name in text]

    assert offences(python_files(CORE), mentions) == []


@pytest.mark.parametrize("name", sorted(set(packages()) - {"octavo"}))
def test_packages_depend_on_the_core_only(name: str) -> None:
    assert offences(python_files(packages()[name]), imports_beside("octavo", "octavo", name)) == []


def test_imports_are_absolute() -> None:
    assert offences(product_files(), relative_imports) == []


def test_no_model_class_of_transformers() -> None:
    # The benchmark's other side is transformers' own generate: that file alone may load a model class.
    files = [path for path in product_files() if not path.is_relative_to(ROOT / "workbench")]
    assert offences(files, model_classes) == []


def test_nothing_runs_code_that_comes_with_data() -> None:
    assert offences(product_files(), unsafe_calls) == []


def test_nothing_writes_the_environment() -> None:
    assert offences(product_files(), environment_writes) == []


def test_every_function_is_annotated() -> None:
    assert offences([*product_files(), *files_of_tests()], unannotated) == []


def test_public_names_are_documented() -> None:
    assert offences(product_files(), undocumented) == []


def test_nothing_is_left_unfinished() -> None:
    lines = (
        (path, number, line)
        for path in product_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    )
    assert [f"{p.relative_to(ROOT)}:{n}" for p, n, line in lines if UNFINISHED.search(line)] == []


def test_files_are_short() -> None:
    sizes = {path: num_lines(path) for path in [*product_files(), *files_of_tests()]}
    assert [f"{path.relative_to(ROOT)} {size}" for path, size in sizes.items() if size >= 400] == []


def test_functions_are_short() -> None:
    lengths = [
        (function.end_lineno or function.lineno) - function.lineno + 1
        for path in product_files()
        for function in functions(parse(path))
    ]
    assert statistics.median(lengths) < 10
    assert statistics.quantiles(lengths, n=20)[-1] < 40


def test_engine_and_core_stay_small() -> None:
    core = [path for path in python_files(CORE) if not path.is_relative_to(CORE / "testing")]
    assert sum(map(num_lines, python_files(ENGINE))) < 1_500
    assert sum(map(num_code_lines, core)) < 7_800
