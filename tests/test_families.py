"""Base models beside Phi and SmolLM2: windows, BOS, tokenizers, what can be exported."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from liteguard import base_tokenizers, models
from liteguard.config import build, read_yaml
from liteguard.errors import UserError
from liteguard.evaluation import held_out, knowledge
from liteguard.export import bundle, possible, shapes, tokenizer
from liteguard.prompts import Prompt
from liteguard.training import isolation, loop, packing, patches, tokens

WINDOW = 8
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
WINDOWED = {
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "head_dim": 8,
    },
    "gemma3_text": {
        "sliding_window": WINDOW,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def architecture(kind: str, **more):
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **SHAPE, **WINDOWED.get(kind, {}), **more)


def random_model(config, scoring: bool = True):
    """A model whose weights are large enough that it matters what a token sees."""
    import torch
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if scoring:
        add_fused_lm_head(model)
        accelerator = SimpleNamespace(unwrap_model=lambda m: m)
        wrapped = SimpleNamespace(get_base_model=lambda: model)
        patches.score_targets_only(SimpleNamespace(model=wrapped, accelerator=accelerator))
    return model.eval()


@pytest.mark.parametrize("kind", WINDOWED)
def test_packed_rows_see_through_the_same_window_as_rows_alone(kind):
    import torch

    config = architecture(kind)
    model, plain = random_model(config), random_model(config, scoring=False)
    isolation.pack(model, config, 96)
    lengths = (30, 5, 21)
    ids = torch.randint(1, 64, (3, 30), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(30) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs
        for row, length in enumerate(lengths):
            logits = plain(ids[row : row + 1, :length]).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(1, ids[row, 1:length, None])[:, 0]
            torch.testing.assert_close(found[row, : length - 1], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", WINDOWED)
def test_packing_that_ignores_the_window_is_refused(kind, monkeypatch):
    original = packing.segment_attention

    def blind(*args, **kwargs):
        if kwargs.get("segment_lengths"):
            kwargs.pop("sliding_window", None)
        return original(*args, **kwargs)

    monkeypatch.setattr(packing, "segment_attention", blind)
    config = architecture(kind)
    with pytest.raises(isolation.PackingRefused, match="those of the example alone"):
        isolation.pack(random_model(config), config, 96)


def test_a_window_that_no_row_of_the_stage_reaches_costs_nothing():
    config = architecture("mistral")
    assert isolation.check_rows(config, 96)[0].shape == (3, isolation.CHECK_TOKENS)
    config.sliding_window = 40
    assert isolation.check_rows(config, 96)[0].shape == (3, 80)
    assert isolation.check_rows(config, 60)[0].shape == (3, 60)
    config.sliding_window = 4096
    assert isolation.check_rows(config, 60)[1] == 0
    assert isolation.check_rows(config, 16)[0].shape == (3, 16)


def test_chunked_attention_and_carried_states_are_not_packed():
    from transformers import AutoConfig, Lfm2Config

    chunked = AutoConfig.for_model(
        "llama4_text", **SHAPE, attention_chunk_size=WINDOW, num_local_experts=1, head_dim=8
    )
    assert "chunked_attention" in isolation.refusal(chunked)
    carried = Lfm2Config(**SHAPE, full_attn_idxs=[1])
    assert "conv" in isolation.refusal(carried)
    assert isolation.refusal(architecture("gemma3_text")) is None


def test_a_model_that_must_not_be_packed_is_trained_on_padded_rows(monkeypatch, capsys):
    """`loop.run` asks for another trainer, one that pads."""
    config = build([("test", {"model": {"name": "a/b"}})])
    asked = []

    def make_trainer(stage):
        asked.append(stage.section.packing)
        return object(), SimpleNamespace(tokens=np.array([9]))

    def train(stage, trainer, counts):
        if stage.section.packing:
            raise isolation.PackingRefused("packing is refused: the reason")
        return {"steps": 1}

    monkeypatch.setattr(loop, "train", train)
    run = loop.Run(
        **{name: None for name in ("output", "data_dir", "parent", "base_revision")},
        **{"name": "domain", "config": config, "base_directory": "", "architecture": None},
        **{"inputs": {}, "rows": {}, "work": Path()},
    )
    _, metrics = loop.run(run, make_trainer)
    assert asked == [True, False]
    assert metrics["packing_refused"] == "packing is refused: the reason"
    assert "packing is refused: the reason\ndomain: going on with padded rows" in (
        capsys.readouterr().out
    )


# --- tokenizers and prompts -------------------------------------------------------------------

CHAT = ["<bos>", "<eos>", "<user>", "<model>", "<end>", "<pad>"]
SENTENCES = ["The heart pumps blood.", "Caf\u00e9 au lait spots are pale brown.", "A dose of 5 mg."]
BOS_PROMPT = Prompt(
    bos_token="<bos>",
    user_prefix="<user>\n",
    user_suffix="<end>",
    model_prefix="<model>\n",
    turn_separator="",
    end_token="<end>",
    document_end_token="<eos>",
    pad_token="<pad>",
)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{{ '<user>' if m.role == 'user' else '<model>' }}{{ '\n' + m.content + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<model>\n' }}{% endif %}"
)


def save_bpe(folder, bos: bool = True, normalizer=None, **flags):
    """A byte-level BPE with a chat's tokens that, with `bos`, begins every text with one."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(kinds.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[AddedToken(t, **(flags if t == "<end>" else {})) for t in CHAT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*SENTENCES * 20, "end.\n\n" * 40], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    return save_bpe(tmp_path_factory.mktemp("with_bos"))


