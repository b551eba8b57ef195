"""`patch` puts the kernels into one Transformers model: same results, no trace elsewhere."""

import copy
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from combinations import long

pytest.importorskip("transformers")

import ranks
import transformers
from budget import SEED, assert_network
from processes import forked
from tiny_transformers import cast, double
from torch import nn

import gqa_kernels
from gqa_kernels import accuracy, patch, unpatch
from gqa_kernels.integrations import transformers as adapter

ROW_OPS = ("rms_norm", "swiglu", "rope")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What is replaced per layer, beside the last norm; and what is not.
FAMILIES = {
    "Llama": {"add_rms_norm": 1, "rms_norm": 2, "swiglu": 1, "rope": 1},
    "Mistral": {"add_rms_norm": 1, "rms_norm": 2, "swiglu": 1, "rope": 1},
    "Qwen2": {"add_rms_norm": 1, "rms_norm": 2, "swiglu": 1, "rope": 1},
    "Qwen3": {"add_rms_norm": 1, "rms_norm": 4, "swiglu": 1, "rope": 1},
    "Phi3": {"rms_norm": 2, "swiglu": 1, "rope": 1},
    "Gemma": {"rms_norm": 2, "rope": 1},
    "Gemma2": {"rms_norm": 4, "rope": 1},
}


def build(family="Llama", device="cpu", dtype=torch.float32, **changes):
    """A model with weights large enough to matter, in every norm too."""
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    if family == "Gemma2":  # whose soft cap "sdpa", the default of Transformers 4, leaves out
        config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    offset = 1.0 if family.startswith("Gemma") else 0.0
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5 - offset, 1.5 - offset)
    return cast(model, dtype).to(device).eval()


@pytest.fixture
def tokens(device):
    generator = torch.Generator().manual_seed(SEED + 1)
    return torch.randint(3, 97, (2, 7), generator=generator).to(device)


def loss_and_gradients(model, tokens, **options):
    logits = model(tokens, use_cache=False, **options).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, parameters.values())
    return logits, dict(zip(parameters, gradients, strict=True))


def assert_as_before(ours, plain, tokens):
    """Logits and gradients are within the budget of the model as it was, and not its very own."""
    assert not torch.equal(ours[0], loss_and_gradients(plain, tokens)[0])

    def results(model):
        logits, gradients = loss_and_gradients(model, tokens)
        return {"logits": logits, **gradients}

    logits, gradients = ours
    assert_network({"logits": logits, **gradients}, plain, results, lambda m: double(m)(results))


def assert_gives_the_logits(ours, plain, tokens, **options):
    def logits(model):
        return model(tokens, **options).logits

    assert_network(ours, plain, logits, lambda model: double(model)(logits))


def assert_same_bits(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def snapshot(model):
    """Every module's instance attributes, by identity."""
    return {
        name: {key: id(value) for key, value in vars(module).items() if not key.startswith("_")}
        | {"own": list(vars(module))}
        for name, module in model.named_modules()
    }


def counts(report):
    found = {}
    for _, op in report.replaced:
        found[op] = found.get(op, 0) + 1
    return found


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, dtype, device, tokens):
    model = build(family, device, dtype)
    plain = copy.deepcopy(model)
    report = patch(model)
    per_layer = {op: 2 * count for op, count in FAMILIES[family].items()} | {"attention": 2}
    per_layer["rms_norm"] += 1
    assert counts(report) == per_layer, str(report)
    assert all("down(silu(gate) · up)" in reason for _, _, reason in report.not_replaced)
    assert_as_before(loss_and_gradients(model, tokens), plain, tokens)


