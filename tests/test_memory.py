"""The memory estimator against measurement on the CPU, and the out-of-memory ladder."""

from __future__ import annotations

import contextlib
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from liteguard import memory, models
from liteguard.config import build, read_yaml
from liteguard.errors import UserError, WorkError
from liteguard.training import loop, memory_estimate, patches
from liteguard.training.memory_terms import Precision, optimizer_states, read_shapes, stream_bytes

TOLERANCE = 0.15  # of peaks
SAVED_TOLERANCE = 0.005  # of what autograd saves: exact up to a few bytes a token
RANK = 8


def architecture(kind: str):
    """The tiny Phi of conftest, a wider one with Phi-2's dropout, SmolLM2-135M with 3 layers."""
    from transformers import LlamaConfig, PhiConfig

    if kind in ("smollm2", "llama"):
        small = kind == "llama"
        return LlamaConfig(
            vocab_size=640 if small else 49152,
            hidden_size=256 if small else 576,
            intermediate_size=768 if small else 1536,
            num_hidden_layers=3,
            num_attention_heads=4 if small else 9,
            num_key_value_heads=2 if small else 3,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    wide = kind == "phi"
    return PhiConfig(
        vocab_size=640,
        hidden_size=256 if wide else 64,
        intermediate_size=1024 if wide else 128,
        num_hidden_layers=8 if wide else 2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        partial_rotary_factor=0.5,
        resid_pdrop=0.1 if wide else 0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directory of random weights for each architecture."""
    from transformers import AutoModelForCausalLM

    def save(kind):
        torch.manual_seed(0)
        directory = tmp_path_factory.mktemp(kind)
        AutoModelForCausalLM.from_config(architecture(kind)).save_pretrained(directory)
        return directory

    return {kind: save(kind) for kind in ("tiny", "phi", "llama", "smollm2")}


def settings(directory, quantization="nf4", **over):
    values = {
        "model": {"path": str(directory), "quantization": quantization},
        "domain": {"lora_rank": RANK, **over},
    }
    return build([("phi-2", read_yaml(ROOT / "configs/phi-2.yaml")), ("test", values)])


def in_float32(function):
    """`function` as CUDA's autocast runs norms and powers: in float32, whatever comes in."""

    def convert(value):
        return value.float() if isinstance(value, torch.Tensor) else value

    def run(*args, **kwargs):
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(
                *map(convert, args), **{key: convert(value) for key, value in kwargs.items()}
            )

    return run


def arithmetic(dtype, cuda, monkeypatch):
    """Autocast as the trainers use it, off in float32; with CUDA's rules on the CPU if asked."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    if cuda:
        asked = torch.is_autocast_enabled
        # PEFT asks whether CUDA's autocast is on.
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cpu": asked(kind))
        functional = torch.nn.functional
        monkeypatch.setattr(functional, "layer_norm", in_float32(functional.layer_norm))
        monkeypatch.setattr(torch, "pow", in_float32(torch.pow))
    return torch.autocast("cpu", dtype=dtype)


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensor storages that operations made and that are still alive."""

    def __init__(self, model):
        super().__init__()
        self.live = self.peak = 0
        # A view of a parameter is no new memory.
        own = (*model.parameters(), *model.buffers())
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in own)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    self.known.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.release, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def release(self, size):
        self.live -= size


def load(directory, config, dtype, checkpointing=False):
    """The model as the trainers have it: NF4 or plain base, float32 adapter."""
    base = models.load_base(
        config, str(directory), None, dtype, quantize=config.model.quantization == "nf4"
    )
    model = models.add_adapter(base, config)
    model.train()
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def saved_bytes(model, ids, dtype, cuda, monkeypatch):
    """Bytes of the distinct storages that autograd saves in the decoder, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, arithmetic(dtype, cuda, monkeypatch):
        model.get_base_model().model(ids)
    return sum(size for size, _ in saved.values())


CASES = [
    ("tiny", "none", torch.float32, False),
    ("tiny", "nf4", torch.float32, False),
    ("phi", "nf4", torch.float32, False),
    ("phi", "nf4", torch.bfloat16, False),
    ("phi", "nf4", torch.bfloat16, True),
    ("phi", "none", torch.bfloat16, True),
    ("phi gelu_new", "nf4", torch.float32, False),
    ("phi gelu_new", "nf4", torch.bfloat16, True),
    ("phi gelu_new", "none", torch.bfloat16, True),
    ("smollm2", "none", torch.float32, False),
    ("smollm2", "nf4", torch.bfloat16, False),
    ("smollm2", "nf4", torch.bfloat16, True),
    ("smollm2", "none", torch.bfloat16, True),
]
NAMES = [f"{k}-{q}-{str(d)[6:]}{'-cuda' if c else ''}" for k, q, d, c in CASES]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_saved_activations(case, bases, monkeypatch):
    kind, quantization, dtype, cuda = case
    fused = not kind.endswith("gelu_new")
    if not fused:
        kind = "phi"
        monkeypatch.setattr(models, "fuse_gelu", lambda model: 0)
    config = settings(bases[kind], quantization)
    model = load(bases[kind], config, dtype)
    tokens = 192
    ids = torch.randint(5, 600, (1, tokens))
    decoder = model.get_base_model().model
    norm = getattr(decoder, "final_layernorm", None) or decoder.norm
    stream = []
    norm.register_forward_pre_hook(lambda module, args: stream.append(args[0].element_size()))
    measured = saved_bytes(model, ids, dtype, cuda, monkeypatch)
    precision = Precision(dtype.itemsize, quantization == "nf4", cuda)
    shapes = read_shapes(architecture(kind))
    assert stream == [stream_bytes(shapes, precision)]
    found = memory_estimate.estimate(
        config,
        "domain",
        model.get_base_model().config,
        tokens,
        dtype=dtype,
        device="cuda" if cuda else "cpu",
        fused_gelu=fused,
    )
    terms = found.phases["loss"]
    estimated = sum(size for name, size in terms.items() if not name.startswith("logits"))
    if cuda and shapes.residual_dropout:
        # The CPU keeps dropout's noise in the activations' dtype where CUDA keeps a byte mask.
        noise = 2 + stream[0]
        estimated += tokens * shapes.layers * shapes.hidden * (noise - 2)
    assert estimated == pytest.approx(measured, rel=SAVED_TOLERANCE), found.table()


@pytest.mark.parametrize(
    ("kind", "arithmetic_", "checkpointing"),
    [
        ("tiny", "float32", False),
        ("tiny", "float32", True),
        ("phi", "float32", True),
        ("phi", "bfloat16", False),
        ("phi", "bfloat16 cuda", False),
        ("phi", "bfloat16 cuda", True),
        ("phi gelu_new", "bfloat16 cuda", True),
        ("llama", "float32", False),
        ("llama", "bfloat16 cuda", True),
        ("smollm2", "float32", False),
        ("smollm2", "float32", True),
    ],
)
def test_peak_of_a_step(kind, arithmetic_, checkpointing, bases, monkeypatch):
    """Activations, logits and working memory: live tensors at the peak of a step."""
    dtype = torch.float32 if arithmetic_ == "float32" else torch.bfloat16
    cuda = arithmetic_.endswith("cuda")
    fused = not kind.endswith("gelu_new")
    if not fused:
        kind = "phi"
        monkeypatch.setattr(models, "fuse_gelu", lambda model: 0)
    config = settings(bases[kind], gradient_checkpointing=checkpointing)
    model = load(bases[kind], config, dtype, checkpointing)
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model.get_base_model())
    patches.score_targets_only(
        SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda m: m))
    )
    tokens, supervised = 256, 64
    ids = torch.randint(5, 600, (1, tokens))
    labels = ids.clone()
    labels[:, : tokens - supervised] = -100
    with LiveBytes(model) as live:
        with arithmetic(dtype, cuda, monkeypatch):
            loss = model(input_ids=ids, labels=labels, fused_lm_head=True).loss
        loss.backward()
    found = memory_estimate.estimate(
        config,
        "domain",
        model.get_base_model().config,
        tokens,
        supervised,
        dtype=dtype,
        device="cuda" if cuda else "cpu",
        head="supervised",
        fused_gelu=fused,
    )
    estimated = sum(found.phases[found.peak_phase].values())
    assert estimated == pytest.approx(live.peak, rel=TOLERANCE), found.table()


def test_what_a_step_holds_all_the_time(bases):
    """Frozen base, adapter, gradients and optimizer states against the real objects."""
    import bitsandbytes

    for kind, quantization in (("smollm2", "nf4"), ("phi", "nf4"), ("phi", "none")):
        config = settings(bases[kind], quantization)
        model = load(bases[kind], config, torch.bfloat16)
        found = memory_estimate.estimate(
            config, "domain", model.get_base_model().config, 64, dtype=torch.bfloat16, device="cpu"
        ).always
        frozen = 0
        for parameter in model.parameters():
            if not parameter.requires_grad:
                frozen += parameter.untyped_storage().nbytes()
            if isinstance(parameter, bitsandbytes.nn.Params4bit):
                state = parameter.quant_state
                tables = (state.absmax, state.code, state.state2.absmax, state.state2.code)
                frozen += sum(t.nbytes for t in (*tables, state.offset))
        base = next(size for name, size in found.items() if name.startswith("frozen base"))
        assert base == pytest.approx(frozen, rel=0.005), kind
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        states = sum(s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in optimizer.state.values())
        assert found["adapter, float32"] == sum(p.nbytes for p in trained)
        assert found["gradients, float32"] == sum(p.grad.nbytes for p in trained)
        assert found["optimizer states (adamw_torch_fused)"] == states


def test_8bit_optimizer_states():
    import bitsandbytes

    sizes = [64 * 128, 1000, 5000]
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    optimizer = bitsandbytes.optim.AdamW8bit(parameters)
    measured = 0
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        state = optimizer.state[parameter]
        # The code books ("qmap") are shared by all tensors.
        measured += sum(
            v.nbytes
            for k, v in state.items()
            if isinstance(v, torch.Tensor) and not k.startswith("qmap")
        )
    assert optimizer_states("paged_adamw_8bit", sizes) == pytest.approx(measured, rel=0.01)
    assert optimizer_states("adamw_torch", sizes) == 8 * sum(sizes)


def phi_2(stage, **values):
    config = build(
        [
            ("phi-2", read_yaml(ROOT / "configs/phi-2_8gb.yaml")),
            ("test", {stage: values}),
        ]
    )
    architecture_ = memory.phi_architecture("phi-2")
    return memory_estimate.estimate(
        config, stage, architecture_, dtype=torch.bfloat16, device="cuda"
    )


def test_phi_2_parameters_by_hand():
    found = phi_2("domain")
    # q, k, v, dense: 2560 x 2560; fc1, fc2: 2560 x 10240; rank 32 on both sides, 32 layers.
    by_hand = 32 * 32 * (4 * 2 * 2560 + 2 * (2560 + 10240))
    assert found.always["adapter, float32"] == 4 * by_hand == 4 * 47_185_920
    shapes = read_shapes(memory.phi_architecture("phi-2"))
    assert shapes.linear_parameters + shapes.other_parameters == 2_779_683_840
    assert shapes.linear_parameters == 32 * (4 * 2560**2 + 2 * 2560 * 10240)


def test_the_8_gb_configuration_reaches_the_targets():
    """Within 5.5 GB (domain, instruction) and 7.0 GB (DPO) with the margin, at 1 x 2048."""
    for stage, limit in (("domain", 5.5e9), ("instruction", 5.5e9), ("safety", 7.0e9)):
        found = phi_2(stage)
        assert found.total + found.margin < limit, found.table()
        assert found.settings["batch_size"] == 1
    without = phi_2("domain", gradient_checkpointing=False)
    assert without.total > 8e9, "checkpointing is what makes it fit"


def test_dpo_holds_a_reference_and_may_run_it_beside_the_policy():
    beside = phi_2("safety", precompute_reference=False)
    before = phi_2("safety", precompute_reference=True)
    assert beside.always["reference adapter, float32"] == beside.always["adapter, float32"]
    assert "reference pass" in beside.phases and "reference pass" not in before.phases
    assert beside.total >= before.total
    assert beside.settings["tokens"] == 2 * 2048


def test_the_table_names_every_term_and_the_peak():
    found = phi_2("safety")
    text = found.table()
    for terms in (found.always, *found.phases.values()):
        assert all(name in text for name in terms)
    assert f"{found.total / 1e9:.3f} GB" in text
    assert text.count("(at the peak)") == 1
    assert found.total == sum(found.always.values()) + max(
        sum(terms.values()) for terms in found.phases.values()
    )


def test_an_architecture_without_a_formula_is_said():
    from transformers import GPT2Config

    with pytest.raises(UserError, match="gpt2.*Known"):
        read_shapes(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))


class Card:
    """Stands in for training on a card on which `fits` rows fit; counts the rows of a step."""

    def __init__(self, fits):
        self.fits, self.calls = fits, []

    def __call__(self, batch_size, accumulation):
        self.calls.append((batch_size, accumulation))
        if batch_size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return batch_size * accumulation


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_effective_batch(capsys):
    card = Card(fits=2)
    rows, ladder = loop.train_within_memory(card, 8, 3, explain=lambda: "never")
    assert card.calls == [(8, 3), (4, 6), (2, 12)]
    assert rows == 24
    assert [(s["batch_size"], s["gradient_accumulation"]) for s in ladder] == [(8, 3), (4, 6)]
    assert ladder[0]["error"] == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "4 x 6 (same effective batch)" in capsys.readouterr().out
    assert loop.train_within_memory(Card(9), 8, 3, explain=lambda: "never") == (24, [])


def test_of_several_processes_none_goes_on_alone():
    """One is out of memory, the others wait for its gradients: the next start is a smaller one."""
    kept = []
    card = Card(fits=2)
    with pytest.raises(WorkError, match=r"in one of 4 processes .*\nRun the same command again"):
        loop.train_within_memory(card, 5, 4, lambda: "never", processes=4, keep=kept.append)
    # 2 x 10 would not be shared by 4.
    assert card.calls == [(5, 4)] and kept == [{"batch_size": 1, "gradient_accumulation": 20}]
    assert loop.train_within_memory(card, **kept[0], explain=lambda: "never", processes=4)[0] == 20
    assert card.calls[1:] == [(1, 20)]


def test_odd_micro_batches_keep_the_effective_batch():
    card = Card(fits=1)
    loop.train_within_memory(card, 6, 1, explain=lambda: "never")
    assert card.calls == [(6, 1), (3, 2), (1, 6)]


def test_out_of_memory_at_one_row_names_the_estimate_and_the_settings(bases):
    config = settings(bases["phi"], gradient_checkpointing=False)
    with pytest.raises(WorkError) as caught:
        loop.train_within_memory(
            Card(fits=0),
            2,
            1,
            explain=lambda: memory_estimate.explain(config, "domain", architecture("phi")),
        )
    message = str(caught.value)
    assert "micro-batch 1" in message and "frozen base, NF4" in message
    assert "domain.gradient_checkpointing=true" in message and "max_length" in message


def test_other_errors_are_not_taken_for_a_full_card():
    def broken(batch_size, accumulation):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        loop.train_within_memory(broken, 8, 1, explain=lambda: "never")


def test_a_failed_attempt_leaves_nothing_in_memory():
    """What the failed attempt held is gone before the next one: else it would fail again."""
    alive = []

    class Model:
        pass

    def attempt(batch_size, accumulation):
        assert not any(reference() for reference in alive)
        model = Model()
        model.itself = model  # a cycle, as in real models and trainers
        alive.append(weakref.ref(model))
        if batch_size > 1:
            raise torch.OutOfMemoryError("full")
        return batch_size

    assert loop.train_within_memory(attempt, 4, 1, explain=lambda: "never")[0] == 1
    assert len(alive) == 3


def test_memory_of_the_process_as_phi_2_showed_it():
    """Resident memory that benchmarks/full_size.py printed for stage 1, by time: within 15 %."""
    values = {"batch_size": 1, "max_length": 192}
    config = build([("phi-2", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", {"domain": values})])
    shapes = memory.phi_architecture("phi-2")
    found = memory_estimate.estimate(config, "domain", shapes, dtype=torch.float32, device="cpu")
    host = memory_estimate.host_memory(found, 2_779_683_840)
    assert host.loading / 1e9 == pytest.approx(9.0, rel=0.15)
    assert host.training / 1e9 == pytest.approx(7.4, rel=0.15)
    assert host.peak / 1e9 == pytest.approx(13.8, rel=0.15)
    assert host.needed == host.training


@pytest.mark.parametrize(("rank", "needed"), [(32, 2.1e9), (128, 8.4e9)])
def test_a_stages_disk_is_checked_before_the_work(rank, needed, tmp_path, monkeypatch):
    """Checkpoints with the optimizer's states; what an interrupted run left is not asked for."""
    from liteguard import checkpoints, machine
    from liteguard.memory import phi_architecture
    from liteguard.training import feed

    own = {"domain": {"lora_rank": rank}}
    config = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", own)])
    stage = SimpleNamespace(name="domain", config=config, section=config.domain)
    stage.architecture, stage.output = phi_architecture("phi-2"), tmp_path / "out"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    free = 1.5e9
    with pytest.raises(UserError, match="has 1.5 GB free") as raised:
        feed.require_disk(stage, False)
    said = float(re.search(r"about ([\d.]+) GB are needed", str(raised.value))[1]) * 1e9
    assert said == pytest.approx(needed, rel=0.1)
    monkeypatch.setattr(checkpoints, "left_over", lambda output: said - 1e9)
    feed.require_disk(stage, False)
    free = 0
    (tmp_path / "out").mkdir()
    (tmp_path / "out/stage.json").write_text("{}")
    feed.require_disk(stage, False)
    with pytest.raises(UserError, match="has 0.0 GB free"):
        feed.require_disk(stage, True)
