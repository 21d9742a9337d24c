"""4-bit weights chosen by what they do to real inputs: the rounding, the layers, the rows."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from liteguard.config import Config
from liteguard.export import calibration, chosen, conversion, gptq, layerwise, quantization
from liteguard.export.gptq import Format

FOUR = Format(4, 32)
EIGHT = Format(8, 0)
WIDTH, ROWS = 64, 200


def inputs(seed: int = 0) -> torch.Tensor:
    """2,000 inputs of 128 features that go together, some much stronger than others."""
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(2000, 40, generator=draw) @ torch.randn(40, 128, generator=draw)
    return (mixed + torch.randn(2000, 128, generator=draw)) * torch.linspace(0.1, 4, 128)


def lost(x: torch.Tensor, weight: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Squared error of the outputs, as a share of the outputs."""
    exact = x @ weight.t()
    return ((x @ gptq.dequantized(*found).t() - exact).square().sum() / exact.square().sum()).item()


def nearest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the library does without calibration: the scale of each block's largest weight."""
    blocks = weight.view(len(weight), -1, FOUR.block)
    scales = gptq.storable(blocks.abs().amax(2) / 7)
    integers = (blocks / scales[..., None]).round().clamp(-8, 7)
    return integers.to(torch.int8).view_as(weight), scales


def test_each_step_of_the_rounding_loses_less():
    x, weight = inputs(), torch.randn(48, 128, generator=torch.Generator().manual_seed(1)) * 0.1
    by_largest = lost(x, weight, nearest(weight))
    by_error = lost(x, weight, gptq.quantize(weight, None, FOUR))
    by_inputs = lost(x, weight, gptq.quantize(weight, x.t() @ x, FOUR))
    assert by_error < 0.9 * by_largest and by_inputs < 0.5 * by_error
    # Equal inputs that have nothing to do with each other tell nothing.
    alike = gptq.quantize(weight, torch.eye(128), FOUR)
    assert all(map(torch.equal, alike, gptq.quantize(weight, None, FOUR)))


def test_a_scale_for_a_whole_row():
    """8 bits as the device keeps them: one float32 scale an output, no integer of -128."""
    x, weight = inputs(), torch.randn(48, 300, generator=torch.Generator().manual_seed(1)) * 0.1
    x = torch.cat([x, x[:, :100].roll(1, 0), inputs(2)[:, :72]], 1)  # more columns than one step
    weight[0] = 0
    weight[1, 3] = 40  # one weight far above the others of its row
    integers, scales = gptq.quantize(weight, x.t() @ x, EIGHT)
    assert integers.abs().max() <= 127 and scales.shape == (48, 1)
    assert (scales > 0).all() and scales.isfinite().all() and not integers[0].any()
    largest = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    by_largest = (weight / largest).round().to(torch.int8), largest
    assert lost(x, weight, (integers, scales)) < 0.5 * lost(x, weight, by_largest)
    by_error = lost(x, weight, gptq.quantize(weight, None, EIGHT))
    assert lost(x, weight, (integers, scales)) < 0.5 * by_error


def test_steps_within_a_row_are_one_rounding(monkeypatch):
    """Rounded in parts or whole, what a column leaves reaches all that follow."""
    x, weight = inputs(), torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    whole = gptq.quantize(weight, x.t() @ x, EIGHT)
    monkeypatch.setattr(gptq, "_STEP", 48)
    parts = gptq.quantize(weight, x.t() @ x, EIGHT)
    assert torch.equal(whole[1], parts[1])
    assert (whole[0] != parts[0]).float().mean() < 0.02, "but for rounding in float32"