def test_the_attention_function_is_chosen_for_one_model_alone(device, tokens):
    model = build(device=device)
    config = model.config
    other = type(model)(config).to(device).eval()
    other.load_state_dict(model.state_dict())
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    seen = mask.bool()

    def logits(model):
        return model(tokens, attention_mask=mask).logits[seen]

    before, theirs = snapshot(model), other(tokens, attention_mask=mask).logits
    report = patch(model, ("attention",), strict=True)
    assert counts(report) == {"attention": 2}
    assert model.config._attn_implementation == "gqa_kernels"
    assert config._attn_implementation == other.config._attn_implementation == "sdpa"
    holders = [module for module in model.modules() if "config" in vars(module)]
    assert len(holders) > 2 and all(module.config is model.config for module in holders)
    assert patch(model, ("attention",)).replaced == report.replaced
    ours = model(tokens, attention_mask=mask).logits
    assert not torch.equal(ours[seen], theirs[seen])
    assert_network(ours[seen], other, logits, lambda model: double(model)(logits))
    twin = copy.deepcopy(model)
    unpatch(model)
    assert snapshot(model) == before and model.config is config
    assert_same_bits(other(tokens, attention_mask=mask).logits, theirs)
    assert_same_bits(model(tokens, attention_mask=mask).logits, theirs)
    assert_same_bits(twin(tokens, attention_mask=mask).logits, ours)
    unpatch(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert_same_bits(twin(tokens, attention_mask=mask).logits, theirs)


def test_the_text_of_a_model_that_sees(device):
    """Nested configs: the decoder's attention is replaced, the encoder's keeps its function."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=96,
    )
    model = transformers.LlavaForConditionalGeneration(config).to(device).eval()
    tokens = torch.tensor([[3, 96, 96, 96, 96, 7, 9]], device=device)
    inputs = {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8, device=device)}
    model(**inputs)  # the first call leaves attributes behind
    plain = copy.deepcopy(model)
    before, report = snapshot(model), patch(model)
    assert counts(report)["attention"] == 2
    assert {reason for _, op, reason in report.not_replaced if op == "attention"} == {
        "it is not causal"
    }
    assert model.config.text_config is model.model.language_model.config
    assert model.config.text_config._attn_implementation == "gqa_kernels"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert_network(
        model(**inputs).logits,
        plain,
        lambda model: model(**inputs).logits,
        lambda model: double(model)(lambda m: m(**accuracy.widen(inputs)).logits),
    )
    unpatch(model)
    assert snapshot(model) == before


def test_attention_that_shares_its_config_with_another_kind():
    sizes = {"vocab_size": 97, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = transformers.BartModel(transformers.BartConfig(**sizes))
    report = patch(model, ("attention",))
    assert not report.replaced and len(report.not_replaced) == 3
    assert "another attention with the same config cannot be replaced" in str(report)
    assert model.config._attn_implementation == "sdpa"


def test_head_dims_without_a_kernel(device):
    model = build(device=device, head_dim=12)
    why = "expected a head_dim that is a multiple of 8 up to 256; got 12"
    assert why in reason(model, "attention", ("attention",))


def test_another_model_of_the_class_and_the_class_itself_stay_as_they_are(device, tokens):
    from transformers.models.llama import modeling_llama

    def state():
        members = {k: v for k, v in vars(modeling_llama).items() if k != "__builtins__"}
        for name, value in list(members.items()):
            if isinstance(value, type) and value.__module__ == modeling_llama.__name__:
                members |= {f"{name}.{key}": member for key, member in vars(value).items()}
        return members

    ours = build(device=device)
    other = type(ours)(ours.config).to(device).eval()  # of the same config object
    other.load_state_dict(ours.state_dict())
    before, parts, logits = state(), snapshot(other), other(tokens).logits
    functions = dict(modeling_llama.ALL_ATTENTION_FUNCTIONS)
    patch(ours, ROW_OPS)
    ours(tokens)
    after = state()
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    assert dict(modeling_llama.ALL_ATTENTION_FUNCTIONS) == functions
    assert snapshot(other) == parts
    assert_same_bits(other(tokens).logits, logits)
    assert not torch.equal(ours(tokens).logits, logits)


def test_unpatch_gives_back_every_attribute(device, tokens):
    model = build(device=device)
    model(tokens)
    keys, before, logits = list(model.state_dict()), snapshot(model), model(tokens).logits
    patch(model)
    assert list(model.state_dict()) == keys
    model.load_state_dict(model.state_dict())
    unpatch(model)
    assert snapshot(model) == before
    unpatch(model)
    assert snapshot(model) == before
    assert_same_bits(model(tokens).logits, logits)


def test_patching_twice_is_patching_once(device, tokens):
    model = build(device=device)
    before = snapshot(model)
    first = patch(model, ("swiglu",))
    partly = snapshot(model)
    with patch(model, ROW_OPS) as second:
        assert set(first.replaced) < set(second.replaced)
        both = snapshot(model)
        assert patch(model, ROW_OPS).replaced == second.replaced
        assert snapshot(model) == both
    assert snapshot(model) == partly
    unpatch(model)
    assert snapshot(model) == before


def test_attention_first_and_the_others_later(device):
    model = build(device=device)
    patch(model, ("attention",), strict=True)
    patch(model, ROW_OPS, strict=True)
    assert patch(model).replaced == patch(build(device=device)).replaced


def test_the_report_undoes_its_call_at_the_end_of_a_block(device):
    model = build(device=device)
    before = snapshot(model)
    with pytest.raises(KeyError), patch(model, ROW_OPS):
        assert snapshot(model) != before
        raise KeyError
    assert snapshot(model) == before


def test_an_old_report_does_not_undo_a_new_call(device):
    model = build(device=device)
    with patch(model, ROW_OPS):
        unpatch(model)
        patch(model, ROW_OPS)
        patched = snapshot(model)
    assert snapshot(model) == patched


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_patched_for_themselves(how, device, tokens):
    model = build(device=device)
    plain = model(tokens).logits
    patch(model)
    logits = model(tokens).logits
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for module in twin.modules():
        if "forward" in vars(module):
            assert module.forward.args[0] is module
    assert_same_bits(twin(tokens).logits, logits)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.zero_()
    assert_same_bits(model(tokens).logits, logits)
    unpatch(twin)
    assert all("forward" not in vars(module) for module in twin.modules())
    assert_same_bits(model(tokens).logits, logits)
    unpatch(model)
    assert_same_bits(model(tokens).logits, plain)


def test_a_pickle_runs_in_a_fresh_process(device, tokens, tmp_path):
    """Whole, and a part of it alone; nothing there has registered our attention."""
    model = build(device=device)
    patch(model)
    torch.save((model, model.model, tokens, model(tokens).logits), tmp_path / "model.pt")
    torch.save((model.model, tokens), tmp_path / "part.pt")
    codes = {
        "whole": "import torch\n"
        f"model, part, tokens, logits = torch.load({str(tmp_path / 'model.pt')!r},"
        " weights_only=False)\n"
        "assert torch.equal(model(tokens).logits, logits)\n"
        "assert part.layers[0].self_attn.config._attn_implementation == 'gqa_kernels'",
        "part": "import torch\n"
        f"part, tokens = torch.load({str(tmp_path / 'part.pt')!r}, weights_only=False)\n"
        "part(tokens)",
    }
    for how in ("named before", "overlapping"):
        # Every attention brings the registration, whichever call replaced it.
        torch.save(attention_of_a_model(how, device), tmp_path / f"{how}.pt")
        codes[how] = (
            "import torch\n"
            f"torch.load({str(tmp_path / f'{how}.pt')!r}, weights_only=False)\n"
            "from transformers import AttentionInterface\n"
            "assert 'gqa_kernels' in AttentionInterface()"
        )
    environment = {"TRITON_INTERPRET": "1"} if device.type == "cpu" else {}
    forked(codes, tmp_path, "triton", "transformers.models.llama.modeling_llama", **environment)


def attention_of_a_model(how, device):
    model = build(device=device)
    attention = model.model.layers[0].self_attn
    if how == "named before":
        adapter.register()
        model.set_attn_implementation("gqa_kernels")
        patch(model)
    else:
        with patch(model.model.layers[0], ("attention",)):
            patch(model, ("attention",))
    return attention


def test_a_training_step_then_unpatch(device, tokens):
    model = build(device=device).train()
    patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(tokens, labels=tokens).loss
    before.backward()
    optimizer.step()
    assert model(tokens, labels=tokens).loss < before
    unpatch(model)
    never_patched = build(device=device).train()
    never_patched.load_state_dict(model.state_dict())
    assert_same_bits(model(tokens).logits, never_patched(tokens).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, device, tokens):
    model = build(device=device).train()
    patch(model)
    runs = []
    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.down_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(runs) == 2
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert len(runs) == 2 + 4  # each layer once more, in the backward pass
    assert_same_bits({name: p.grad for name, p in model.named_parameters()}, gradients)


def test_hidden_states_and_hooks(device, tokens):
    model = build(device=device)
    patch(model)
    logits, seen = model(tokens).logits, []
    norm = model.model.layers[0].post_attention_layernorm
    hook = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    out = model(tokens, output_hidden_states=True)
    assert len(seen) == 1
    assert_same_bits(out.logits, logits)  # one pass or two
    hook.remove()
    assert_same_bits(model(tokens).logits, logits)
    assert len(seen) == 1
    unpatch(model)

    def hidden_states(model):
        return model(tokens, output_hidden_states=True).hidden_states

    assert_network(
        out.hidden_states, model, hidden_states, lambda model: double(model)(hidden_states)
    )


def test_the_residual_add_and_the_norm_are_one_call(device, tokens, monkeypatch):
    from gqa_kernels import fused

    calls, add_rms_norm = [], fused.add_rms_norm
    monkeypatch.setattr(fused, "add_rms_norm", lambda *args: calls.append(1) or add_rms_norm(*args))
    model = build(device=device)
    patch(model, ROW_OPS)
    model(tokens)
    assert len(calls) == 2


def test_autocast(device, tokens):
    """Updates in bfloat16 beside a float32 residual: two steps instead of an error."""
    model = build(device=device)
    patch(model)

    def logits(model):
        with torch.autocast(device.type, torch.bfloat16):
            return model(tokens).logits

    ours = logits(model)
    unpatch(model)
    assert_network(ours, model, logits, lambda model: double(model)(lambda m: m(tokens).logits))


@pytest.mark.parametrize("family", ["Llama", long("Mistral"), long("Qwen3")])
def test_generation(family, device):
    changes = {"sliding_window": 4} if family == "Mistral" else {}
    model = build(family, device, **changes)
    prompts = torch.randint(3, 97, (2, 6), device=device)
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0  # on the left: positions differ in every row
    options = {
        "attention_mask": mask,
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
    }
    theirs = model.generate(prompts, **options)
    with patch(model):
        ours = model.generate(prompts, **options)
        static = model.generate(prompts, cache_implementation="static", **options)
    assert torch.equal(ours, theirs) and torch.equal(static, theirs)


def test_compiled(device, tokens):
    model = build(device=device).train()
    patch(model)
    # Without a mask, Transformers 4 looks for packed documents, which needs the positions' values.
    options = {"attention_mask": torch.ones_like(tokens)}
    logits, gradients = loss_and_gradients(model, tokens, **options)
    ops = set()

    def backend(graph, inputs):
        ops.update(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ours = compiled(tokens, use_cache=False, **options).logits
    for op in ("rms_norm", "add_rms_norm", "swiglu", "apply_rope", "flash_attention"):
        assert f"gqa_kernels.{op}.default" in ops
    assert_same_bits(ours, logits)
    torch.nn.functional.cross_entropy(
        ours[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    for name, parameter in model.named_parameters():
        assert_same_bits(parameter.grad, gradients[name])


def fully_sharded(patch_first):
    """Gradients of a patched model with FSDP2, its norms sharded for themselves too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = build().train()
    tokens = torch.randint(3, 97, (2, 7))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with patch(model):
        _, expected = loss_and_gradients(model, tokens)
    if patch_first:
        patch(model)
    for layer in model.model.layers:
        for module in (layer.post_attention_layernorm, layer.mlp, layer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not patch_first:
        assert counts(patch(model))["add_rms_norm"] == 2
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name])
    unpatch(model)
    assert all("forward" not in vars(module) for module in model.modules())


