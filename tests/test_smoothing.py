"""Outliers of activations moved into weights: the same function to the last bit, fewer lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from liteguard import merged, models
from liteguard.config import Config
from liteguard.errors import UserError
from liteguard.export import calibration, conversion, layerwise, quantization, smoothing
from liteguard.export.outputs import Steps

WIDTH, ROWS, OUTLIER, SMALL_ENTRY = 64, 200, 5, 9
SMALL = {"vocab_size": ROWS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1")


def made(
    folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, **settings
) -> list[list[int]]:
    """A model of two layers whose norms blow one channel up and whose weights take it back, in a
    folder; rows of tokens."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if module_name.endswith("layernorm") and ".layers." in module_name:
                module.weight[OUTLIER] = 128
                module.weight[SMALL_ENTRY] = 2e-4
                if getattr(module, "bias", None) is not None:
                    module.bias.uniform_(-1, 1)
            elif module_name.endswith(READERS):
                module.weight[:, OUTLIER] /= 128
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    lengths = torch.randint(3, 60, (60,)).tolist()
    return [torch.randint(ROWS, (length,)).tolist() for length in lengths]


def logits(folder: Path, rows: list[list[int]], rounded: bool = False) -> torch.Tensor:
    """Of the first rows, in float32; `rounded`: weights and inputs of layers in 8 bits."""
    model = merged.load_stored(folder).float().eval()
    for module in model.model.layers.modules() if rounded else ():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.detach().abs().amax(1, keepdim=True) / 127
            module.weight.data = (module.weight.detach() / scale).round() * scale
            module.register_forward_pre_hook(lambda _, given: calibration.rounded_inputs(given[0]))
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row])).logits[0] for row in rows[:12]])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Llama", torch.float16),
        ("Llama", torch.bfloat16),
        ("Phi", torch.float16),
        ("Qwen2", torch.bfloat16),
    ],
    ids=str,
)
def test_the_function_is_the_same_to_the_last_bit_and_loses_less(tmp_path, capsys, name, dtype):
    """In float16, too, whose small numbers lose digits when they are divided."""
    settings = {"num_key_value_heads": 1} if name == "Qwen2" else {}
    rows = made(tmp_path / "merged", name, dtype, **settings)
    facts = smoothing.smooth(tmp_path / "merged", rows, tmp_path / "smoothed")
    assert facts["layers"] == 2 and facts["largest"] >= 4
    assert smoothing.TOKENS <= facts["tokens"] < smoothing.TOKENS + 60
    exact = logits(tmp_path / "merged", rows)
    assert torch.equal(logits(tmp_path / "smoothed", rows), exact)
    lost = [
        (logits(tmp_path / which, rows, rounded=True) - exact).square().mean().item()
        for which in ("merged", "smoothed")
    ]
    assert lost[1] < 0.6 * lost[0]
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {path.name for path in (tmp_path / "smoothed").iterdir()} == names
    assert merged.load_stored(tmp_path / "smoothed").dtype == dtype
    assert "moved in 2 of 2 layers" in capsys.readouterr().out


def test_a_norm_that_does_more_than_multiply_is_left_alone(tmp_path):
    """Gemma's multiplies by 1 + w: dividing w by 2 is another function."""
    rows = made(tmp_path / "merged", "Gemma", head_dim=32, num_key_value_heads=1)
    facts = smoothing.smooth(tmp_path / "merged", rows, tmp_path / "smoothed")
    assert facts["layers"] == 0 and not (tmp_path / "smoothed").exists()


def test_a_layer_is_as_it_was_where_the_stored_type_has_no_room(tmp_path):
    """float16 ends at 65,504: a weight that would leave it is not scaled."""
    rows = made(tmp_path / "merged", "Llama")
    model = merged.load_stored(tmp_path / "merged").to(torch.float16)
    with torch.no_grad():
        for linear in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[0].self_attn, linear).weight.mul_(40)
        model.model.layers[0].self_attn.q_proj.weight[:, OUTLIER] = 40_000
        model.model.layers[0].input_layernorm.weight[OUTLIER] = 60_000
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.save_pretrained(tmp_path / "half")
    facts = smoothing.smooth(tmp_path / "half", rows, tmp_path / "smoothed")
    assert facts["layers"] == 1
    after = dict(merged.load_stored(tmp_path / "smoothed").named_parameters())
    for name, value in before.items():
        assert torch.equal(after[name], value) or ".layers.0." not in name, name


def test_a_model_of_another_kind_is_converted_as_it_is(tmp_path, monkeypatch, capsys):
    """A layer that wants other arguments than the first one (hybrid models) fails no conversion."""
    rows, calls = made(tmp_path / "merged", "Llama"), []
    forward = layerwise.forward

    def other(layer, batch):
        calls.append(layer)
        if len({*calls}) == 2:
            raise TypeError("forward() got an unexpected keyword argument")
        return forward(layer, batch)

    monkeypatch.setattr(layerwise, "forward", other)
    facts = smoothing.smooth(tmp_path / "merged", rows, tmp_path / "smoothed")
    assert facts["layers"] == 0 and "unexpected" in facts["error"]
    assert not (tmp_path / "smoothed").exists()
    assert "stay where they are: TypeError" in capsys.readouterr().out


