"""Who may import whom, and what importing and installing must not do."""

import ast
import graphlib
import tomllib
from pathlib import Path

import pytest
from processes import fresh

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "kernels" / "gqa_kernels"

MODEL = ROOT / "llama2"

# What a module of the kernels' package may import from it, by the longest prefix of its name. An op
# may import its own folder too.
KERNELS_ALLOWED = {
    "__init__": {"backends", "patching", "sdpa", "warming"},
    "backends": set(),  # reference, native and fused, by name, when asked
    "reference": {"losses", "reference"},
    "native": {"losses", "native", "reference", "runtime.derivatives"},
    "positions": {"runtime.arguments"},
    "losses": set(),
    "interpreter": set(),
    "run": {"integrations"},
    "primitives": {"primitives"},
    "runtime": {"runtime", "interpreter"},
    "ops": {"losses", "runtime", "primitives"},
    "fused": {"ops"},
    "flash_attn": {"flash_attn", "ops", "runtime"},
    "sdpa": {"ops.attention", "runtime"},
    "nn": {"backends", "positions", "reference", "runtime.arguments"},
    "sharding": {"fused", "ops", "runtime"},
    "patching": {"patching", "backends", "runtime", "integrations"},
    "integrations": {"ops", "flash_attn", "sdpa", "runtime"},
    "integrations.transformers_paged": {"integrations.transformers", "ops", "sdpa"},
    "warming": {"warming", "interpreter"},
    "spec": {"spec", "fused", "reference"},
    "summation": set(),
    "accuracy": {"spec", "summation"},
}

# The same for the model's package.
MODEL_ALLOWED = {
    "__init__": {"cache", "config", "generate", "model", "requests", "serving", "speculation"},
    "config": set(),
    "chat_format": set(),
    "extras": set(),
    "tokenizer": {"chat_format", "extras"},
    "placement": set(),
    "checkout": set(),
    "storage": set(),
    "terminal": set(),
    "accounting": {"config"},
    "cache": {"cache", "config"},
    "cache_size": {"accounting", "config", "placement"},
    "targets": set(),
    "head": {"targets"},
    "joint_projection": set(),
    "layers": {"cache", "config", "joint_projection"},
    "decoder": {"cache", "config", "joint_projection", "layers", "targets"},
    "model": {"cache", "config", "decoder", "head", "targets"},
    "scalar_model": {"config", "decoder"},
    "parallel": {"decoder", "model", "targets"},
    "checkpoint": {"checkpoint", "config", "decoder", "extras", "model", "scalar_model", "storage"},
    "conversion": {"model"},
    "convert_checkpoint": {"checkpoint", "config", "conversion", "layers", "model", "storage"},
    "decoding": {"decoding", "cache", "model"},
    "speculation": {"decoding", "model"},
    "generate": {"cache", "config", "decoding", "model", "speculation"},
    "requests": {"cache", "decoding", "generate", "model"},
    "serving": {"cache", "decoding", "generate", "model", "requests"},
    "stops": {"checkpoint", "tokenizer"},
    "taught_format": {"chat_format", "checkpoint"},
    "evaluation": {"model"},
    "evaluation.lm_eval": {"evaluation.harness", "extras"},
    "evaluation.scoring": {"head", "model"},
    "evaluation.harness": {"evaluation.scoring", "cache", "cache_size", "chat_format", "checkpoint"}
    | {"decoding"}
    | {"placement", "requests", "serving", "stops", "taught_format", "tokenizer"},
    "train": {"train", "checkpoint", "config", "decoder", "evaluation", "extras", "model"}
    | {"parallel", "scalar_model", "storage", "terminal", "tokenizer"},
    "finetune": {"finetune", "chat_format", "model", "serving", "cache", "storage", "targets"}
    | {"requests", "terminal", "tokenizer", "train"},
    "warm_up": {"cache", "config", "evaluation", "finetune", "generate", "model", "serving"}
    | {"requests", "speculation", "train"},
    "reporting": {"reporting"},
    "rlhf": {"rlhf", "cache", "cache_size", "chat_format", "checkpoint", "decoder", "finetune"}
    | {
        "model",
        "requests",
        "scalar_model",
        "serving",
        "storage",
        "taught_format",
        "tokenizer",
        "train",
    },
    "tradeoff": {"tradeoff", "accounting", "cache", "config", "decoding", "model", "reporting"}
    | {"storage"},
    "tradeoff.study": {
        "tradeoff.study",
        "checkout",
        "accounting",
        "checkpoint",
        "config",
        "conversion",
        "decoder",
        "evaluation",
        "model",
        "placement",
        "reporting",
        "storage",
        "tokenizer",
        "train",
    },
    "align": {"align", "finetune", "reporting", "rlhf", "storage", "terminal"},
    "commands": {
        "commands",
        "accounting",
        "align",
        "cache",
        "cache_size",
        "chat_format",
        "checkout",
    }
    | {"checkpoint"}
    | {"config", "conversion", "convert_checkpoint", "decoder", "evaluation", "finetune"}
    | {"generate", "model", "parallel", "placement", "reporting", "rlhf", "scalar_model", "targets"}
    | {"terminal"}
    | {"requests", "serving", "speculation", "stops", "storage", "taught_format", "tokenizer"}
    | {"tradeoff", "train", "warm_up"},
    "cli": {"commands", "extras", "placement", "terminal"},
    "__main__": {"cli"},
}

