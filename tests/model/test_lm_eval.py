"""The model that lm-eval asks gives the answers of lm-eval's own `hf` model, on both backends."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_llama import small_config

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("accelerate", reason="accelerate, which lm-eval's hf needs, is not installed")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from gqa_kernels import get_backend
from llama2 import Llama2, checkpoint
from llama2.chat_format import CHAT_TEMPLATES
from llama2.evaluation import harness, scoring
from llama2.evaluation.harness import Llama2LM

SHIPPED = checkpoint.SHIPPED
TASKS = Path(__file__).parents[1] / "support" / "lm_eval_tasks"
LONG = "def f(self, x):\n    return x + 1\n\n\n" * 40  # several times the model's 256 tokens
# Of unequal lengths, in no order. None begins with a space: Transformers does not put a second one
# before it, as SentencePiece does.
PAIRS = [
    ("def f(x):", "\n    return x"),
    (LONG, "class A:"),
    ("import", " os"),
    ("", "import sys"),
    ("é 漢字", ' 🙂"""'),
    ("import", " sys"),
    ("x = ", "1"),  # the space is the continuation's
    (LONG + "if x", " is None:\n" * 20),
    ("try:\n    x\nexcept", " ValueError"),
    ("def __init__(self", ", name, value=None):\n        self.name = name"),
]
DOCUMENTS = ["def f(x):\n    return x", LONG, "", "é 漢字 🙂", "x", LONG[:1000]]


def instances(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=index)
        for index, given in enumerate(arguments)
    ]


def ask(lm, kind, *arguments):
    return getattr(lm, kind)(instances(kind, *arguments))


@pytest.fixture(scope="module")
def hf():
    # Its cache of logits mixes up continuations of different lengths that follow the same tokens.
    settings = {"dtype": "float32", "device": "cpu", "batch_size": 3, "logits_cache": False}
    return HFLM(pretrained=str(SHIPPED), **settings)