def patch_then_shard():
    fully_sharded(True)


def shard_then_patch():
    fully_sharded(False)


def test_fully_sharded():
    cases = {"patch, then shard": patch_then_shard, "shard, then patch": shard_then_patch}
    ranks.run(cases, 2)  # raises where a case fails


class Adapted(nn.Module):
    """A projection as adapters wrap it: without a weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, device=base.weight.device)
        self.up = nn.Linear(2, base.out_features, bias=False, device=base.weight.device)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Wrapper(nn.Module):
    """Shows the attributes of what it wraps, as PEFT's wrappers do."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("wrapped"), name)

    def forward(self, x, *args, **kwargs):
        return self.wrapped(x, *args, **kwargs)


@pytest.mark.parametrize("wrap_first", [False, True])
def test_adapters(wrap_first, device, tokens):
    model = build(device=device)

    def wrap():
        for layer in model.model.layers:
            for parent, names in ((layer.mlp, "gate down"), (layer.self_attn, "q v o")):
                for name in names.split():
                    setattr(parent, f"{name}_proj", Adapted(getattr(parent, f"{name}_proj")))
            layer.post_attention_layernorm = Wrapper(layer.post_attention_layernorm)

    if wrap_first:
        wrap()
    outer = Wrapper(model)
    report = patch(outer, ROW_OPS, strict=True)
    if not wrap_first:
        wrap()
    # A wrapped norm has work of its own to do: it is called.
    assert counts(report).get("add_rms_norm", 0) == (0 if wrap_first else 2)
    assert "wrapped.model.layers.1.mlp" in {name for name, _ in report.replaced}
    ours = loss_and_gradients(outer, tokens)
    unpatch(outer)
    assert_as_before(ours, outer, tokens)