def test_a_bos_that_the_prompt_lacks_is_refused_by_name(with_bos):
    lacking = BOS_PROMPT.model_copy(update={"bos_token": ""})
    with pytest.raises(UserError, match=r"begins every text with <bos>, and prompt.bos_token is "):
        models.load_tokenizer(str(with_bos), lacking, 400)
    with pytest.raises(UserError, match="prompt.bos_token = '<start>' is not a token"):
        models.load_tokenizer(
            str(with_bos), BOS_PROMPT.model_copy(update={"bos_token": "<start>"}), 400
        )


def test_the_bos_is_in_the_prompt_and_never_twice(with_bos, tmp_path):
    own = models.load_tokenizer(str(with_bos), BOS_PROMPT, 400)
    asked = BOS_PROMPT.render_question("What is asthma?")
    assert asked == "<bos><user>\nWhat is asthma?<end><model>\n"
    own.save_pretrained(tmp_path)
    for loaded in (own, models.load_tokenizer(str(tmp_path), BOS_PROMPT, 400)):
        bos = loaded.convert_tokens_to_ids("<bos>")
        ids = loaded(asked)["input_ids"]
        assert ids[0] == bos and ids.count(bos) == 1, "a trainer calls the tokenizer as it is"
        messages = [{"role": "user", "content": "What is asthma?"}]
        chat = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat == asked


def with_data(tmp_path, part: str, rows: list[dict], prompt: Prompt, split="train", **over):
    (tmp_path / "data" / part).mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / part / f"{split}.jsonl").write_text(text)
    files = {f"{part}/{split}.jsonl": hashlib.sha256(text.encode()).hexdigest()}
    manifest = {"model_type": "tiny", "files": files}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    values = {"prompt": prompt.model_dump(), "data": {"cache_dir": str(tmp_path / "cache")}, **over}
    return tmp_path / "data", build([("test", values)])


def test_every_piece_of_a_text_begins_with_the_bos(with_bos, tmp_path):
    own = models.load_tokenizer(str(with_bos), BOS_PROMPT, 400)
    text = "The heart pumps blood. " * 9
    rows = [{"text": text}, {"text": "A dose."}]
    data, config = with_data(tmp_path, "domain", rows, BOS_PROMPT, domain={"max_length": 16})
    found = tokens.documents(own, data, "train", config)
    pieces = [[array.tolist() for array in found.row(i)] for i in range(len(found))]
    bos = own.convert_tokens_to_ids("<bos>")
    assert len(pieces) > 3 and all(ids[0] == bos and len(ids) <= 16 for ids, _ in pieces)
    # The BOS is a target nowhere (nothing predicts the first token); every other token once.
    targets = [label for _, labels in pieces for label in labels[1:] if label != -100]
    whole = [models.encode(own, f"{t}<eos>") for t in (text, "A dose.")]
    assert targets == sum(whole, [])


