"""The tree keeps its shape: modules import only from lower floors, packages are docstrings, flags are declared once."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fastgen", "quantize", "tp")

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        r"fastgen\.(compile_cache|config|options|shapes|errors|files|gguf_fields|json_file|manifest|staged|device|noise|sampling|acceptance)",
        r"fastgen\.tokenizer\.\w+",
        r"fastgen\.kernels\.(reference|rope)",
    ),
    (r"fastgen\.kernels\.\w+",),
    (r"fastgen\.model", r"quantize\.(format|tokens|cpu|int8|int4)"),
    (r"fastgen\.checkpoint\.\w+", r"fastgen\.(hub|hub_files|hub_id)"),
    (r"quantize\.(gptq|scheme|linear|on_gpu|folder)",),
    (r"tp\.(place|guard|peer|watch|dist|plan)",),
    (r"tp\.apply",),
    (r"fastgen\.load",),
    (r"fastgen\.(completion|conversation|graphs|readback|steps|drafters|rounds|pace|prospect|engine|naive)",),
    (r"fastgen\.(speculation|tally|speculative|lossless|pairs|training\.\w+)",),
    (r"fastgen\.(scoring|flags|cli|report|costs|diagnosis|benchmark|baseline|stage_times|step_trace|fidelity)",),
    (r"fastgen\.(session|model_folder)",),
    (r"fastgen\.(generate|chat|bench|evaluate|train|convert|doctor)", r"quantize\.run"),
)
"""Lowest first, as in the README; within a floor, imports may not form a circle. Commands are imported by nobody."""


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def floor_of(module: str) -> int:
    for floor, patterns in enumerate(FLOORS):
        if any(re.fullmatch(pattern, module) for pattern in patterns):
            return floor
    raise AssertionError(f"{module} stands on no floor: give it a place in tests/test_floors.py")


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Our own modules that a file imports anywhere, parent packages and TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
            ours = str(node.module).partition(".")[0] in PACKAGES
            assert not ours or node.module in known, f"{path} imports {node.module}, which there is not"
        for name in names:
            parts = name.split(".")
            found |= {".".join(parts[:n]) for n in range(1, len(parts) + 1)} & set(known)
    return found


def test_modules_import_only_from_lower_floors() -> None:
    known = modules()
    wrong = []
    for module, path in known.items():
        if path.name == "__init__.py":
            continue
        for imported in imports_of(path, known):
            if known[imported].name != "__init__.py" and floor_of(imported) > floor_of(module):
                wrong.append(f"{module} (floor {floor_of(module)}) imports {imported} (floor {floor_of(imported)})")
    assert not wrong, "\n".join(wrong)


def test_commands_are_imported_by_nobody() -> None:
    known = modules()
    top = {module for module in known if "." in module and known[module].name != "__init__.py"}
    top = {module for module in top if floor_of(module) == len(FLOORS) - 1}
    assert top, "there are commands"
    for module, path in known.items():
        assert not imports_of(path, known) & top - {module}, f"{module} imports a command"


def test_imports_form_no_circle() -> None:
    known = modules()
    graph = {module: imports_of(path, known) - {module} for module, path in known.items()}
    while leaves := [module for module, imported in graph.items() if not imported & graph.keys()]:
        for module in leaves:
            del graph[module]
    assert not graph, f"imports in a circle among {sorted(graph)}"


def test_package_files_are_a_docstring() -> None:
    packages = [path for path in modules().values() if path.name == "__init__.py"]
    assert packages, "there are packages"
    for path in packages:
        assert len(ast.parse(path.read_text()).body) == 1, f"{path} holds more than a docstring"


def test_every_module_and_public_function_says_what_it_does() -> None:
    silent = []
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            silent.append(module)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{module}.{node.name}")
    assert not silent, f"without a docstring: {silent}"


def test_files_and_functions_stay_small() -> None:
    for path in modules().values():
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path} is longer than 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.dump(d) for d in node.decorator_list):
                size = node.end_lineno - node.lineno + 1
                assert size <= 60, f"{path}: {node.name} has {size} lines"


def test_every_flag_is_declared_once() -> None:
    """Flags are dataclass fields that call `flag(...)`; parsers are built in `fastgen.cli` alone."""
    declared: Counter[str] = Counter()
    for module, path in modules().items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                called = node.value.func
                if getattr(called, "id", getattr(called, "attr", "")) == "flag":
                    declared[node.target.id] += 1
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                assert module == "fastgen.cli", f"{module} declares a flag of its own"
    assert declared, "there are flags"
    assert not [name for name, count in declared.items() if count > 1], "declared twice"


def test_no_unsafe_reading_of_other_peoples_files() -> None:
    """No pickle but `torch.load(weights_only=True)`, nothing evaluated, no shell."""
    for module, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "os.system"), f"{module} calls {name}"
            assert keywords.get("shell") != "True", f"{module} runs a shell"
            assert keywords.get("trust_remote_code") != "True", f"{module} trusts remote code"
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", f"{module}: torch.load without weights_only=True"