def test_strict_leaves_the_model_as_it_was(device):
    model = build("Gemma", device)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model: expected every op to be replaced; got(.|\n)*mlp"):
        patch(model, ROW_OPS, strict=True)
    assert snapshot(model) == before
    patch(model, ("rms_norm", "rope"), strict=True)


@pytest.mark.parametrize("ops", [("rmsnorm",), "swiglu", ("swiglu", "mlp")])
def test_unknown_ops(ops):
    known = "rms_norm, swiglu, rope, attention"
    with pytest.raises(ValueError, match=f"ops: expected a set of some of {known}"):
        patch(nn.Linear(2, 2), ops)


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got dict"):
        patch({})


def test_what_is_not_there_is_reported():
    report = patch(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert report.replaced == []
    assert [entry.op for entry in report.not_replaced] == [
        "attention",
        "rms_norm",
        "swiglu",
        "rope",
    ]
    assert "rms_norm not replaced: the model has no module of its kind" in str(report)


def test_the_report_reads_well(device):
    report = patch(build("Gemma", device), ROW_OPS)
    assert str(report).splitlines() == [
        "GemmaForCausalLM:",
        "  rope: model.layers.*.self_attn (2)",
        "  rms_norm: model.layers.*.input_layernorm (2), "
        "model.layers.*.post_attention_layernorm (2), model.norm",
        "  swiglu not replaced in model.layers.*.mlp (2): "
        "its maths is not SwiGLU's: down(silu(gate) · up)",
    ]


def reason(model, op, ops=ROW_OPS):
    (found,) = {entry.reason for entry in patch(model, ops).not_replaced if entry.op == op}
    return found


def test_a_forward_on_the_instance_stands(device):
    model = build(device=device)
    mlp = model.model.layers[0].mlp
    mlp.forward = MethodType(lambda self, x: 0 * x, mlp)
    before = snapshot(model)
    assert reason(model, "swiglu") == "its forward is set on the instance, not by its class"
    unpatch(model)
    assert snapshot(model) == before


def test_a_forward_set_over_ours_is_not_removed(device):
    model = build(device=device)
    patch(model, ROW_OPS)
    mlp = model.model.layers[1].mlp
    ours, mlp.forward = mlp.forward, lambda x: x
    before = snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"LlamaMLP.forward: expected what patch set; got another"
    ):
        unpatch(model)
    assert snapshot(model) == before
    mlp.forward = ours
    unpatch(model)
    assert all("forward" not in vars(module) for module in model.modules())