# The same for the emulator of compiled code, which is a package of the tests.
EMULATOR = ROOT / "tests" / "support" / "ptx_emulator"
EMULATOR_ALLOWED = {
    "__init__": set(),
    "approximation": set(),
    "ops": set(),
    "parse": set(),
    "memory": set(),
    "races": set(),
    "tensor_map": set(),
    "global_accesses": set(),
    "shared_accesses": set(),
    "warps": set(),
    "hopper": set(),
    "translation": {"approximation", "translation", "ops", "parse"},
    "machine": {
        *("approximation", "global_accesses", "hopper", "memory", "races", "shared_accesses"),
        "warps",
    },
    "specialised": {"machine", "races"},
    "driver": {"machine", "memory", "parse", "specialised", "tensor_map", "translation"},
    "cases": set(),
    "check": {"approximation", "cases", "driver"},
    "mutations": {"cases", "check", "driver"},
}

# And of the emulator of kernels as they are written.
GLUON_EMULATOR = ROOT / "tests" / "support" / "gluon_emulator"
GLUON_EMULATOR_ALLOWED = {
    "__init__": {"loading", "schedule"},
    "schedule": set(),
    "numbers": {"schedule"},
    "memory": {"numbers", "schedule"},
    "language": {"memory", "numbers", "schedule"},
    "loading": {"language"},
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


def modules(package: Path) -> dict[str, Path]:
    """The files of a package by their names in it; a folder's is the folder's."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


KERNELS, MODELS, EMULATORS = modules(PACKAGE), modules(MODEL), modules(EMULATOR)
GLUON_EMULATORS = modules(GLUON_EMULATOR)


def within(name: str, prefixes: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def siblings(path: Path, package: str, names: set[str]) -> set[str]:
    """The modules of its package that a file imports; a folder not beside what it holds."""
    found = {name.removeprefix(f"{package}.") for name in imported(path)} & names
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def rule_of(name: str, allowed: dict[str, set[str]]) -> set[str]:
    rules = [prefix for prefix in allowed if within(name, {prefix})]
    assert rules, "a module without a place"
    return allowed[max(rules, key=len)]


@pytest.mark.parametrize("name", KERNELS)
def test_arrows_inside_the_kernels(name):
    own = {".".join(name.split(".")[:2])} if within(name, {"ops"}) else set()
    allowed = rule_of(name, KERNELS_ALLOWED) | own
    found = siblings(KERNELS[name], "gqa_kernels", KERNELS.keys())
    assert not {other for other in found if not within(other, allowed)}
    outside = {module.split(".")[0] for module in imported(KERNELS[name])}
    assert not outside & {"llama2", "tests", "bench"}


@pytest.mark.parametrize("name", MODELS)
def test_arrows_inside_the_model(name):
    allowed = rule_of(name, MODEL_ALLOWED)
    found = siblings(MODELS[name], "llama2", MODELS.keys())
    assert not {other for other in found if not within(other, allowed)}


@pytest.mark.parametrize("name", EMULATORS)
def test_arrows_inside_the_emulator(name):
    """And what runs PTX knows none of our kernels."""
    allowed = rule_of(name, EMULATOR_ALLOWED)
    found = siblings(EMULATORS[name], "ptx_emulator", EMULATORS.keys())
    assert not {other for other in found if not within(other, allowed)}
    outside = {module.split(".")[0] for module in imported(EMULATORS[name])}
    over_the_table = name in ("cases", "check", "mutations")
    assert not outside & {"llama2", "bench"} and ("gqa_kernels" not in outside or over_the_table)


@pytest.mark.parametrize("name", GLUON_EMULATORS)
def test_arrows_inside_the_emulator_of_gluon(name):
    """And it knows neither our kernels nor Triton."""
    allowed = rule_of(name, GLUON_EMULATOR_ALLOWED)
    found = siblings(GLUON_EMULATORS[name], "gluon_emulator", GLUON_EMULATORS.keys())
    assert not {other for other in found if not within(other, allowed)}
    outside = {module.split(".")[0] for module in imported(GLUON_EMULATORS[name])}
    assert not outside & {"gqa_kernels", "llama2", "bench", "triton"}


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("gqa_kernels", KERNELS),
        ("llama2", MODELS),
        ("ptx_emulator", EMULATORS),
        ("gluon_emulator", GLUON_EMULATORS),
    ],
    ids=["gqa_kernels", "llama2", "ptx_emulator", "gluon_emulator"],
)
def test_no_circles(package, files):
    """Modules can be put in an order in which each imports earlier ones alone, late imports too."""
    arrows = {name: siblings(path, package, files.keys()) - {name} for name, path in files.items()}
    list(graphlib.TopologicalSorter(arrows).static_order())


# What takes defaults of the process where it is not told otherwise; the second of floats only.
FACTORIES = ("arange", "tensor", "randint", "randperm")
FLOAT_FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "eye")


@pytest.mark.parametrize("path", [*KERNELS.values(), *MODELS.values()], ids=lambda path: path.stem)
def test_allocations_name_their_dtype_and_device(path):
    """torch.set_default_dtype and torch.set_default_device are the user's."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        named = {keyword.arg for keyword in node.keywords}
        if ast.unparse(node.func.value) == "torch" and None not in named:  # None: **settings
            if node.func.attr in FACTORIES + FLOAT_FACTORIES:
                assert "device" in named, f"line {node.lineno}"
            if node.func.attr in FLOAT_FACTORIES:
                assert "dtype" in named, f"line {node.lineno}"


def test_a_file_fits_in_the_head():
    files = [*KERNELS.values(), *MODELS.values(), *EMULATORS.values(), *GLUON_EMULATORS.values()]
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert not {file: count for file, count in lines.items() if count > 400}


@pytest.mark.parametrize(
    ("allowed", "files"),
    [
        (KERNELS_ALLOWED, KERNELS),
        (MODEL_ALLOWED, MODELS),
        (EMULATOR_ALLOWED, EMULATORS),
        (GLUON_EMULATOR_ALLOWED, GLUON_EMULATORS),
    ],
    ids=["k", "m", "e", "g"],
)
def test_every_rule_has_a_module(allowed, files):
    assert all(any(within(name, {rule}) for name in files) for rule in allowed)


def test_the_reference_needs_torch_only():
    """And a backend that is PyTorch with it, and what a model needs of any backend."""
    plain = {"reference", "native", "positions", "runtime.arguments", "runtime.derivatives"}
    for name, path in KERNELS.items():
        if within(name, plain):
            found = {module.split(".")[0] for module in imported(path)}
            assert found <= {"contextlib", "itertools", "math", "torch", "typing", "gqa_kernels"}, (
                name
            )


@pytest.mark.parametrize("name", MODELS)
def test_the_model_knows_no_kernel(name):
    names = imported(MODELS[name])
    assert not {name.split(".")[0] for name in names} & {"triton", "tests", "bench"}
    used = {name.removeprefix("gqa_kernels.") for name in names if "gqa_kernels." in name}
    # The demo shows the errors of the op table; placement asks what Triton can drive; the model
    # asks the specification how many new tokens decode_attention takes.
    seams = {"get_backend", "backends", "interpreter", "accuracy", "spec", "runtime", "positions"}
    seams |= {"reference.MAX_NEW_TOKENS", "reference", "__version__"}
    assert all(within(name, seams) for name in used)
    assert {name for name in used if within(name, {"runtime"})} <= {
        "runtime",
        "runtime.target",
        "runtime.arguments",
        "runtime.arguments.INTS",
    }


def test_importing_the_package_loads_neither_triton_nor_a_gpu():
    fresh(
        "import os, sys; before = dict(os.environ)\n"
        "import gqa_kernels\n"
        "assert 'triton' not in sys.modules and 'torch' not in sys.modules\n"
        "gqa_kernels.get_backend('eager')\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
        "assert dict(os.environ) == before"
    )


@pytest.mark.parametrize("backend", ("eager", "torch"))
def test_other_backends_work_where_triton_does_not(backend):
    fresh(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, gqa_kernels\n"
        f"ops = gqa_kernels.get_backend({backend!r})\n"
        "ops.rms_norm(torch.zeros(2, 8), torch.ones(8))"
    )


def test_kernels_without_a_gpu_say_what_to_do():
    fresh(
        "import torch, gqa_kernels\n"
        "try: gqa_kernels.rms_norm(torch.zeros(2, 8), torch.ones(8))\n"
        "except RuntimeError as error: message = str(error)\n"
        "assert message.startswith('x: expected') and 'get_backend(\"torch\")' in message, message"
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


def test_an_install_holds_every_folder():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {
        ".".join((folder.name, *path.parent.relative_to(folder).parts))
        for folder in (PACKAGE, MODEL)
        for path in folder.rglob("*.py")
    }
    assert set(listed["tool"]["setuptools"]["packages"]) == found


def test_unknown_backend():
    import gqa_kernels

    with pytest.raises(
        ValueError, match="backend: expected one of eager, torch, triton; got 'cuda'"
    ):
        gqa_kernels.get_backend("cuda")


def test_the_interpreter_is_repaired_when_the_environment_switches_it_on():
    fresh(
        "import torch, gqa_kernels\n"
        "q = torch.randn(1, 40, 2, 16).bfloat16()\n"
        "eager = gqa_kernels.get_backend('eager').flash_attention(q, q, q)\n"
        "assert (gqa_kernels.flash_attention(q, q, q) - eager).abs().max() < 0.1",
        TRITON_INTERPRET="1",
    )