@pytest.fixture(scope="module")
def ours():
    return Llama2LM(SHIPPED, backend="eager", device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def exact():
    lm = Llama2LM(SHIPPED, backend="eager", device="cpu", batch_size=3)
    lm.model = checkpoint.load(SHIPPED, get_backend("eager"), dtype=torch.float64)
    return lm


def assert_equal_up_to_rounding(ours, theirs, exact, num_targets):
    """Theirs are within γₙ = n · u of float64's, ours at most twice as far as theirs."""
    ours, theirs, exact = (torch.tensor(x, dtype=torch.float64) for x in (ours, theirs, exact))
    config = checkpoint.load_config(SHIPPED)
    widths = 2 * config.hidden_size + config.intermediate_size + config.max_seq_len
    roundings = config.num_layers * widths + config.hidden_size
    unit = torch.finfo(torch.float32).eps / 2
    largest_logit = 30  # more than log p of any token here
    bound = roundings * unit * largest_logit * torch.tensor(num_targets)
    assert ((theirs - exact).abs() <= bound).all()
    rounding = unit * exact.abs().max()  # of a sum that is a float32
    assert rms(ours - exact) <= 2 * rms(theirs - exact) + rounding


def rms(x):
    return x.square().mean().sqrt()


def test_log_likelihoods_are_those_of_hf(hf, ours, exact):
    answers = [ask(lm, "loglikelihood", *PAIRS) for lm in (ours, hf, exact)]
    sums, greedy = zip(*(zip(*answer, strict=True) for answer in answers), strict=True)
    assert_equal_up_to_rounding(*sums, [len(ours.tok_encode(text)) for _, text in PAIRS])
    assert greedy[0] == greedy[1] == greedy[2]


def test_is_greedy_says_whether_the_model_would_write_it(hf, ours):
    contexts = ["import", "def f(x):", "class A", "é"]
    said = ask(ours, "generate_until", *((text, {"max_gen_toks": 3}) for text in contexts))
    pairs = [(context, text) for context, text in zip(contexts, said, strict=True)]
    pairs += [(context, text[:-1] + "§") for context, text in pairs]
    greedy = [flag for _, flag in ask(ours, "loglikelihood", *pairs)]
    assert greedy == [flag for _, flag in ask(hf, "loglikelihood", *pairs)]
    assert any(greedy[:4]) and not any(greedy[4:])


def test_rolling_log_likelihoods_are_those_of_hf(hf, ours, exact):
    documents = [(text,) for text in DOCUMENTS]
    sums = [ask(lm, "loglikelihood_rolling", *documents) for lm in (ours, hf, exact)]
    assert_equal_up_to_rounding(*sums, [len(ours.tok_encode(text)) for text in DOCUMENTS])


def test_generation_is_that_of_hf(hf, ours):
    requests = [
        ("def f(x):\n    return", {"until": ["\n\n"], "max_gen_toks": 40}),
        ("import os\n", {"until": ["\n"], "max_gen_toks": 20}),
        (LONG, {"until": ["def", "x"], "max_gen_toks": 64}),
        ("class A:\n", {"max_gen_toks": 30, "do_sample": False, "temperature": 0.7}),
        ("", {"max_gen_toks": 30}),
        ("é", {"until": "the", "max_gen_toks": 30, "num_beams": 1}),
        ("import os\n", {"until": ["\n"], "max_gen_toks": 20}),
        (LONG + "x", {"until": [], "max_new_tokens": 70}),
    ]
    said = ask(ours, "generate_until", *requests)
    assert said == ask(hf, "generate_until", *requests)
    assert len(set(said)) == len(requests) - 1


def test_a_shorter_max_length_cuts_as_hf_does(exact, caplog):
    sizes = {"device": "cpu", "dtype": "float32", "max_length": 24}
    theirs = HFLM(pretrained=str(SHIPPED), batch_size=2, logits_cache=False, **sizes)
    ours = Llama2LM(SHIPPED, backend="eager", batch_size=2, **sizes)
    # The float64 model takes more tokens; the adapter cuts.
    reference = Llama2LM(SHIPPED, backend="eager", batch_size=2, **sizes)
    reference.model = exact.model
    pairs = [("a = 1\n" * n, f"x = {n}") for n in (1, 5, 6, 7, 9, 40)]
    answers = [ask(lm, "loglikelihood", *pairs) for lm in (ours, theirs, reference)]
    sums = [[value for value, _ in answer] for answer in answers]
    assert_equal_up_to_rounding(*sums, [5] * len(pairs))
    requests = [(context, {"max_gen_toks": 12}) for context, _ in pairs]
    with caplog.at_level("WARNING", logger="lm_eval"):
        said = ask(ours, "generate_until", *requests)
    assert said == ask(theirs, "generate_until", *requests)
    num_cut = sum(len(ours.tok_encode(context)) > 12 for context, _ in pairs)
    assert f"{num_cut} of 6 requests are longer" in caplog.text and num_cut > 2


def test_no_continuation_is_certain(ours):
    assert ask(ours, "loglikelihood", ("x = 1", ""), ("x", " = 1"))[0] == (0.0, True)
    assert ask(ours, "loglikelihood") == ask(ours, "loglikelihood_rolling") == []
    assert ask(ours, "generate_until") == []


def test_continuations_after_the_same_tokens_go_through_the_model_once(ours, monkeypatch):
    seen, run = [], ours.model.hidden_states

    def counted(tokens, *arguments, **settings):
        seen.append(tokens.shape[1])
        return run(tokens, *arguments, **settings)

    monkeypatch.setattr(ours.model, "hidden_states", counted)
    pairs = [("import os\nimport", name) for name in (" sys", " os", "(", ".")]
    together = ask(ours, "loglikelihood", *pairs)
    assert sum(seen) == len(ours.tok_encode("import os\nimport"))
    monkeypatch.undo()
    for pair, answer in zip(pairs, together, strict=True):
        (alone,) = ask(ours, "loglikelihood", pair)
        assert answer == (pytest.approx(alone[0], rel=1e-5), alone[1])


def test_prompts_that_begin_alike_share_it(ours, monkeypatch):
    seen, run = [], ours.model.hidden_states

    def counted(tokens, *arguments, **settings):
        seen.append(tokens.shape[1])
        return run(tokens, *arguments, **settings)

    monkeypatch.setattr(ours.model, "hidden_states", counted)
    shots = LONG[:400]
    requests = [(f"{shots}x = {n}", {"max_gen_toks": 1}) for n in range(8)]
    ask(ours, "generate_until", *requests)
    # Of the first step, at most batch_size prompts are admitted before any is in the cache.
    assert sum(seen) < (ours.batch_size + 0.5) * len(ours.tok_encode(requests[0][0]))


def test_generation_ends_where_a_string_stops_it(ours, monkeypatch):
    (whole,) = ask(ours, "generate_until", ("class A:\n", {"max_gen_toks": 64}))
    stop = whole[5:8]
    lengths, serve = [], harness.serve

    def counted(*arguments, **settings):
        for result in serve(*arguments, **settings):
            lengths.append(len(result.tokens))
            yield result

    monkeypatch.setattr(harness, "serve", counted)
    settings = {"max_gen_toks": 64, "until": [stop]}
    assert ask(ours, "generate_until", ("class A:\n", settings)) == [whole.partition(stop)[0]]
    assert lengths[0] <= 8


def test_draws_hang_on_torchs_seed(ours):
    warm = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5}

    def drawn(seed, **changes):
        torch.manual_seed(seed)
        return ask(ours, "generate_until", *[("x =", warm | changes)] * 2)

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == 2
    assert set(drawn(1, top_p=1e-6)) == {
        *ask(ours, "generate_until", ("x =", {"max_gen_toks": 12}))
    }


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_gen_toks": 256}, ValueError, "max_gen_toks: expected less than max_length"),
        ({}, ValueError, "max_gen_toks: expected less than max_length"),
        ({"max_gen_toks": 4, "num_beams": 2}, NotImplementedError, "got num_beams=2"),
        (
            {"max_gen_toks": 4, "do_sample": True, "temperature": 1.0, "top_k": 3},
            NotImplementedError,
            "got top_k=3",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(ours, settings, error, message):
    with pytest.raises(error, match=message):
        ask(ours, "generate_until", ("x", settings))


def test_a_continuation_longer_than_the_model_is_refused(ours):
    with pytest.raises(ValueError, match=r"continuation: expected at most max_length \(256\)"):
        ask(ours, "loglikelihood", ("x", LONG))


def test_nan_is_refused():
    lm = Llama2LM(SHIPPED, backend="eager", device="cpu")
    lm.model.norm.weight.data.fill_(float("nan"))
    for kind, arguments in (("loglikelihood", ("a", "b")), ("loglikelihood_rolling", ("a",))):
        with pytest.raises(FloatingPointError, match="NaN"):
            ask(lm, kind, arguments)
    with pytest.raises(FloatingPointError, match="NaN"):
        ask(lm, "generate_until", ("a", {"max_gen_toks": 3}))


CHAT = [
    {"role": "system", "content": "Be brief, é."},
    {"role": "user", "content": " 1 + 1? </s><s> "},
    {"role": "assistant", "content": "2 <s>"},
    {"role": "user", "content": "1 + 2?"},
]


def test_a_chat_has_the_ids_of_encode_chat(ours):
    rendered = ours.apply_chat_template(CHAT)
    ids = ours.tok_encode(rendered)
    assert ids == ours.tokenizer.encode_chat(CHAT)
    assert (ids.count(1), ids.count(2)) == (2, 1)
    assert ours.tok_encode(ours.apply_chat_template(CHAT[3:])) == ours.tokenizer.encode_chat(
        CHAT[3:]
    )
    context, continuation = ours._encode_pair(rendered, " 3")
    assert context + continuation == ids + ours.tokenizer.encode("3", bos=False)
    begun = [*CHAT, {"role": "assistant", "content": "It is "}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False) == f"{rendered} It is"
    assert ours.chat_template(True) and ours.chat_template(False) is None
    with pytest.raises(ValueError, match="no name"):
        ours.chat_template("other")
    with pytest.raises(ValueError, match=r"messages\[0\]: expected a content without"):
        ours.apply_chat_template([{"role": "user", "content": "[INST]"}])


def test_a_chat_is_not_asked_in_a_format_that_the_checkpoint_was_not_taught(ours, monkeypatch):
    """Whether or not lm-eval asks for the template's name first, as `simple_evaluate` does not."""
    question = [{"role": "user", "content": "Why?"}]
    for form in CHAT_TEMPLATES:
        monkeypatch.setattr(ours, "format", form)
        assert ours.chat_template(False) is None
        if form == "chat":
            assert ours.chat_template(True) and ours.apply_chat_template(question)
            continue
        for ask in (lambda: ours.chat_template(True), lambda: ours.apply_chat_template(question)):
            with pytest.raises(ValueError, match=f"with the format {form}"):
                ask()


def test_a_leading_bos_is_not_doubled(ours):
    assert ours.tok_encode("<s>x = 1") == ours.tok_encode("x = 1")
    assert ours.tok_encode("x", add_special_tokens=False) == ours.tok_encode("x")[1:]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of one narrow layer with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = small_config(num_q_heads=2, num_kv_heads=1, head_dim=16)
    sizes = {"vocab_size": 1024, "hidden_size": 32, "num_layers": 1, "max_seq_len": 48}
    model = Llama2(type(config)(**{**vars(config), **sizes}), get_backend("eager"))
    checkpoint.save_hf(model, folder)
    shutil.copy(SHIPPED / "tokenizer.model", folder)
    return folder


def test_both_backends_agree(tiny, device):
    settings = {"device": str(device), "dtype": "float32", "batch_size": 2}
    eager, triton = (Llama2LM(tiny, backend=name, **settings) for name in ("eager", "triton"))
    pairs = [("x = 1", "\ny"), ("import", " os"), ("a" * 60, " b"), ("", "x")]
    for ours, theirs in zip(
        ask(triton, "loglikelihood", *pairs), ask(eager, "loglikelihood", *pairs), strict=True
    ):
        assert ours == (pytest.approx(theirs[0], rel=1e-5), theirs[1])
    assert ask(triton, "loglikelihood_rolling", ("def f(x):",)) == pytest.approx(
        ask(eager, "loglikelihood_rolling", ("def f(x):",)), rel=1e-5
    )
    prompts = [(text, {"max_gen_toks": 4}) for text in ("x = 1", "import os, sys")]
    assert ask(triton, "generate_until", *prompts) == ask(eager, "generate_until", *prompts)


def test_scores_refuse_what_would_be_nan(ours):
    window = scoring.Window((1,) * 257, [1])
    with pytest.raises(ValueError, match=r"windows\[0\]: expected at most max_seq_len \(256\)"):
        list(scoring.scores(ours.model, [window], batch_size=1, greedy=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype: expected auto, float32"),
        ({"batch_size": "auto"}, "batch_size: expected an int of at least 1; got 'auto'"),
        ({"max_length": 0}, "max_length: expected an int of at least 1; got 0"),
        ({"backend": "cuda"}, "backend: expected one of"),
        ({"checkpoint": "/nowhere"}, "/nowhere: expected a directory"),
    ],
    ids=str,
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        Llama2LM(**{"checkpoint": SHIPPED, "device": "cpu"} | settings)


def test_model_args_go_first():
    assert get_model("llama2") is Llama2LM
    text = f"checkpoint={SHIPPED},backend=eager,device=cpu,batch_size=5,max_length=99"
    lm = Llama2LM.create_from_arg_string(text, {"batch_size": 1, "device": "cuda:0", "more": None})
    assert (lm.batch_size, lm.max_length, lm.device.type) == (5, 99, "cpu")


def test_lm_evals_command_line_knows_the_model(hf, tmp_path, monkeypatch):
    """A local task by lm-eval's own command line, offline, and the same one asked of `hf`."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    model_args = f"checkpoint={SHIPPED},dtype=float32,device=cpu,backend=eager,batch_size=4"
    options = ("--model", "llama2", "--model_args", model_args, "--include_path", str(TASKS))
    tasks = ("--tasks", "python_choice,python_generation,python_perplexity")
    subprocess.run(
        [
            *(sys.executable, "-m", "llama2.evaluation.lm_eval", *options, *tasks),
            *("--output_path", str(tmp_path / "out.json")),
        ],
        cwd=TASKS,
        env=os.environ | offline,
        check=True,
        capture_output=True,
    )
    (file,) = tmp_path.glob("out*.json")
    ours = json.loads(file.read_text(encoding="utf-8"))["results"]

    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    theirs = lm_eval.simple_evaluate(model=hf, tasks=list(ours), task_manager=manager)["results"]
    for task, measured in ours.items():
        for name, value in measured.items():
            if isinstance(value, float):
                assert value == pytest.approx(theirs[task][name], rel=1e-5), (task, name)
    assert 0 < ours["python_choice"]["acc,none"] < 1