class Norm(nn.Module):
    """Llama's, with a place to go wrong."""

    def __init__(self, change=lambda x: x, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(48) + 0.5)
        self.variance_epsilon, self.change = eps, change

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * self.change((wide * scale).to(x.dtype))


class NormWithoutEps(Norm):
    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True))).to(x.dtype)


class NormInInputDtype(Norm):
    def forward(self, x):
        return self.weight * (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )


class CenteredNorm(Norm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class NormWithResidual(Norm):
    def forward(self, x, residual=None):
        return super().forward(x if residual is None else x + residual)


class Torchlike(Norm):
    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * wide * scale).to(x.dtype)


@pytest.mark.parametrize(
    "norm",
    [NormWithoutEps(), NormInInputDtype(), CenteredNorm(), NormWithResidual(), Norm(torch.relu)],
)
def test_norms_that_compute_something_else(norm):
    report = patch(nn.Sequential(norm), ("rms_norm",))
    assert not report.replaced
    assert "forward" not in vars(norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Norm, Torchlike])
def test_norms_that_round_early_and_late(kind, dtype, device):
    norm = kind().to(device, dtype)
    x = torch.randn(33, 48, device=device, dtype=dtype)
    with torch.no_grad():
        theirs = norm(x)
        patch(norm, ("rms_norm",), strict=True)
        ours = norm(x)
    # The float32 statistics differ in their last bits; 16-bit results as good as never.
    assert (ours != theirs).float().mean() < (1.0 if dtype is torch.float32 else 0.01)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_norms_on_request(dtype, device):
    model = nn.Sequential(nn.RMSNorm(48, eps=1e-5)).to(device, dtype)
    assert "multiplies by its weight before it rounds" in reason(model, "rms_norm", ("rms_norm",))
    nn.init.uniform_(model[0].weight, 0.5, 1.5)
    x = torch.randn(33, 48, device=device, dtype=dtype)
    unpatched = copy.deepcopy(model)
    patch(model, ("torch_rms_norm",), strict=True)
    eager = gqa_kernels.get_backend("eager")

    def exact(model):
        return nn.functional.rms_norm(x.double(), (48,), model[0].weight.double(), 1e-5)

    assert_network(model(x), unpatched, lambda m: eager.rms_norm(x, m[0].weight, 1e-5), exact)
    assert_network(model(x), unpatched, lambda m: m(x), exact)


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (nn.RMSNorm(48), "eps is None"),
        (nn.RMSNorm((2, 24), eps=1e-5), "one dimension"),
        (nn.RMSNorm(48, eps=1e-5, elementwise_affine=False), "no weight"),
    ],
)
def test_torch_norms_without_a_kernel(norm, why):
    assert why in reason(norm, "torch_rms_norm", ("torch_rms_norm",))