def test_a_question_that_is_cut_keeps_its_bos(with_bos, tmp_path):
    own = models.load_tokenizer(str(with_bos), BOS_PROMPT, 400)
    # One row in a hundred may be cut.
    rows = [{"prompt": "word " * 90, "completion": "A dose."}]
    rows += [{"prompt": "word", "completion": "A dose."}] * 99
    data, config = with_data(
        tmp_path, "instruction", rows, BOS_PROMPT, instruction={"max_length": 40}
    )
    ids, labels = tokens.answers(own, data, "train", config).row(0)
    assert len(ids) == 40 and ids[0] == own.convert_tokens_to_ids("<bos>")
    assert own.decode(ids[labels == -100]).endswith("<end><model>\n")


def test_everything_that_is_measured_begins_with_the_bos():
    config = build([("test", {"prompt": BOS_PROMPT.model_dump()})])
    text = " ".join(str(number) for number in range(60))
    rows = {"texts": [{"text": text}], "questions": []}
    [(before, after)] = held_out.text_pairs(config, rows)
    assert before == "<bos>0" and not after.startswith("<bos>")
    question = {"prompt": "Q", "context": "", "options": ["a", "b"]}
    pairs = knowledge.pairs([question], config.prompt.bos_token)
    assert [before for before, _ in pairs] == ["<bos>Question: Q\nAnswer:"] * 2


def test_without_a_bos_everything_is_as_it_was():
    prompt = read_yaml(ROOT / "configs/phi-2.yaml")["prompt"]
    phi = Prompt(**prompt)
    assert phi.render_question("Q") == "Instruct: Q\nOutput:\n"
    assert phi.render_document("T") == "T<|endoftext|>" and phi.begin("x") == "x"
    assert phi.chat_template().startswith("{% for message in messages %}")


