"""What a `.task` cannot show is never written by it, and written by the `.litertlm` beside it.

Two models made by hand, a Phi (an output layer with a bias) and a Llama with tied weights (none):
after a prompt each wants to write a word-initial gamma, and "no" if it may not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

from liteguard.errors import WorkError
from liteguard.export import (
    bundle,
    calibration,
    chosen,
    gptq,
    quantization,
    silence,
    tflite,
    tokenizer,
)
from liteguard.prompts import Prompt
from liteguard.runtime.bundle import Bundle
from liteguard.runtime.container import tflite_model
from liteguard.runtime.scorer import Scorer

PROMPT = Prompt()
QUESTION = PROMPT.render_question("What is it?")
RECIPES = ["int8", "int8_mixed", "fp16", "none"]
WIDTH = 64


def _tokenizer(folder: Path) -> list[list[int]]:
    """A byte-level BPE in which " γ" is two tokens, as in GPT-2's, and the chains to answer.

    Each of them is a sequence of ids from the prompt's last token to the end token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The first half of each letter with the blank before it comes most often, then "no".
    core.train_from_iterator([" γ δ κ"] * 20 + ["no"] * 30, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    fast.save_pretrained(folder)
    last, end = fast.encode(QUESTION)[-1], fast.eos_token_id
    gamma, no = fast.encode(" γ"), fast.encode("no")
    assert len(gamma) == 2 and len(no) == 1, "the vocabulary is not what these tests are about"
    return [[last, *gamma, end], [last, *no, end]]


def _steps(chains: list[list[int]]) -> list[tuple[int, int, float]]:
    """(token, its successor, how strongly): the second chain's first step is the weaker one."""
    return [
        (token, chain[place + 1], 0.5 if number and not place else 1.0)
        for number, chain in enumerate(chains)
        for place, token in enumerate(chain[:-1])
    ]


def _phi(rows: int, chains: list[list[int]]):
    """Each token's successor is read from its embedding by the output layer; layers do nothing."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=rows,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            partial_rotary_factor=0.5,
        )
    )
    layer, embedding = model.model.layers[0], torch.randn(rows, WIDTH)
    for linear in (layer.self_attn.dense, layer.mlp.fc2):
        linear.weight.data *= 0.01
    model.get_input_embeddings().weight.data = embedding
    model.lm_head.bias.data.normal_()
    for token, successor, strength in _steps(chains):
        model.lm_head.weight.data[successor] += strength * embedding[token]
    return model


def _tied(rows: int, chains: list[list[int]]):
    """Each token's successor is read from its embedding by two neurons and added to it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )
    layer, embedding = model.model.layers[0], torch.randn(rows, WIDTH)
    layer.self_attn.o_proj.weight.data *= 0.01
    layer.mlp.down_proj.weight.data *= 0.01
    model.get_input_embeddings().weight.data = embedding
    for neuron, (token, successor, strength) in enumerate(_steps(chains)):
        layer.mlp.gate_proj.weight.data[neuron] = 0.2 * embedding[token]
        layer.mlp.up_proj.weight.data[neuron] = 0.2 * embedding[token]
        # The neuron gives about (0.2 * 64)^2 for its own token.
        layer.mlp.down_proj.weight.data[:, neuron] = strength * embedding[successor] / 16
    return model


@pytest.fixture(scope="module", params=["phi", "tied"])
def made(request, tmp_path_factory) -> SimpleNamespace:
    """A model's directory, its float32 TFLite, its SentencePiece model, and what to silence."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    folder = tmp_path_factory.mktemp(request.param)
    chains = _tokenizer(folder / "merged")
    # More rows than tokens, as Phi has.
    rows = len(AutoTokenizer.from_pretrained(folder / "merged")) + 9
    torch.manual_seed(0)
    model = {"phi": _phi, "tied": _tied}[request.param](rows, chains)
    model.half().save_pretrained(folder / "merged")
    ends = GenerationConfig(eos_token_id=[chains[0][-1]], pad_token_id=1)
    ends.save_pretrained(folder / "merged")
    report = tokenizer.build_sentencepiece(folder / "merged", folder / "tokenizer.model")
    exact = folder / "float.tflite"
    tflite.export(
        folder / "merged", exact, prefill_lengths=[8, 32], kv_cache_length=64, progress=None
    )
    return SimpleNamespace(
        name=request.param,
        merged=folder / "merged",
        exact=exact,
        pieces=folder / "tokenizer.model",
        report=report,
        quiet=silence.Silence.of(report, folder / "merged"),
        gamma=chains[0][1:3],
        rows=rows,
    )


def _quantized(made, recipe: str) -> Path:
    """The model's TFLite file in one recipe; made once, no test changes it."""
    file = made.exact.with_name(f"{recipe}.tflite")
    if not file.exists():
        tflite.quantize(made.exact, file, recipe, made.merged, progress=None)
    return file


def _scorer(path: Path) -> Scorer:
    """Each bundle with a folder of its own for unpacked weights: they differ between bundles."""
    unpacked = path.with_suffix(".unpacked")
    unpacked.mkdir()
    return Scorer(path, 1, unpacked)


def test_what_is_silenced_is_read_from_tokenizer_and_model(made):
    quiet = made.quiet
    first, second = made.gamma
    assert quiet.factors[first] == silence.SILENT_SCALE, "a blank and half a letter"
    assert quiet.factors[second] == silence.READ_ONLY_SCALE, "a single byte"
    assert set(range(made.rows - 9, made.rows)) <= set(quiet.factors)
    assert quiet.rows == made.rows and quiet.bias == (made.name == "phi")


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_a_task_is_kept_from_characters_that_it_cannot_show(recipe, made, tmp_path):
    """Both containers from one TFLite file, run as on a phone."""
    file = _quantized(made, recipe)
    before = hashlib.sha256(file.read_bytes()).digest()
    bundle.write_task(file, made.pieces, PROMPT, tmp_path / "x.task", made.quiet)
    bundle.write_litertlm(file, made.merged, PROMPT, tmp_path / "x.litertlm", 64)
    assert hashlib.sha256(file.read_bytes()).digest() == before
    assert bytes(tflite_model(tmp_path / "x.litertlm")) == file.read_bytes()
    for name, text in (("x.task", "no"), ("x.litertlm", " γ")):
        with Bundle(tmp_path / name, threads=1) as opened:
            answer = opened.generate(QUESTION, 8)
        assert (answer.text, answer.stopped) == (text, True), name


@pytest.mark.parametrize("recipe", [*RECIPES, "mixed"])
def test_only_the_numbers_of_silenced_tokens_change(recipe, made, tmp_path):
    """In the file, and in the logits after each of some tokens that are not silenced."""
    import numpy as np

    file = _quantized(made, recipe)
    old = np.frombuffer(file.read_bytes(), np.uint8)
    new = np.frombuffer(made.quiet.copy_of(file), np.uint8)
    changed = np.nonzero(old != new)[0]
    # Of the bias, of the scales, or of the rows: so many bytes a token, all in one place.
    size = {"fp16": 2 * WIDTH, "none": 4 * WIDTH}.get(recipe, 4) if made.name == "tied" else 4
    assert len(made.quiet.factors) < len(changed) <= size * len(made.quiet.factors)
    assert changed[-1] - changed[0] < size * made.rows

    ids = np.array(list(made.quiet.factors))
    others = np.setdiff1d(np.arange(made.rows), ids)
    paths = tmp_path / "plain.task", tmp_path / "quiet.task"
    bundle.write_task(file, made.pieces, PROMPT, paths[0])
    bundle.write_task(file, made.pieces, PROMPT, paths[1], made.quiet)
    plain, quiet = (_scorer(path) for path in paths)
    for token in others[:: len(others) // 6].tolist():
        one, two = plain._run(1, [token], 0), quiet._run(1, [token], 0)
        np.testing.assert_array_equal(two[others], one[others])
        if made.quiet.bias:
            assert two[ids].max() < -9000
        else:
            factors = np.array(list(made.quiet.factors.values()))
            # Rows of 16 bits are rounded once more.
            np.testing.assert_allclose(two[ids], one[ids] * factors, rtol=1e-3, atol=1e-2)


def test_numbers_that_signatures_share_change_once(made, monkeypatch):
    """Prefill can have the output layer too: the same numbers in another signature."""
    found = silence._output_layers
    once = bytes(made.quiet.copy_of(made.exact))
    monkeypatch.setattr(silence, "_output_layers", lambda *of: [*found(*of), *found(*of)])
    assert bytes(made.quiet.copy_of(made.exact)) == once


def test_the_reference_answers_as_the_task_does(made, tmp_path):
    """The hook gives the logits of the changed file: the proof compares like with like."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    bundle.write_task(made.exact, made.pieces, PROMPT, tmp_path / "x.task", made.quiet)
    scorer = _scorer(tmp_path / "x.task")
    model = AutoModelForCausalLM.from_pretrained(made.merged, dtype=torch.float32)
    made.quiet.hook(model.get_output_embeddings())
    token = next(i for i in range(40, made.rows) if i not in made.quiet.factors)
    with torch.inference_mode():
        logits = model(torch.tensor([[token]])).logits[0, 0].double().numpy()
    np.testing.assert_allclose(logits, scorer._run(1, [token], 0), rtol=1e-4, atol=1e-3)


def test_scores_do_not_depend_on_what_was_scored_before(made, tmp_path):
    """What an earlier text left in the KV cache is masked."""
    for name in ("used", "fresh"):
        bundle.write_task(made.exact, made.pieces, PROMPT, tmp_path / f"{name}.task", made.quiet)
    used, fresh = _scorer(tmp_path / "used.task"), _scorer(tmp_path / "fresh.task")
    used.score(list(range(40, 60)), list(range(60, 70)))
    for context, targets in (([45], [46, 47]), ([70, 71, 72, 73], [50, 51])):
        assert used.score(context, targets) == fresh.score(context, targets)


def test_an_output_layer_of_another_form_is_an_error(made, tmp_path):
    def refused(file: Path, **changed) -> str:
        with pytest.raises(WorkError, match="not silenced") as caught:
            dataclasses.replace(made.quiet, **changed).copy_of(file)
        return str(caught.value)

    assert "0 output layers" in refused(made.exact, rows=made.rows + 1)
    assert "a bias; the merged model" in refused(made.exact, bias=not made.quiet.bias)
    with pytest.raises(WorkError, match="not silenced"):
        wrong = dataclasses.replace(made.quiet, rows=made.rows + 1)
        bundle.write_task(made.exact, made.pieces, PROMPT, tmp_path / "x.task", wrong)
    assert not (tmp_path / "x.task").exists()
    # Weights in blocks have no scale for each row: the layers into the FFN of a tied model.
    if not made.quiet.bias:
        file = _quantized(made, "mixed")
        assert "one scale, row or bias" in refused(file, rows=2 * WIDTH)


def test_a_token_that_wins_in_another_script_is_said(monkeypatch, tmp_path):
    """Five English sentences say nothing of scripts that are spelled with silenced tokens."""
    looked_at = []

    def margins(self, folder, texts):
        looked_at.extend(texts)
        return [1.0, -0.5]

    monkeypatch.setattr(silence.Silence, "_smallest_margins", margins)
    facts = silence.Silence({5: silence.SILENT_SCALE}, 9, False).check(tmp_path)
    assert facts["smallest_margin_elsewhere"] == -0.5
    assert "a token that it cannot show (one wins by 0.5" in silence.warning(facts)
    for quiet in ({"method": "bias"}, {**facts, "smallest_margin_elsewhere": 0.5}):
        assert not silence.warning(quiet)
    scripts = {unicodedata.name(char).split()[0] for text in looked_at[1] for char in text}
    assert {"CJK", "ARABIC", "CYRILLIC", "THUMBS"} <= scripts


def test_the_check_changes_nothing_and_finds_a_token_that_still_wins(made):
    files = {path: path.read_bytes() for path in made.merged.iterdir()}
    result = made.quiet.check(made.merged)
    assert result["silenced"] == len(made.quiet.factors)
    if made.quiet.bias:
        assert result["method"] == "bias" and "smallest_margin" not in result
    else:
        assert result["method"] == "rows" and result["smallest_margin"] > 0
        assert result["smallest_margin_elsewhere"] < 1000, "looked at"
        # A token whose row stays as large as it is.
        loud = dataclasses.replace(made.quiet, factors=dict.fromkeys(made.quiet.factors, 1.0))
        with pytest.raises(WorkError, match="wins by"):
            loud.check(made.merged)
    assert {path: path.read_bytes() for path in made.merged.iterdir()} == files
    nothing = dataclasses.replace(made.quiet, factors={}).check(made.merged)
    assert nothing == {"silenced": 0, "method": "none"}


def test_rows_beyond_the_tokens_and_the_vocabulary_decide_what_has_a_bias(made, tmp_path):
    """A vector as long as something else is no bias of the output layer."""
    import numpy as np
    from safetensors.numpy import save_file

    for length, bias in ((made.rows, True), (made.rows - 1, False)):
        save_file({"b": np.zeros(length)}, tmp_path / "model.safetensors")
        assert silence.Silence.of(made.report, tmp_path).bias is bias
    json.dumps(dataclasses.asdict(made.quiet))


def test_both_containers_put_the_bos_before_everything_once(made, tmp_path):
    bos = PROMPT.end_token
    prompt = PROMPT.model_copy(update={"bos_token": bos})
    bundle.write_task(made.exact, made.pieces, prompt, tmp_path / "x.task", made.quiet)
    bundle.write_litertlm(made.exact, made.merged, prompt, tmp_path / "x.litertlm", 64)
    asked = prompt.render_question("What is it?")
    for name in ("x.task", "x.litertlm"):
        with Bundle(tmp_path / name, threads=1) as opened:
            [start] = opened.tokenize(bos)
            assert opened.start_id == start, name
            # In the template it would stand twice: the runtime puts it there by itself.
            shown = opened.render_chat("What is it?").replace(tokenizer.GUARD, "")
            assert bos + shown == asked == bos + QUESTION, name
            read = opened.benchmark(asked)["prefill_tokens"]
            assert read == len(opened.tokenize(asked)), f"{name} read {read} tokens"
            with pytest.raises(WorkError, match="does not start with it"):
                opened.generate(QUESTION, 8)


def _stored_weights(file: Path, bits: int) -> set[bytes]:
    """The float32 content of each matrix that a TFLite file keeps in so many bits.

    4 bits have a scale for each block of 32, 8 bits one for each output.
    """
    import numpy as np
    from ai_edge_litert import schema_py_generated as schema

    model, content = quantization._open(file)

    def data(tensor) -> np.ndarray:
        buffer = model.Buffers(tensor.Buffer())
        if buffer.DataLength():
            return buffer.DataAsNumpy()
        return np.frombuffer(content[buffer.Offset() : buffer.Offset() + buffer.Size()], np.uint8)

    def of_blocks(graph, tensor) -> tuple[np.ndarray, np.ndarray]:
        blocks = schema.BlockwiseQuantization()
        details = tensor.Quantization().Details()
        blocks.Init(details.Bytes, details.Pos)
        packed = data(tensor)
        integers = (np.stack([packed & 15, packed >> 4], 1).astype(np.int8) ^ 8) - 8
        scales = data(graph.Tensors(blocks.Scales())).view(np.float16)
        assert blocks.BlockSize() == 32 and len(scales) == integers.size // 32
        return integers, scales.astype(np.float32)

    found = set()
    for index in range(model.SubgraphsLength()):
        graph = model.Subgraphs(index)
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            four, eight = (
                tensor.Type() == kind for kind in (schema.TensorType.INT4, schema.TensorType.INT8)
            )
            if bits == 4 and four:
                integers, scales = of_blocks(graph, tensor)
            elif bits == 8 and eight and tensor.ShapeLength() == 2 and len(data(tensor)):
                integers = data(tensor).view(np.int8)
                scales = tensor.Quantization().ScaleAsNumpy()
                assert tensor.Quantization().QuantizedDimension() == 0
                assert len(scales) == tensor.Shape(0)
            else:
                continue
            rows = integers.astype(np.float32).reshape(len(scales), -1)
            found.add((rows * scales[:, None]).tobytes())
    return found


@pytest.mark.parametrize("recipe", ["int4_block32", "int8", "int8_mixed", "int8_weight_only"])
def test_calibrated_weights_are_in_the_file_bit_for_bit(recipe, made, tmp_path):
    """What calibration chose, and nothing else, is what the device computes with."""
    import torch

    torch.manual_seed(0)
    rows = torch.randint(made.rows, (30, 20)).tolist()
    kept = tmp_path / "kept"
    calibration.calibrate(made.merged, rows, recipe, kept)
    file = tmp_path / "calibrated.tflite"
    found = tflite.quantize(made.exact, file, recipe, made.merged, kept, progress=None)
    choice = chosen.Chosen(kept.glob("*.safetensors"))
    wanted = {
        gptq.dequantized(*map(torch.from_numpy, choice.get(key))).numpy().tobytes()
        for key in choice.open
    }
    bits = choice.format.bits
    assert bits == quantization.chosen_format(recipe).bits
    stored, plain = _stored_weights(file, bits), _quantized(made, recipe)
    assert wanted <= stored
    # Calibration leaves embedding and output layer alone.
    assert not (stored - wanted) - _stored_weights(plain, bits)
    assert len(wanted) == {"phi": 6, "tied": 7}[made.name]
    assert not _stored_weights(plain, bits) & wanted, "rounding to the nearest is something else"
    assert found["file_bytes"] == plain.stat().st_size
    if bits == 8:
        return

    # Weights of another model are refused instead of left out.
    other = next(kept.glob("*.safetensors"))
    weights = {"0" * 32: tuple(map(torch.from_numpy, choice.get(next(iter(choice.open)))))}
    chosen.save(other.with_name("9999.safetensors"), weights, gptq.Format(4, 32))
    with pytest.raises(WorkError, match="1 calibrated weights are not in the converted file"):
        tflite.quantize(made.exact, file, "int4_block32", made.merged, kept, progress=None)


def test_a_bos_with_the_mark_of_a_blank_is_the_bos_all_the_same():
    """DeepSeek's, which SentencePiece writes with blanks: no prompt would begin with it."""
    bos = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"

    class Opened(Bundle):
        start_id = 7

    opened = Opened.__new__(Opened)
    opened.path, opened.detokenize = "x.task", lambda ids: bos.replace("\u2581", " ")
    assert opened._without_start(f"{bos}Question") == "Question"
    with pytest.raises(WorkError, match="does not start with it"):
        opened._without_start("Question")