def with_mlp(activation):
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp = LlamaMLP(transformers.LlamaConfig(**SIZES))
    mlp.act_fn = activation
    return mlp


class Swapped(nn.Module):
    """SiLU on the other half."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(6, 8)

    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(torch.nn.functional.silu(gate) * up)


class Clamped(nn.Module):
    def forward(self, x):
        return torch.nn.functional.silu(x).clamp(max=30.0)


@pytest.mark.parametrize(
    "mlp",
    [with_mlp(nn.GELU()), with_mlp(nn.Sigmoid()), with_mlp(Clamped()), Swapped()],
    ids=["gelu", "sigmoid", "clamped", "swapped"],
)
def test_other_mlps(mlp):
    assert reason(mlp, "swiglu").startswith("its maths is not SwiGLU's")


def test_an_activation_with_a_hook():
    mlps = nn.ModuleList([with_mlp(nn.SiLU()), with_mlp(nn.SiLU())])
    mlps[1].config = mlps[0].config
    mlps[1].act_fn.register_forward_hook(lambda *_: None)
    assert reason(mlps, "swiglu") == "its act_fn has a hook, which the kernel would not call"
    assert "forward" not in vars(mlps[1])


def test_layers_that_add_otherwise(device, tokens):
    """Granite scales the update; without a scale its layer is Llama's."""
    if transformers.__version__ >= "5":  # whose layers return a tensor
        assert counts(patch(build("Granite", device), ROW_OPS))["add_rms_norm"] == 2
    model = build("Granite", device, residual_multiplier=0.5)
    plain = copy.deepcopy(model)
    assert "add_rms_norm" not in counts(patch(model, ROW_OPS))
    assert_gives_the_logits(model(tokens).logits, plain, tokens)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("StableLm", {}, "rotates only some features: partial_rotary_factor 0.25"),
        ("Phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("Cohere", {}, "its steps are not projection, rotation by halves, cache and attention"),
        ("Olmo2", {}, "its forward cannot be checked"),
    ],
)
def test_other_rotations(family, changes, why, device):
    assert why in reason(build(family, device, **changes), "rope")