def test_blocks_near_zero_get_a_scale_that_the_device_accepts(monkeypatch):
    """The library's own rounding gives 0, and XNNPACK refuses "scale value (0.000000)"."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as library

    largest = np.array([[0.0, 1e-30, 1e-7, 0.7]], np.float32)
    block, row = qtyping.QuantGranularity.BLOCKWISE_32, qtyping.QuantGranularity.CHANNELWISE

    def scales(kind: qtyping.QuantGranularity) -> list[float]:
        found = library.tensor_zp_scale_from_min_max(-largest, largest, 4, True, kind)
        return found[1][0].tolist()

    library_own = library.tensor_zp_scale_from_min_max
    library_own = getattr(library_own, "__wrapped__", library_own)  # an earlier test's file
    monkeypatch.setattr(library, "tensor_zp_scale_from_min_max", library_own)
    without, of_rows = scales(block), scales(row)
    assert without[:3] == [0, 0, 0]
    quantization._no_scale_of_zero()
    assert scales(block) == [2**-14] * 3 + [without[3]] and scales(row) == of_rows


def test_what_is_chosen_can_be_stored():
    """int4, and scales that are float16 numbers with a bfloat16's digits; whatever comes in."""
    x, weight = inputs(), torch.randn(48, 128) * 0.1
    weight[0, :32] = 0
    weight[1] = 1e-7
    x[:, 5] = 0  # an input that never comes
    integers, scales = gptq.quantize(weight, x.t() @ x, FOUR)
    assert integers.dtype == torch.int8 and integers.min() == -8 and integers.max() == 7
    assert scales.shape == (48, 4) and scales.min() > 0
    assert torch.equal(scales, scales.to(torch.float16).float())
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    few = x[:3]  # a Hessian of rank 3
    assert lost(few, weight, gptq.quantize(weight, few.t() @ few, FOUR)) < 1e-3


def test_activations_are_rounded_a_token_at_a_time():
    x = torch.tensor([[0.0, 1.0, 2.55], [-1000.0, 0.004, 20.0], [5.0, 6.0, 7.0]])
    found = calibration.rounded_inputs(x)
    torch.testing.assert_close(found[0], x[0])
    assert found[1, 1] == 0 and found[1, 0] == pytest.approx(-1000, abs=2)
    assert (found[2] - x[2]).abs().max() <= 7 / 255 / 2 + 1e-6, "the range of a token holds 0"
    torch.testing.assert_close(calibration.rounded_inputs(-x), -found, msg="and so from below")
    assert not calibration.rounded_inputs(torch.zeros(1, 4)).any()


@pytest.fixture(scope="module", params=["phi", "llama"])
def model(request, tmp_path_factory) -> SimpleNamespace:
    """A model of two layers (attention beside, and before, the FFN) and rows of random tokens."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": ROWS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    name = {"phi": "Phi", "llama": "Llama"}[request.param]
    made = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**sizes, **heads)
    )
    folder = tmp_path_factory.mktemp(request.param)
    made.to(torch.bfloat16).save_pretrained(folder)
    lengths = torch.randint(3, 60, (60,)).tolist()
    rows = [torch.randint(ROWS, (length,)).tolist() for length in lengths]
    return SimpleNamespace(folder=folder, rows=rows)


def outputs(model: SimpleNamespace, kept: Path | None) -> torch.Tensor:
    """Last hidden states of some rows, with a folder's weights in place of the model's own."""
    from liteguard import merged

    loaded = merged.load_stored(model.folder).float().eval()
    if kept:
        found = chosen.Chosen(kept.glob("*.safetensors"))
        for linear in loaded.modules():
            if isinstance(linear, torch.nn.Linear):
                key = chosen.digest(linear.weight.detach().numpy())
                if key in found.open:
                    parts = map(torch.from_numpy, found.get(key))
                    linear.weight.data = gptq.dequantized(*parts)
                    found.open.discard(key)
        assert not found.open, "weights of another model"
    with torch.no_grad():
        states = [loaded.model(torch.tensor([row])).last_hidden_state[0] for row in model.rows[:20]]
    return torch.cat(states)


def test_layers_are_chosen_by_what_reaches_them(model, tmp_path):
    """Better than without rows, in every recipe's matrices; an interrupted run goes on the same."""
    exact = outputs(model, None)

    def error(recipe: str, rows: list[list[int]] | None) -> float:
        kept = tmp_path / f"{recipe}{rows is None}"
        facts = calibration.calibrate(model.folder, rows, recipe, kept)
        ffn = {"phi": 2, "llama": 3}["phi" if "phi" in str(model.folder) else "llama"]
        assert facts["matrices"] == 2 * (ffn if recipe == "mixed" else ffn + 4), recipe
        assert facts["method"] == ("gptq" if rows else "least_squares")
        return (outputs(model, kept) - exact).square().mean().item()

    for recipe in ("mixed", "int4_block32", "int8", "int8_weight_only"):
        assert error(recipe, model.rows) < 0.9 * error(recipe, None), recipe

    files = sorted((tmp_path / "mixedFalse").iterdir())
    before = [file.read_bytes() for file in files]
    files[1].unlink()
    first = files[0].stat().st_mtime_ns
    calibration.calibrate(model.folder, model.rows, "mixed", tmp_path / "mixedFalse")
    assert files[0].stat().st_mtime_ns == first, "a finished layer is not made again"
    assert [file.read_bytes() for file in files] == before


