"""Who may import whom, and what importing and installing must not do."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kernels" / "gqa_kernels"

# What each module of the kernels' package may import from it.
KERNEL_PARTS = {"checks", "configs", "target", "layout", "tiles", "autograd", "library"}
OPS = {"norm", "glu", "rope", "cache_append", "attention", "decode"}
ATTENTION_GRADIENTS = {"attention_dkdv", "attention_dq"}
ATTENTION_KERNELS = {"attention_forward", "attention_backward"}
ALLOWED = {
    "__init__": {"backends", "patching", "sdpa"},
    "backends": set(),  # reference and fused, by name, when asked
    "reference": set(),
    "interpreter": set(),
    "target": {"interpreter"},
    "checks": {"target"},
    "layout": set(),
    "autograd": set(),
    "library": {"autograd"},
    "configs": set(),
    "tiles": set(),
    "rotation": set(),
    "scores": {"tiles"},
    "sequences": set(),
    **dict.fromkeys(OPS, KERNEL_PARTS),
    "attention_call": KERNEL_PARTS,
    **dict.fromkeys(
        ("attention_forward", *ATTENTION_GRADIENTS),
        KERNEL_PARTS | {"scores", "sequences", "attention_call"},
    ),
    "attention_backward": KERNEL_PARTS | ATTENTION_GRADIENTS | {"attention_call"},
    "attention": KERNEL_PARTS | ATTENTION_KERNELS | {"attention_call"},
    **dict.fromkeys(("rope", "cache_append"), KERNEL_PARTS | {"rotation"}),
    "counters": set(),
    "kv_pages": set(),
    "decode": KERNEL_PARTS | {"scores", "counters", "kv_pages"},
    "flash_attn": {"attention", "checks", "flash_attn_kvcache"},
    "flash_attn_kvcache": {"cache_append", "checks", "decode", "library", "rope"},
    "sdpa": {"attention", "checks"},
    "fused": OPS,
    "nn": {"backends", "checks"},
    "sharding": OPS | {"library"},
    "patching": {"patch_plan"},
    "patch_plan": {"patch_checks", "patched_forwards", "integrations"},
    "patch_checks": {"backends", "checks", "patched_forwards"},
    "patched_forwards": set(),
    "integrations.__init__": set(),
    "integrations.transformers": {"attention", "decode", "sdpa"},
    "integrations.hub_kernels": {"norm"},
    "integrations.torch_sdpa": {"attention", "checks", "flash_attn"},
    "spec": {"fused", "reference"},
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
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = sorted(PACKAGE.rglob("*.py"))
TOP_LEVEL = {module_name(path).split(".")[0] for path in MODULES}


def siblings(path: Path) -> set[str]:
    prefix = "gqa_kernels."
    found = {name.removeprefix(prefix) for name in imported(path) if name.startswith(prefix)}
    return {name.split(".")[0] for name in found} & TOP_LEVEL


def test_every_module_has_its_place():
    assert {module_name(path) for path in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_arrows_inside_the_kernels(path):
    assert siblings(path) <= ALLOWED[module_name(path)]
    outside = {name.split(".")[0] for name in imported(path)}
    assert not outside & {"llama2", "tests", "bench"}


def test_the_reference_needs_torch_only():
    assert {name.split(".")[0] for name in imported(PACKAGE / "reference.py")} == {"math", "torch"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "llama2").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_model_knows_no_kernel(path):
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & {"triton", "tests", "bench"}
    modules = {name.split(".")[1] for name in names if name.startswith("gqa_kernels.")}
    # The demo shows the errors of the op table; placement asks what Triton can drive.
    assert modules <= {"get_backend", "backends", "interpreter", "target", "accuracy", "spec"}


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