def test_an_attention_with_steps_of_its_own(device, tokens):
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Scaled(LlamaAttention):
        def forward(self, hidden_states, **kwargs):
            return super().forward(2 * hidden_states, **kwargs)

    model = build(device=device)
    for layer in model.model.layers:
        layer.self_attn.__class__ = Scaled
    plain = copy.deepcopy(model)
    assert "rope" in {entry.op for entry in patch(model, ROW_OPS).not_replaced}
    assert_gives_the_logits(model(tokens).logits, plain, tokens)


def test_checking_runs_no_module_and_draws_no_global_number(device):
    model = build(device=device)
    for module in model.modules():
        if type(module).__name__ != "SiLUActivation":
            module.register_forward_pre_hook(lambda *_: pytest.fail("a module was run"))
    state = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        patch(model, ROW_OPS, strict=True)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"):
        huge = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    patch(huge, ROW_OPS, strict=True)


def test_this_repository_s_model_has_its_own_way_to_the_kernels(device):
    from small_llama import lively, small_config

    model = lively(small_config(), device)
    report = patch(model)
    assert not report.replaced
    assert {entry.op for entry in report.not_replaced} == set(gqa_kernels.patching.DEFAULT_OPS)


def test_modules_of_this_package_are_left_alone():
    from gqa_kernels.nn import Attention, RMSNorm, SwiGLU

    model = nn.Sequential(RMSNorm(16), SwiGLU(16, 24), Attention(16, 2, 1))
    report = patch(model, ROW_OPS)
    assert not report.replaced
    assert {entry.module for entry in report.not_replaced} == {""}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_the_default_dtype_decides_nothing(dtype):
    """In 16 bits a check's own roundings would hide another activation."""
    models = [build(), build(hidden_act="relu"), build("Gemma")]
    torch.set_default_dtype(dtype)
    try:
        reports = [patch(model, ROW_OPS) for model in models]
    finally:
        torch.set_default_dtype(torch.float32)
    assert not reports[0].not_replaced
    for report in reports[1:]:
        assert {entry.op for entry in report.not_replaced} == {"swiglu"}


