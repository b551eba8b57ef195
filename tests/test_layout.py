"""Who may import whom, and what importing and installing must not do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kernels" / "gqa_kernels"

# What a module of the kernels' package may import from it, by the longest prefix of its name. An op
# may import its own folder too.
ALLOWED = {
    "__init__": {"backends", "patching", "sdpa"},
    "backends": set(),  # reference and fused, by name, when asked
    "reference": set(),
    "interpreter": set(),
    "primitives": {"primitives"},
    "runtime": {"runtime", "interpreter"},
    "ops": {"runtime", "primitives"},
    "fused": {"ops"},
    "flash_attn": {"flash_attn", "ops", "runtime"},
    "sdpa": {"ops.attention", "runtime"},
    "nn": {"backends", "runtime"},
    "sharding": {"ops", "runtime"},
    "patching": {"patching", "backends", "runtime", "integrations"},
    "integrations": {"ops", "flash_attn", "sdpa", "runtime"},
    "spec": {"spec", "fused", "reference"},
    "summation": set(),
    "accuracy": {"spec", "summation"},
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def within(name: str, prefixes: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def siblings(path: Path) -> set[str]:
    """The modules of the package that a file imports; a folder not beside what it holds."""
    names = {name.removeprefix("gqa_kernels.") for name in imported(path)}
    found = names & MODULES.keys()
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize("name", MODULES)
def test_arrows_inside_the_kernels(name):
    rule = max((prefix for prefix in ALLOWED if within(name, {prefix})), key=len, default=None)
    assert rule is not None, "a module without a place"
    own = {".".join(name.split(".")[:2])} if within(name, {"ops"}) else set()
    wrong = {x for x in siblings(MODULES[name]) if not within(x, ALLOWED[rule] | own)}
    assert not wrong
    outside = {module.split(".")[0] for module in imported(MODULES[name])}
    assert not outside & {"llama2", "tests", "bench"}


def test_every_rule_has_a_module():
    assert all(any(within(name, {rule}) for name in MODULES) for rule in ALLOWED)


def test_the_reference_needs_torch_only():
    assert {name.split(".")[0] for name in imported(PACKAGE / "reference.py")} == {"math", "torch"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "llama2").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_model_knows_no_kernel(path):
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & {"triton", "tests", "bench"}
    modules = {name.removeprefix("gqa_kernels.") for name in names if "gqa_kernels." in name}
    # The demo shows the errors of the op table; placement asks what Triton can drive.
    seams = {"get_backend", "backends", "interpreter", "accuracy", "spec", "runtime"}
    assert all(within(name, seams) for name in modules)
    assert {name for name in modules if within(name, {"runtime"})} <= {"runtime", "runtime.target"}


def fresh(code: str, **environment: str) -> None:
    """Runs code in a new process, in a folder from which nothing can be imported by accident."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env=kept | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_importing_the_package_loads_neither_triton_nor_a_gpu():
    fresh(
        "import os, sys; before = dict(os.environ)\n"
        "import gqa_kernels\n"
        "assert 'triton' not in sys.modules and 'torch' not in sys.modules\n"
        "gqa_kernels.get_backend('eager')\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
        "assert dict(os.environ) == before"
    )


def test_the_eager_backend_works_where_triton_does_not():
    fresh(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, gqa_kernels\n"
        "ops = gqa_kernels.get_backend('eager')\n"
        "ops.rms_norm(torch.zeros(2, 8), torch.ones(8))"
    )


def test_kernels_without_a_gpu_say_what_to_do():
    fresh(
        "import torch, gqa_kernels\n"
        "try: gqa_kernels.rms_norm(torch.zeros(2, 8), torch.ones(8))\n"
        "except RuntimeError as error: message = str(error)\n"
        "assert message.startswith('x: expected') and 'get_backend(\"eager\")' in message, message"
    )


def test_the_functions_are_not_hidden_by_modules():
    fresh(
        "import gqa_kernels\n"
        "for _ in range(2):\n"
        "    for name in gqa_kernels.OPS: assert callable(getattr(gqa_kernels, name)), name"
    )


def test_an_install_provides_no_kernels():
    """`kernels` is the import name of a Hugging Face package."""
    fresh(
        "import importlib.util, importlib.metadata as m\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "assert spec is None or spec.origin is not None, spec\n"
        "assert 'gqa-kernels' not in m.packages_distributions().get('kernels', [])"
    )
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_unknown_backend():
    import gqa_kernels

    with pytest.raises(ValueError, match="backend: expected one of eager, triton; got 'cuda'"):
        gqa_kernels.get_backend("cuda")


def test_the_interpreter_is_repaired_when_the_environment_switches_it_on():
    fresh(
        "import torch, gqa_kernels\n"
        "q = torch.randn(1, 40, 2, 16).bfloat16()\n"
        "eager = gqa_kernels.get_backend('eager').flash_attention(q, q, q)\n"
        "assert (gqa_kernels.flash_attention(q, q, q) - eager).abs().max() < 0.1",
        TRITON_INTERPRET="1",
    )
