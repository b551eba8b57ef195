"""The loss that `patch` puts into a model, in Trainer, in TRL's SFTTrainer and under FSDP2."""

import copy

import pytest
import torch
import torch.nn.functional as F
from combinations import long

pytest.importorskip("transformers")

import ranks
import transformers
from budget import SEED, assert_network
from tiny_transformers import VOCABULARY, double, make

from gqa_kernels import patch

OP = ("linear_cross_entropy",)
LENGTH = 12


@pytest.fixture
def rows():
    """Of several lengths, with a prompt that is not learned."""
    generator = torch.Generator().manual_seed(SEED + 2)
    found = []
    for _ in range(16):
        count = int(torch.randint(4, LENGTH + 1, (1,), generator=generator))
        tokens = torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
        found.append({"input_ids": tokens, "labels": [-100] * (count // 3) + tokens[count // 3 :]})
    return found


def padded(rows):
    def column(name, filler):
        return torch.tensor([row[name] + [filler] * (LENGTH - len(row[name])) for row in rows])

    tokens = column("input_ids", 0)
    labels = column("labels", -100)
    return {"input_ids": tokens, "labels": labels, "attention_mask": (tokens != 0).long()}


def options(directory):
    return {
        "output_dir": str(directory),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "optim": "sgd",  # Adam would make a sign out of the error of a small gradient
        "learning_rate": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
    }


def results(trainer):
    """Losses, and the weights in the end. Those of the last norm stand beside the losses, which are
    as large and too few to be judged alone."""
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses.append(trainer.evaluate()["eval_loss"])
    dtype = next(trainer.model.parameters()).dtype
    weights = {name: x.detach().cpu() for name, x in trainer.model.named_parameters()}
    losses = torch.tensor(losses, dtype=dtype)
    return {"losses": torch.cat([losses, weights["model.norm.weight"]]), **weights}


def exact_loss(outputs, labels, num_items_in_batch=None):
    """In float64, to which Transformers' own loss does not go."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    real = targets != -100
    count = real.sum() if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(logits[real], targets[real], reduction="sum") / count


@pytest.mark.parametrize("kind", ("Llama", long("Gemma2")))
def test_trainer(kind, tmp_path, rows):
    pytest.importorskip("accelerate")
    plain = make(kind, num_hidden_layers=1, final_logit_softcapping=3.0)
    model = copy.deepcopy(plain)
    patch(model, OP)

    def train(model, **others):
        arguments = transformers.TrainingArguments(**options(tmp_path))
        data = {"train_dataset": rows, "eval_dataset": rows[:4], "data_collator": padded}
        return results(transformers.Trainer(model, arguments, **data, **others))

    with torch.no_grad():
        assert model(torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).logits is None
    assert_network(
        train(model),
        plain,
        train,
        lambda m: double(m)(lambda wide: train(wide, compute_loss_func=exact_loss)),
    )


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", unk_token="w1", eos_token="w2"
    )


@pytest.mark.parametrize("packing", (False, True), ids=("completions", "packing"))
def test_sft_trainer(packing, tmp_path, rows):
    """TRL 1.16 makes its own loss from hidden states, whatever the model would do."""
    trl = pytest.importorskip("trl", minversion="1.16")
    datasets = pytest.importorskip("datasets")
    texts = [[f"w{i}" for i in row["input_ids"]] for row in rows]
    if packing:
        data = [{"text": " ".join(words)} for words in texts]
    else:
        data = [{"prompt": " ".join(w[:2]) + " ", "completion": " ".join(w[2:])} for w in texts]
    data = datasets.Dataset.from_list(data)

    def train(model):
        arguments = trl.SFTConfig(**options(tmp_path), packing=packing, max_length=LENGTH)
        data_for = {"train_dataset": data, "eval_dataset": data.select(range(4))}
        return results(trl.SFTTrainer(model, arguments, **data_for, processing_class=tokenizer()))

    plain = make(num_hidden_layers=1)
    model = copy.deepcopy(plain)
    patch(model, OP)
    torch.testing.assert_close(train(model), train(plain), rtol=0, atol=0)


def fully_sharded(patch_first):
    """Loss and gradients with FSDP2, which gathers the head's weight for the whole call."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make(tie_word_embeddings=True).train()
    tokens = torch.randint(3, VOCABULARY, (2, 7))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with patch(model, OP):
        loss = model(tokens, labels=tokens).loss
    expected = dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(loss, model.parameters()),
            strict=True,
        )
    )
    if patch_first:
        patch(model, OP)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not patch_first:
        patch(model, OP)
    output = model(tokens, labels=tokens)
    assert output.logits is None
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=0)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name])
    with pytest.raises(NotImplementedError, match="plain weight; got a DTensor"):
        model.reshard()
        model.forward(tokens, labels=tokens)  # nothing gathers it here

    model = make()
    patch(model, OP)
    fully_shard(model.lm_head, mesh=mesh)
    with pytest.raises(NotImplementedError, match=r"not another class; got .*FSDPLinear"):
        model(tokens, labels=tokens)


def patch_then_shard():
    fully_sharded(True)


def shard_then_patch():
    fully_sharded(False)


def test_fully_sharded():
    cases = {"patch, then shard": patch_then_shard, "shard, then patch": shard_then_patch}
    ranks.run(cases, 2)  # raises where a case fails