def test_a_prompt_is_taken_from_the_bases_own_template(with_bos):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(with_bos)
    assert base_tokenizers.prompt_of(own, "a/base") == BOS_PROMPT
    values = {"model": {"name": "a/base", "path": str(with_bos)}, "prompt": "from_base"}
    config = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("mine.yaml", values)])
    assert config.prompt_from_base
    (with_bos / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    found = models.with_base_prompt(config)
    assert found.prompt == BOS_PROMPT and not found.prompt_from_base
    assert found.sources["prompt.bos_token"] == "the base's chat template"


def test_what_is_set_beside_from_base_changes_the_bases_prompt(with_bos, capsys):
    """A key of an upper layer took the place of the word, and the prompt became Phi's."""
    base = {"model": {"name": "a/base", "path": str(with_bos)}, "prompt": "from_base"}
    (with_bos / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    phi = ("phi", read_yaml(ROOT / "configs/phi-2.yaml"))
    over = ("child.yaml", {"prompt": {"system_prefix": "<user>\n"}})
    setting = ("--set", {"prompt": {"system": "Be brief."}})
    config = build([phi, ("mine.yaml", base), over, setting])
    found = models.with_base_prompt(config)
    wanted = {"system": "Be brief.", "system_prefix": "<user>\n"}
    assert found.prompt == BOS_PROMPT.model_copy(update=wanted) and not found.prompt_from_base
    assert found.sources["prompt.system"] == "--set"
    assert found.sources["prompt.end_token"] == "the base's chat template"
    # In one file, and taken back by a later one.
    one = {**base, "prompt": {"from_base": True, "system": "Be brief."}}
    assert models.with_base_prompt(build([phi, ("one.yaml", one)])).prompt.system == "Be brief."
    again = build([("mine.yaml", base), setting, ("again.yaml", {"prompt": "from_base"})])
    assert models.with_base_prompt(again).prompt == BOS_PROMPT
    # What is no prompt is said, at once or when the base's is known.
    with pytest.raises(UserError, match="prompt.sytem: unknown key; did you mean 'system'"):
        build([("mine.yaml", base), ("--set", {"prompt": {"sytem": "x"}})])
    pad = build([("mine.yaml", base), ("--set", {"prompt": {"pad_token": "<end>"}})])
    with pytest.raises(UserError, match="pad_token '<end>' must differ.*with pad_token set beside"):
        models.with_base_prompt(pad)


def test_a_finished_stages_prompt_keeps_what_is_set_beside_from_base():
    """Where it differs, the stage is refused by name, as with any other prompt."""
    setting = ("--set", {"prompt": {"system": "Be brief."}})
    config = build([("mine.yaml", {"prompt": "from_base"}), setting])
    found = config.with_prompt(BOS_PROMPT, "the parent's stage.json").prompt
    assert found == BOS_PROMPT.model_copy(update={"system": "Be brief."})


def test_the_bos_that_the_template_lacks_and_a_token_that_pads(tmp_path):
    """As TinyLlama: the tokenizer adds <s>, the template has none, and no row is spare."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(save_bpe(tmp_path))
    own.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    assert base_tokenizers.prompt_of(own, "a/base", len(own)) == BOS_PROMPT

    class Unused(type(own)):
        def get_added_vocab(self):
            return {t: i for t, i in super().get_added_vocab().items() if t != "<pad>"} | {
                "<unk>": 6
            }

    own.__class__, own.unk_token = Unused, "<unk>"
    full, spare = (base_tokenizers.prompt_of(own, "a/base", n) for n in (len(own), len(own) + 1))
    assert (full.pad_token, spare.pad_token) == ("<unk>", "<|pad|>")


def test_a_prompt_that_is_not_the_bases_own_is_said(with_bos, asked, capsys, tmp_path):
    """Another base below `extends: phi-2.yaml`, and its prompt forgotten: it trained on Phi's."""
    asked()
    assert "prompt: as the base's chat template\n" in capsys.readouterr().out
    forgotten = Prompt(
        bos_token="<bos>", **{t: "<eos>" for t in ("end_token", "document_end_token")}
    )
    asked(prompt=forgotten)
    said = capsys.readouterr().out
    assert "prompt: differs from the base's chat template, near '<user>\\nQUESTION" in said
    assert "where it has 'Instruct: QUESTION" in said and "`prompt: from_base`" in said
    # A base without a template has nothing to differ from.
    from transformers import AutoTokenizer

    bare = AutoTokenizer.from_pretrained(with_bos)
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    asked(tmp_path / "bare", prompt=forgotten)
    assert "chat template" not in capsys.readouterr().out


CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<user>system\nYou help.<end>\n' }}{% endif %}"
    "{{ '<user>' + m.role + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<user>assistant\n' }}{% endif %}"
)


def test_a_templates_own_system_text_is_taken_over(with_bos):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(with_bos)
    own.chat_template = CHATML
    found = base_tokenizers.prompt_of(own, "a/base")
    assert (found.system_prefix, found.system, found.system_suffix) == (
        *("<user>system\n", "You help."),
        "<end>\n",
    )
    assert (found.user_prefix, found.user_suffix) == ("<user>user\n", "<end>\n")
    assert (found.model_prefix, found.turn_separator) == ("<user>assistant\n", "\n")
    # The template has no BOS; the tokenizer puts it before every text.
    assert found.bos_token == "<bos>" and found.end_token == "<end>"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "no token ends an answer"),
        (
            "{{ messages[-1].content }}<end>",
            "rendered in another way than the last question",
        ),
        (None, "has no chat template"),
    ],
)
def test_a_template_that_no_prompt_expresses_is_refused_with_the_reason(with_bos, template, why):
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(with_bos)
    own.chat_template = template
    with pytest.raises(UserError, match=why):
        base_tokenizers.prompt_of(own, "a/base")