def test_every_activation_is_judged_by_its_own_settings():
    class Swish(nn.Module):
        def __init__(self, beta):
            super().__init__()
            self.beta = beta

        def forward(self, x):
            return x * torch.sigmoid(self.beta * x)

    model = build()
    model.model.layers[0].mlp.act_fn, model.model.layers[1].mlp.act_fn = Swish(1.0), Swish(1.7)
    report = patch(model, ["swiglu"])
    assert [entry.module for entry in report.replaced] == ["model.layers.0.mlp"]
    unpatch(model)
    model.model.layers[0].mlp.act_fn = Swish(nn.Parameter(torch.ones(())))
    assert "has a parameter" in str(patch(model, ["swiglu"]))


def test_arguments_keep_their_names(tokens, device):
    model = build("Phi3").to(device)
    x = torch.randn(2, 3, 48, device=device)
    norm, mlp = model.model.norm, model.model.layers[0].mlp
    expected = norm(hidden_states=x), mlp(hidden_states=x)
    with patch(model, ROW_OPS):
        torch.testing.assert_close((norm(hidden_states=x), mlp(hidden_states=x)), expected)


def test_positions_that_do_not_fit_are_named(tokens, device):
    model = build().to(device)
    plain, one = copy.deepcopy(model), torch.tensor([[5], [3]], device=device)
    patch(model, ROW_OPS)
    result = model(tokens, position_ids=one).logits
    assert_gives_the_logits(result, plain, tokens, position_ids=one)
    with pytest.raises(ValueError, match=r"position_ids: expected \[2 or 1, 7\]; got \[2, 9\]"):
        model(tokens, position_ids=torch.arange(9, device=device)[None].repeat(2, 1))


@pytest.mark.parametrize("ops", (None, 5, iter(["swiglu"]), ["gelu"], "swiglu"))
def test_ops_that_are_none_are_named(ops):
    with pytest.raises(ValueError, match="ops: expected a set of some of"):
        patch(build(), ops)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        unpatch(None)


class _Hooked:
    """What Accelerate sets on the modules of a model that it has dispatched."""

    def __init__(self):
        self.calls = 0

    def add(self, module):
        module._hf_hook, module._old_forward = self, module.forward

        def forward(*args, **kwargs):
            self.calls += 1
            return module._old_forward(*args, **kwargs)

        module.forward = forward


def test_a_model_that_accelerate_has_dispatched(device, tokens):
    model, hook = build(device=device), _Hooked()
    plain = build(device=device)
    plain.load_state_dict(model.state_dict())
    patch(plain)
    expected = plain(tokens).logits
    for module in model.modules():
        hook.add(module)
    report = patch(model, strict=True)
    found = counts(report)
    assert found["rms_norm"] == counts(patch(plain))["rms_norm"] and found["rope"] > 0
    assert_same_bits(model(tokens).logits, expected)
    assert hook.calls > 0
    unpatch(model)
    unpatch(plain)
    assert_same_bits(model(tokens).logits, plain(tokens).logits)


def test_layers_that_are_not_fused_are_reported(device):
    model = build(device=device)
    for layer in model.model.layers:
        layer.forward = layer.forward
    report = patch(model)
    assert "add_rms_norm" not in counts(report)
    assert (
        "add_rms_norm not fused in model.layers.* (2): its forward is set on the instance"
        in str(report)
    )
    assert not report.not_replaced


def test_threads_patch_models_of_their_own():
    models = [build() for _ in range(4)]
    expected = {(entry.module, entry.op) for entry in patch(copy.deepcopy(models[0])).replaced}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(models)) as threads:
            reports = list(threads.map(patch, models))
    finally:
        sys.setswitchinterval(interval)
    for report in reports:
        assert {(entry.module, entry.op) for entry in report.replaced} == expected