def config(**compress) -> Config:
    wanted = {"model_type": "tiny", "model": {"name": "a/model"}, "compress": compress}
    return Config.model_validate(wanted)


def test_recipes_of_4_bits_have_their_own_way(capsys):
    assert smoothing.wanted(config(smooth=True), ["int8_mixed", "fp16"])
    assert capsys.readouterr().out == ""
    assert not smoothing.wanted(config(smooth=True), ["int8_mixed", "mixed"])
    assert "left out, for all recipes: mixed has" in capsys.readouterr().out
    assert not smoothing.wanted(config(), ["int8"])
    for recipes in (["int4_block32"], ["int8", "mixed"]):
        assert not smoothing.wanted(config(smooth=True), recipes)


def test_what_a_size_leaves_is_known_before_the_work(tiny_phi):
    """Of `auto`, whose recipes are 8 bits, it may leave one of 4: then nothing is smoothed."""
    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(tiny_phi)
    whole = quantization.recipes_for(config().compress, architecture)
    assert whole == list(config().compress.recipes)
    shapes = [list(v.shape) for v in models.meta_model(architecture).parameters()]
    sizes = [
        quantization.expected_bytes(shapes, name, architecture.to_dict()) / 1e9
        for name in ("int8", "mixed", "int4_block32")
    ]
    for size, name in ((sizes[1], "mixed"), (sizes[2], "int4_block32")):
        section = config(quantize="auto", size_gb=size * 1.001).compress
        assert quantization.recipes_for(section, architecture) == [name]
    with pytest.raises(UserError, match="the smallest recipe"):
        quantization.recipes_for(config(quantize="auto", size_gb=1e-6).compress, architecture)


def test_a_killed_run_never_smooths_twice(tmp_path, monkeypatch):
    """Wherever it ends, what follows reads the model smoothed once, from one folder."""
    work = tmp_path / "work"
    rows = made(work / "merged", "Llama")

    def once(_config: Config, _checkpoint: Path, source: Path, output: Path) -> dict:
        return smoothing.smooth(source, rows, output)

    monkeypatch.setattr(smoothing, "of_checkpoint", once)

    def run() -> Path:
        made_here = conversion.Conversion.__new__(conversion.Conversion)
        made_here.config, made_here.checkpoint, made_here.work = config(), tmp_path, work
        made_here.steps, made_here.merged = Steps(work), work / "merged"
        made_here._smooth()
        return made_here.merged

    def killed(path: Path, *_) -> None:
        if path.name in ("smooth.json", "merged"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # before the result is kept
        patched.setattr("liteguard.export.outputs.checkpoints.write_json", killed)
        pytest.raises(KeyboardInterrupt, run)
    with monkeypatch.context() as patched:  # before the other folder goes
        patched.setattr("liteguard.export.conversion.writing.remove", killed)
        pytest.raises(KeyboardInterrupt, run)
    assert json.loads((work / "smooth.json").read_text())["layers"] == 2
    kept = logits(work / "smoothed", rows)
    assert run() == work / "smoothed" == run()
    assert torch.equal(logits(work / "smoothed", rows), kept)
    assert not (work / "merged").exists()


def test_what_follows_is_made_again_once_a_model_can_be_smoothed(tmp_path, monkeypatch):
    """The first run had no rows and converted the model as it is; a kill, and the rows are back."""
    (merged := tmp_path / "merged").mkdir()
    made_of_it = ("export", "quantize_int8", "calibrate_int8", "failed_int8")
    found = [0]

    def of_checkpoint(*given) -> dict:
        if found[0]:
            given[-1].mkdir()
        return {"rows": found[0], "layers": found[0] and 2}

    monkeypatch.setattr(smoothing, "of_checkpoint", of_checkpoint)

    def run() -> Path:
        made_here = conversion.Conversion.__new__(conversion.Conversion)
        made_here.config, made_here.checkpoint, made_here.work = config(), tmp_path, tmp_path
        made_here.steps, made_here.merged = Steps(tmp_path), merged
        made_here._smooth()
        return made_here.merged

    assert run() == merged
    for name in (*made_of_it, "tokenizer_original"):
        (tmp_path / f"{name}.json").write_text("{}")
    found[0] = 9
    assert run() == tmp_path / "smoothed"
    assert not any((tmp_path / f"{name}.json").exists() for name in made_of_it)
    assert (tmp_path / "tokenizer_original.json").exists()
    (tmp_path / "export.json").write_text("{}")  # of the smoothed model
    assert run() == tmp_path / "smoothed" and (tmp_path / "export.json").exists()