def test_tokens_past_the_embedding_are_left_out(tmp_path):
    """Gemma-3's tokenizer has a token for images that its text models have no row for."""
    from transformers import AutoTokenizer

    save_bpe(tmp_path, bos=False)
    own = AutoTokenizer.from_pretrained(tmp_path, extra_special_tokens={"image_token": "<image>"})
    rows = len(own) - 1
    assert own.convert_tokens_to_ids("<image>") == rows
    own.save_pretrained(tmp_path / "base")
    prompt = BOS_PROMPT.model_copy(update={"bos_token": ""})
    loaded = models.load_tokenizer(str(tmp_path / "base"), prompt, rows)
    assert len(loaded) == rows and "<image>" not in loaded.get_vocab()
    loaded.save_pretrained(tmp_path / "stage")
    again = AutoTokenizer.from_pretrained(tmp_path / "stage")  # as the merge reads it
    assert len(again) == rows and again("a b")["input_ids"] == loaded("a b")["input_ids"]


def test_tokens_that_swallow_blanks_no_longer_do(tmp_path):
    save_bpe(tmp_path, bos=False, rstrip=True)
    prompt = BOS_PROMPT.model_copy(update={"bos_token": ""})
    loaded = models.load_tokenizer(str(tmp_path), prompt, 400)
    assert loaded.decode(loaded("a<end> b")["input_ids"]) == "a<end> b"
    loaded.save_pretrained(tmp_path / "stage")
    tokenizer.build_sentencepiece(tmp_path / "stage", tmp_path / "made.model")
    spaced = prompt.model_copy(update={"user_suffix": "<end>\n"})
    with pytest.raises(UserError, match="swallows blanks.*<end>"):
        models.load_tokenizer(str(tmp_path), spaced, 400)


# --- what can be exported ---------------------------------------------------------------------


@pytest.fixture
def asked(with_bos, tmp_path):
    """A function: what can be made of a tokenizer and an architecture."""
    rows = [{"prompt": "What is a dose?", "completion": "A dose of 5 mg."}] * 3
    data, config = with_data(tmp_path, "instruction", rows, BOS_PROMPT, "validation")

    def ask(folder=with_bos, shape=None, prompt=BOS_PROMPT, **over):
        shape = shape or SimpleNamespace(model_type="llama", num_key_value_heads=2, vocab_size=400)
        if not hasattr(shape, "get_text_config"):
            shape.get_text_config = lambda: shape
        changed = config.model_copy(update={"prompt": prompt, **over})
        own = models.load_tokenizer(str(folder), prompt, 400)
        stage = SimpleNamespace(
            config=changed, architecture=shape, base_directory=folder, data_dir=data, parent=None
        )
        return possible.require(stage, own)

    return ask


def test_both_containers_can_be_made(asked, capsys, monkeypatch):
    found = asked()
    assert not found.task and not found.litertlm
    assert "bundles: .task and .litertlm can be made (2 of 2 texts" in capsys.readouterr().out
    # The answer is kept: stages 2 and 3 ask again.
    monkeypatch.setattr(possible, "as_task", lambda *args: pytest.fail("asked twice"))
    assert asked() == found


def test_a_normaliser_is_judged_by_the_texts_and_not_by_its_name(tmp_path, asked):
    from tokenizers import normalizers

    save_bpe(tmp_path / "nfc", normalizer=normalizers.NFC())
    assert not asked(tmp_path / "nfc").task
    save_bpe(tmp_path / "lower", normalizer=normalizers.Lowercase())
    found = asked(tmp_path / "lower")
    assert "only 0 of 2 texts have equal ids" in found.task and "Lowercase" in found.task
    assert not found.litertlm and str(found).startswith("bundles: .litertlm only; no .task")