def test_padding_changes_nothing(model, monkeypatch):
    """Rows of different lengths in a batch give the Hessian that single rows give."""
    from liteguard import merged

    loaded = merged.load_stored(model.folder).float().eval()
    layer = loaded.model.layers[0]
    target = next(m for n, m in layer.named_modules() if n in ("mlp.fc2", "mlp.down_proj"))
    with torch.inference_mode():
        together = list(layerwise.batches(loaded, model.rows))
        assert len(together) < len(model.rows) and not all(b.real.all() for b in together)
        monkeypatch.setattr(layerwise, "BATCH", 1)
        alone = list(layerwise.batches(loaded, model.rows))
        assert len(alone) == len(model.rows)
        found = [
            calibration._hessian(layer, target, batches, True) for batches in (together, alone)
        ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_every_layer_is_given_what_the_model_gives_it():
    """Of Gemma 3 some look back a short way, with rotary frequencies of their own."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 60}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    config = Gemma3TextConfig(**sizes, **heads, layer_types=kinds, sliding_window=8)
    whole = Gemma3ForCausalLM(config).eval()
    for matrix in whole.parameters():
        torch.nn.init.normal_(matrix, std=0.3)
    row = torch.randint(0, 60, (24,)).tolist()
    with torch.inference_mode():
        (batch,) = layerwise.batches(whole, [row])
        for layer in whole.model.layers:
            batch.hidden = layerwise.forward(layer, batch)
        expected = whole.model(torch.tensor([row]), use_cache=False).last_hidden_state
        torch.testing.assert_close(whole.model.norm(batch.hidden), expected)


def prepared(monkeypatch) -> list[tuple[str, str]]:
    """Prepared rows of three stages, without files; returns what is asked for."""
    asked: list[tuple[str, str]] = []

    def load(_: Path, part: str, split: str) -> list[dict[str, str]]:
        asked.append((part, split))
        return {
            "domain": [{"text": f"text {n}"} for n in range(50)],
            "instruction": [{"prompt": f"ask {n}", "completion": "yes"} for n in range(50)],
            "preference": [
                {"prompt": f"want {n}", "chosen": "no", "rejected": "sure"} for n in range(50)
            ],
        }[part]

    monkeypatch.setattr(layerwise, "load_split", load)
    return asked


def words(folder: Path) -> None:
    """A tokenizer whose tokens are words and line ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["text", "ask", "want", "yes", "no", "sure", "Instruct", "Output", "endoftext"]
    vocabulary = {name: place for place, name in enumerate(["?", *names, *map(str, range(50))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    core.save(str(folder / "tokenizer.json"))


def test_rows_are_training_rows_of_all_stages(monkeypatch, tmp_path):
    asked = prepared(monkeypatch)
    words(tmp_path)
    config = Config.model_validate(
        {
            "model_type": "tiny",
            "model": {"name": "a/model"},
            "compress": {"calibration_tokens": 200},
        }
    )
    rows = layerwise.training_rows(config, tmp_path, tmp_path, "")
    assert asked == [("domain", "train"), ("instruction", "train"), ("preference", "train")]
    assert sum(map(len, rows)) == 200
    begin = [row[0] for row in rows[:6]]
    assert len(set(begin[:3])) == 2 and begin[:3] == begin[3:], "text, two questions, text, ..."
    assert rows == layerwise.training_rows(config, tmp_path, tmp_path, ""), "the same each time"


def test_rows_are_read_as_they_were_trained_on(monkeypatch, tmp_path):
    """Behind the BOS, and an answer behind all that was said before its question."""
    import tokenizers

    turn = {"prompt": "ask 2", "history": [["ask 1", "no"]], "completion": "yes"}
    rows = {
        "domain": [{"text": "text 3"}],
        "instruction": [turn],
        "preference": [{"prompt": "want 4", "chosen": "no", "rejected": "sure"}],
    }
    monkeypatch.setattr(layerwise, "load_split", lambda _, part, split: rows[part])
    words(tmp_path)
    values = {"model_type": "tiny", "model": {"name": "a/model"}, "prompt": {"bos_token": "sure "}}
    config = Config.model_validate(values)
    found = layerwise.training_rows(config, tmp_path, tmp_path, "")
    names = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).id_to_token
    said = [[name for name in map(names, ids) if name != "?"] for ids in found]
    assert [row[0] for row in said] == ["sure"] * 3
    assert said[0][1:3] == ["text", "3"]
    assert [name for name in said[1] if name in ("ask", "no", "yes")] == ["ask", "no", "ask", "yes"]


def test_without_rows_it_says_so_and_goes_on(tmp_path, capsys):
    config = Config.model_validate({"model_type": "tiny", "model": {"name": "a/model"}})
    without = calibration.WITHOUT_ROWS
    assert layerwise.training_rows(config, tmp_path / "moved", tmp_path, without) is None
    printed = capsys.readouterr().out
    assert "no training rows to calibrate on" in printed and "moved" in printed
    assert "compress.calibrate=false" in printed


def converted(monkeypatch, tmp_path: Path, recipe: str, **settings) -> tuple[dict, Path | None]:
    """(facts of a conversion's attempt, the folder that its quantiser was given)."""
    given: list[Path | None] = []

    def quantize(*parts, **_) -> dict:
        given.append(parts[4])
        return {"recipe": recipe}

    monkeypatch.setattr(conversion.tflite, "quantize", quantize)
    monkeypatch.setattr(conversion.machine, "check_disk", lambda *_: None)
    monkeypatch.setattr(conversion.Conversion, "_write", lambda *_: {})
    monkeypatch.setattr(calibration, "of_checkpoint", lambda *parts: {"method": "gptq", "rows": 9})
    values = {"model_type": "tiny", "model": {"name": "a/model"}, "compress": settings}
    (work := tmp_path / "_".join([recipe, *map(str, settings.values())])).mkdir()
    made = conversion.Conversion(
        Config.model_validate(values),
        *(work, "", None, 1, "v2", [recipe], [work / "x.task"], None, work),
    )
    return made._attempt(recipe), given[0]


def test_8_bit_recipes_are_calibrated_where_the_settings_say_all(monkeypatch, tmp_path):
    for recipe in ("int8", "int8_mixed", "int8_weight_only", "mixed"):
        facts, folder = converted(monkeypatch, tmp_path, recipe, calibrate="all")
        assert folder is not None and folder.name == f"calibrated_{recipe}"
        assert facts["quantize"]["calibration"]["method"] == "gptq"
    for recipe in ("int8", "int8_mixed", "fp16", "none"):
        assert converted(monkeypatch, tmp_path, recipe, calibrate=True)[1] is None, recipe
    for recipe in ("fp16", "none"):
        assert converted(monkeypatch, tmp_path, recipe, calibrate="all")[1] is None


def test_layers_chosen_without_rows_are_chosen_again_with_them(model, tmp_path):
    output = tmp_path / "chosen"
    calibration.calibrate(model.folder, None, "mixed", output)
    before = [file.read_bytes() for file in sorted(output.glob("*.safetensors"))]
    facts = calibration.calibrate(model.folder, model.rows, "mixed", output)
    after = [file.read_bytes() for file in sorted(output.glob("*.safetensors"))]
    assert facts["method"] == "gptq" and before != after


def test_inputs_are_rounded_where_the_device_rounds_them(model, tmp_path, monkeypatch):
    """int8_mixed leaves those that lead out of a feed-forward block, int8_weight_only all."""
    seen: set[int] = set()

    def rounded(x: torch.Tensor) -> torch.Tensor:
        seen.add(x.shape[-1])
        return x

    monkeypatch.setattr(calibration, "rounded_inputs", rounded)
    widths = {"int8": {WIDTH, 2 * WIDTH}, "int8_mixed": {WIDTH}, "int8_weight_only": set()}
    for recipe, wanted in widths.items():
        seen.clear()
        facts = calibration.calibrate(model.folder, model.rows, recipe, tmp_path / recipe)
        assert seen == wanted, recipe
        assert facts["matrices"] == (14 if "llama" in str(model.folder) else 12)


def test_4_bit_recipes_are_calibrated_unless_the_settings_say_no(monkeypatch, tmp_path):
    for recipe in quantization.BLOCKS:
        facts, folder = converted(monkeypatch, tmp_path, recipe)
        assert folder is not None and folder.name == f"calibrated_{recipe}"
        assert facts["quantize"]["calibration"]["method"] == "gptq", "the record says how"
        facts, folder = converted(monkeypatch, tmp_path, recipe, calibrate=False)
        assert folder is None and "calibration" not in facts["quantize"]
    assert converted(monkeypatch, tmp_path, "int8") == (
        {"quantize": {"recipe": "int8"}, "bundles": {"x.task": {}}},
        None,
    )
    assert json.loads((tmp_path / "mixed" / "calibrate_mixed.json").read_text())


def test_a_size_chooses_the_recipe():
    """Of Phi-2's shapes: 8 bits take 2.79 GB, mixed 2.05, int4_block32 1.68."""
    from liteguard import memory, models
    from liteguard.config.deploying import AUTO, CompressSection
    from liteguard.errors import UserError

    config = memory.phi_architecture("phi-2")
    shapes = [parameter.shape for parameter in models.meta_model(config).parameters()]
    architecture = config.to_dict()
    for recipe, size in (("int8", 2.79), ("mixed", 2.05), ("int4_block32", 1.68), ("fp16", 5.56)):
        found = quantization.expected_bytes(shapes, recipe, architecture)
        assert found / 1e9 == pytest.approx(size, abs=0.005)
    for size, recipes in (
        (None, AUTO),
        (3.0, ("int8", "int8_mixed", "int8_weight_only")),
        (2.1, ("mixed",)),
        (2.0, ("int4_block32",)),
    ):
        found = quantization.recipes_that_fit(AUTO, size, shapes, architecture)
        assert tuple(found) == recipes, size
    with pytest.raises(UserError, match=r"int4_block32, takes 1.68 GB"):
        quantization.recipes_that_fit(AUTO, 1.5, shapes, architecture)
    # Recipes that are named are not replaced by others, only left out.
    section = CompressSection(quantize="fp16, int8, mixed", size_gb=3.0)
    assert quantization.recipes_for(section, config) == ["int8", "mixed"]
    section = section.model_copy(update={"quantize": "int8_mixed, fp16", "size_gb": 2.1})
    with pytest.raises(UserError, match=r"of compress.quantize, int8_mixed, takes 2.79 GB"):
        quantization.recipes_for(section, config)


@pytest.mark.parametrize(
    ("shape", "wide", "role"),
    [
        ((12288, 2048), 6144, "ffn"),  # gate and up in one matrix
        ((6144, 2048), 6144, "ffn"),
        ((2048, 6144), 6144, "ffn_down"),
        ((2048, 2048), 6144, "attention"),
        ((4096, 2048), [6144, 4096], "ffn"),  # another width in each layer
        ((59264, 2048), 6144, "output"),
    ],
)
def test_what_a_linear_layer_does_is_read_from_its_shape(shape, wide, role):
    architecture = {"vocab_size": 59264, "intermediate_size": wide}
    assert quantization.role(shape, architecture) == role


@pytest.mark.parametrize(("text", "size"), [("2.0GB", 2), ("900 MB", 0.9), ("1.5", 1.5)])
def test_a_size_is_read_as_people_write_it(text, size):
    from liteguard import cli

    assert cli.gigabytes(text) == pytest.approx(size)
    with pytest.raises(argparse.ArgumentTypeError, match=r"write 2.0GB or 900MB"):
        cli.gigabytes(f"{text}x")


def test_what_was_made_without_rows_is_made_again_with_them(monkeypatch, tmp_path):
    """A run without its training rows was killed; the next one finds them again."""
    monkeypatch.setattr(conversion.machine, "check_disk", lambda *_: None)
    rows, seen = [0], []
    monkeypatch.setattr(
        calibration, "of_checkpoint", lambda *_: {"method": "gptq", "rows": rows[0]}
    )
    monkeypatch.setattr(
        conversion.tflite, "quantize", lambda *_, **__: seen.append(rows[0]) or {"recipe": "mixed"}
    )
    monkeypatch.setattr(conversion.Conversion, "_write", lambda *_: {})
    values = {"model_type": "tiny", "model": {"name": "a/model"}}
    parts = (tmp_path, "", None, 1, "v2", ["mixed"], [tmp_path / "x.task"], None, tmp_path)

    def attempt() -> dict:
        return conversion.Conversion(Config.model_validate(values), *parts)._attempt("mixed")

    attempt()
    rows[0] = 60
    assert attempt()["quantize"]["calibration"]["rows"] == 60
    attempt()
    assert seen == [0, 60], "quantised by the rows that the record names, once each"