def test_a_text_or_two_at_the_limit_is_left_to_the_proof():
    """Of 1,058 medical texts, Qwen's and Llama's real tokenizers differ in 2, and the proof allows
    one in a thousand: apostrophes before capitals, as in O'Donnell."""
    assert not possible._surely_more(0, 0.002) and not possible._surely_more(2, 1.058)
    assert possible._surely_more(5, 1.058) and possible._surely_more(1, 0.002)
    assert possible._surely_more(900, 1.0)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"num_key_value_heads": None}, "no num_key_value_heads"),
        ({"layer_types": ["conv", "full_attention"]}, "layers of kind conv"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "of kind dynamic"),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "latent attention"),
        ({"model_type": "gpt_oss"}, "attention sinks"),
        ({"sliding_window": 1279}, "looks back 1,279 tokens in all of its layers"),
        ({"wrapped": True}, "holds a text model among others"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_training(asked, shape, why, monkeypatch):
    monkeypatch.setattr(possible.tflite, "choose_converter", lambda *_: "v2")
    plain = {"model_type": "odd", "num_key_value_heads": 2, "vocab_size": 400}
    given = SimpleNamespace(**plain | shape)
    if shape.get("wrapped"):
        given.get_text_config = lambda: SimpleNamespace(vocab_size=400)
    with pytest.raises(UserError, match=f"neither .task nor .litertlm.*{why}.*compress.required"):
        asked(shape=given)
    free = build([("test", {"compress": {"required": False}})]).compress
    assert why in asked(shape=given, compress=free).task


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ({"model_type": "odd"}, "the 'odd' architecture was"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "models with experts were"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "models with longrope positions were"),
    ],
)
def test_what_was_never_converted_is_not_promised(asked, capsys, monkeypatch, shape, what):
    monkeypatch.setattr(possible.tflite, "choose_converter", lambda *_: "v1")
    plain = {"model_type": "llama", "num_key_value_heads": 2, "vocab_size": 400}
    found = asked(shape=SimpleNamespace(**plain | shape))
    assert not found.task and not found.litertlm
    said = capsys.readouterr().out
    assert f"bundles: not known whether it converts ({what} never tried); its tokenizer" in said
    assert "can be made" not in said
    # The kept answer of the same tokenizer says nothing of another architecture.
    assert "can be made" in str(asked(shape=SimpleNamespace(**plain)))


def test_every_family_of_the_support_table_that_converts_is_known():
    report = json.loads((ROOT / "benchmarks/support_report.json").read_text())["families"]
    made = {
        f["architecture"] for f in report.values() if "yes" in (f.get("task"), f.get("litertlm"))
    }
    assert made <= {*shapes._CONVERTED}


def test_a_window_that_the_cache_never_reaches_is_no_reason():
    """Phi-3-mini looks back 2,047 tokens; in 1,280 places nothing is that far back."""
    for window, room, refused in ((2047, 1280, False), (2047, 2047, False), (2047, 2048, True)):
        shape = SimpleNamespace(
            model_type="phi3", num_key_value_heads=2, vocab_size=9, sliding_window=window
        )
        shape.get_text_config = lambda own=shape: own
        found = shapes.wrong(shape, "v2", room)
        assert ("looks back 2,047 tokens" in found) == refused, (room, found)


def test_the_converter_reads_no_window_that_the_cache_never_reaches(tmp_path):
    merged = tmp_path / "merged"
    merged.mkdir()
    own = {"model_type": "phi3", "sliding_window": 2047, "vocab_size": 9}
    (merged / "config.json").write_text(json.dumps(own))
    (merged / "model.safetensors").write_bytes(b"weights")
    given = shapes.without_unreachable(merged, tmp_path / "given", 1280)
    assert json.loads((given / "config.json").read_text()) == {**own, "sliding_window": None}
    assert (given / "model.safetensors").read_bytes() == b"weights"
    assert json.loads((merged / "config.json").read_text()) == own, "the model itself keeps it"
    # One that is reached, or that the converter has a mask for, is left to it.
    assert shapes.without_unreachable(merged, tmp_path / "b", 2048) == merged
    for masked in ({"model_type": "mistral"}, {"layer_types": ["sliding_attention"]}):
        (merged / "config.json").write_text(json.dumps(own | masked))
        assert shapes.without_unreachable(merged, tmp_path / "c", 1280) == merged


def test_a_window_that_the_layers_name_can_be_converted(asked):
    kinds = ["sliding_attention", "full_attention"]
    plain = {"model_type": "odd", "num_key_value_heads": 2, "vocab_size": 400}
    found = asked(shape=SimpleNamespace(**plain, sliding_window=2047, layer_types=kinds))
    assert not found.task and not found.litertlm


def save_native(folder: Path, scheme: str = "never", chat: tuple[str, ...] = ("<user>", "<model>")):
    """A SentencePiece model as Llama's, and the same tokenizer as transformers has it."""
    import io

    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=made,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=scheme != "never",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    pieces = [piece.piece for piece in proto.ModelProto.FromString(made.getvalue()).pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    scores = {p: i for i, p in enumerate(pieces) if i > 258}
    pairs = {
        (scores[piece], left, piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in vocabulary and piece[cut:] in vocabulary
    }
    merges = [(left, right) for _, left, right in sorted(pairs)]
    core = Tokenizer(kinds.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * (scheme != "never")
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.add_special_tokens([AddedToken(t, normalized=False) for t in chat])
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


NATIVE_PROMPT = Prompt(
    bos_token="<s>",
    user_prefix="<user>\n",
    user_suffix="</s>\n",
    model_prefix="<model>\n",
    end_token="</s>",
    document_end_token="</s>",
    pad_token="<pad>",
)


def test_a_bases_own_sentencepiece_model_is_kept(tmp_path, asked):
    import sentencepiece
    from transformers import AutoTokenizer

    save_native(tmp_path)
    own = models.load_tokenizer(str(tmp_path), NATIVE_PROMPT, 400)
    assert not asked(tmp_path, prompt=NATIVE_PROMPT).task
    own.save_pretrained(tmp_path / "merged")
    (tmp_path / "merged/config.json").write_text(json.dumps({"vocab_size": 400}))
    report = tokenizer.build_sentencepiece(
        tmp_path / "merged", tmp_path / "made.model", native=tmp_path / "tokenizer.model"
    )
    assert report.native and report.rows == 400 and report.tokens == len(own)
    device = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    texts = [*SENTENCES, "\u6f22 5 \u00b5g\n\nend", NATIVE_PROMPT.render_question("A dose?")]
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert device.encode(texts) == [models.encode(again, text) for text in texts]
    guarded = f"{tokenizer.GUARD}\n"
    assert device.encode(guarded) == device.encode("\n")
    # Without the file it is said what is missing.
    (tmp_path / "tokenizer.model").unlink()
    found = asked(tmp_path, prompt=NATIVE_PROMPT)
    assert "own tokenizer.model, and there is none" in found.task and not found.litertlm


def test_a_text_behind_the_bos_has_the_ids_that_it_has_by_itself(tmp_path, asked):
    """TinyLlama, as transformers has it: a blank before a text, none behind <s>, and <|user|> is
    text. The runtimes encode what follows the BOS by itself."""
    import sentencepiece
    from transformers import AutoTokenizer, LlamaTokenizer

    save_native(tmp_path, "first", chat=())
    prompt = build([("t", read_yaml(ROOT / "configs/tinyllama.yaml"))]).prompt
    base = AutoTokenizer.from_pretrained(tmp_path)
    assert base.tokenize("dose")[0].startswith("\u2581")
    own = models.load_tokenizer(str(tmp_path), prompt, 400)
    texts = [prompt.render_conversation([("A dose?", text), ("And", None)]) for text in SENTENCES]
    assert models.encode(own, texts[0])[0] == own.bos_token_id
    for text in texts:
        assert models.encode(own, text) == models.encode(base, text), "behind the BOS all is as was"
        rest = models.encode(own, text.removeprefix("<s>"))
        assert [own.bos_token_id, *rest] == models.encode(own, text)
    assert own.decode(models.encode(own, " a dose")) == " a dose"
    found = asked(tmp_path, prompt=prompt)
    assert not found.task and not found.litertlm, found
    # What the stage saves says the same to whoever loads it, also to transformers' own class.
    own.save_pretrained(tmp_path / "stage")
    (tmp_path / "stage/config.json").write_text(json.dumps({"vocab_size": 400}))
    ids = models.encode(own, SENTENCES)
    for again in (AutoTokenizer, LlamaTokenizer):
        loaded = again.from_pretrained(tmp_path / "stage")
        assert models.encode(loaded, SENTENCES) == ids
    native = tmp_path / "tokenizer.model"
    tokenizer.build_sentencepiece(tmp_path / "stage", tmp_path / "made.model", native=native)
    device = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    assert device.encode(SENTENCES) == ids


def test_a_prompt_without_a_bos_keeps_the_blank_before_a_text(tmp_path):
    save_native(tmp_path, "first")
    prompt = NATIVE_PROMPT.model_copy(update={"bos_token": "", "user_prefix": "Ask: "})
    own = models.load_tokenizer(str(tmp_path), prompt, 400)
    assert own.tokenize("dose")[0].startswith("\u2581")


def test_a_text_that_has_other_ids_behind_the_bos_is_seen_before_training():
    """The runtime encodes what follows the BOS by itself."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    core = Tokenizer(kinds.BPE({t: i for i, t in enumerate(("<s>", "</s>", "\u2581", "A"))}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.add_special_tokens(["<s>", "</s>"])
    words = NATIVE_PROMPT.model_copy(update={"user_prefix": "A"})
    found = possible.as_litertlm(SimpleNamespace(backend_tokenizer=core), words)
    assert "after <s> a text has other ids in training than by itself" in found


def test_the_support_tables_tinyllama_has_a_tokenizer_like_the_real_one(tmp_path):
    """With each <...> of the prompt as a token, the table says nothing of the real one."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import support_table

    prompt = build([("t", read_yaml(ROOT / "configs/tinyllama.yaml"))]).prompt
    support_table.stand_in_sentencepiece(tmp_path, prompt)
    assert {*tmp_path.glob("*.vocab")} == set()
    own = models.load_tokenizer(str(tmp_path), prompt, 700)
    assert "<|user|>" not in own.get_vocab() and len(own.tokenize("<|user|>")) > 1
    assert possible.as_litertlm(own, prompt) == ""
    own.save_pretrained(tmp_path / "stage")
    (tmp_path / "stage/config.json").write_text(json.dumps({"vocab_size": 700}))
    texts = [text for row in support_table.diseases() for text in (row["text"], row["prompt"])]
    native = tmp_path / "tokenizer.model"
    why, _ = possible.as_task(tmp_path / "stage", native, prompt, texts, texts[1:9:2], 0.999)
    assert why == ""


def test_another_format_that_is_called_tokenizer_model_is_not_taken(with_bos, tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Llama 3's
    native = tmp_path / "tokenizer.model"
    report = tokenizer.build_sentencepiece(with_bos, tmp_path / "made.model", native=native)
    assert not report.native


# --- shipped configurations -------------------------------------------------------------------

ASKED = {
    "smollm2-360m": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "smollm2-1.7b": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "qwen2.5-0.5b": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "qwen2.5-1.5b": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "qwen3-0.6b": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "gemma-3-270m": "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    "gemma-3-1b": "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    "llama-3.2-1b": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi-4-mini": "<|user|>Q<|end|><|assistant|>",
    "deepseek-r1-distill-qwen-1.5b": "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>Q"
    "<\uff5cAssistant\uff5c>",
    "tinyllama": "<s><|user|>\nQ</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", ASKED)
def test_shipped_families_ask_as_their_models_were_taught(name):
    config = build([(name, read_yaml(ROOT / "configs" / f"{name}.yaml"))])
    assert config.prompt.render_question("Q") == ASKED[name]
    assert config.model_type == name and config.model.name != "microsoft/phi-2"
    assert config.prompt.render_answer("A") == f"A{config.prompt.end_token}"


def test_two_line_breaks_keep_both_in_a_tasks_template():
    """The runtime's template drops the last of two: nothing must stand at its end."""
    guarded = bundle._guarded("<model>\n\n")
    assert guarded == f"<model>\n{tokenizer.GUARD}\n"
    three = bundle._guarded("x\n\n\n")
    assert "\n\n" not in three and three.replace(tokenizer.GUARD, "") == "x\n\n\n"
    assert bundle._guarded("\nb") == f"{tokenizer.GUARD}\nb" and bundle._guarded("a\n") == "a\n"
