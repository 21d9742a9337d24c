"""The model that ships, for measuring: merged in float32, rounded once, computed in float32."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT, run_script

from liteguard import machine, merged, models
from liteguard.config import build, read_yaml
from liteguard.errors import UserError, WorkError


@pytest.fixture(scope="module")
def config(tiny_phi):
    values = {"model": {"path": str(tiny_phi)}, "domain": {"lora_rank": 4}}
    return build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", values)])


@pytest.fixture(scope="module")
def adapter(config, tiny_phi, tmp_path_factory):
    """A trained-looking adapter: small changes, as a stage makes them."""
    import torch

    base = models.load_base(config, str(tiny_phi), None, torch.float32, quantize=False)
    adapted = models.add_adapter(base, config)
    generator = torch.Generator().manual_seed(0)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data = 1e-3 * torch.randn(value.shape, generator=generator)
    directory = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(directory)
    models.load_base_tokenizer(config).save_pretrained(directory)
    return directory


def sums(tiny_phi, adapter) -> dict:
    """Layer name -> base weight plus change, in float64."""
    import torch
    from safetensors.torch import load_file

    base = load_file(next(tiny_phi.glob("*.safetensors")))
    lora = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for name, down in lora.items():
        if "lora_A" not in name:
            continue
        layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
        up = lora[name.replace("lora_A", "lora_B")]
        # alpha 32 over rank 4
        found[layer] = base[layer].double() + 8 * (up.double() @ down.double())
    assert found and torch.float16 in {value.dtype for value in base.values()}
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_are_rounded_once(config, tiny_phi, adapter, dtype):
    """Half a unit in the last place at most; a delta rounded to bfloat16 first loses most of it."""
    import torch

    wanted = getattr(torch, dtype)
    model = merged.load_stored(tiny_phi)
    found = merged.merge_adapter(model, adapter, wanted)
    weights = model.state_dict()
    expected = sums(tiny_phi, adapter)
    assert found.changed == len(expected)
    for name, value in expected.items():
        assert weights[name].dtype == wanted
        unlike = (weights[name] != value.to(wanted)).float().mean().item()
        assert unlike < 1e-3, f"{name}: {unlike:.2%} of the elements"


def test_a_base_stored_in_float32_is_merged_like_any_other(tiny_phi, adapter):
    """It is its own float32 copy: summed in place, nothing would seem to have changed."""
    import torch

    model = merged.load_stored(tiny_phi).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = merged.merge_adapter(model, adapter)
    expected = sums(tiny_phi, adapter)
    assert found.changed == len(expected) and 0 < found.largest_delta < 1
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name].double(), value)
        assert not torch.equal(model.state_dict()[name], before[name])


def test_rslora_scales_by_the_root_of_the_rank(tiny_phi, tmp_path):
    """In training, by our own layers, and in what ships: alpha 6 over sqrt(4)."""
    import torch
    from safetensors.torch import load_file

    from liteguard.training import lora_linear

    lora = {"lora_rank": 4, "lora_alpha": 6, "use_rslora": True}
    values = {"model": {"path": str(tiny_phi)}, "domain": lora}
    config = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", values)])
    base = models.load_base(config, str(tiny_phi), None, torch.float32, quantize=False)
    adapted = models.add_adapter(base, config)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(tmp_path)
    assert lora_linear.fuse_lora(adapted) == 12
    model = merged.load_stored(tiny_phi)
    before = {name: value.double() for name, value in model.state_dict().items()}
    merged.merge_adapter(model, tmp_path, torch.float32)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for name, down in saved.items():
        if "lora_A" in name:
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            up = saved[name.replace("lora_A", "lora_B")]
            wanted = before[layer] + 3 * (up.double() @ down.double())
            torch.testing.assert_close(model.state_dict()[layer].double(), wanted)
    ids = torch.arange(5, 41)[None]
    with torch.no_grad():
        trained, shipped = adapted(ids).logits, model.float()(ids).logits
    torch.testing.assert_close(trained, shipped, rtol=1e-4, atol=1e-4)


def test_16_bit_weights_compute_what_float32_ones_do(config, adapter, monkeypatch):
    import torch

    small, tokenizer = merged.load_merged(config, adapter)
    monkeypatch.setattr(merged, "FLOAT32_BYTES", 0)
    monkeypatch.setattr(merged, "BLOCK_VALUES", 64 * 50)
    large, _ = merged.load_merged(config, adapter)
    held = sum(p.numel() * p.itemsize for p in large.parameters())
    assert held < 2.2 * sum(p.numel() for p in large.parameters()), "weights stay in 16 bit"
    ids = torch.tensor([models.encode(tokenizer, "Instruct: What is it?\nOutput:\n")] * 2)
    with torch.inference_mode():
        one, two = (model(ids).logits for model in (small, large))
    assert one.dtype == two.dtype == torch.float32
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapted", [True, False])
def test_a_base_stored_in_float32_is_measured_as_it_ships(
    config, tiny_phi, adapter, adapted, tmp_path, monkeypatch
):
    """Otherwise it takes twice the memory that was said, and the numbers are another model's."""
    from safetensors.torch import load_file

    from liteguard.export import merge

    base = tmp_path / "float32"
    wide = merged.load_stored(tiny_phi).float()
    for value in wide.parameters():
        value.data *= 1.0001  # digits that 16 bits do not hold
    wide.save_pretrained(base)
    models.load_base_tokenizer(config).save_pretrained(base)
    own = config.model_copy(update={"model": config.model.model_copy(update={"path": str(base)})})
    monkeypatch.setattr(merged, "FLOAT32_BYTES", 0)
    used = adapter if adapted else None
    model, _ = merged.load_merged(own, used)
    merge.merge_adapter(base, used, tmp_path / "out", own.prompt)
    shipped = load_file(tmp_path / "out/model.safetensors")
    held = dict(model.named_parameters())
    assert {*shipped} <= {*held}
    for name, value in shipped.items():
        assert value.dtype.itemsize == 2 and held[name].float().equal(value.float()), name
        assert held[name].dtype.itemsize == 2 or held[name].ndim == 1, name


def test_an_adapter_beyond_float16_is_named(config, tiny_phi, adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    file = broken / "adapter_model.safetensors"
    for factor, told in ((1e9, "float16 can hold"), (float("nan"), "not finite")):
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file({k: v * factor if "lora_B" in k else v for k, v in tensors.items()}, file)
        with pytest.raises(WorkError, match=told):
            merged.merge_adapter(merged.load_stored(tiny_phi), broken)


def killed(how: str) -> str:
    """Work for `in_child`: what the kernel does when memory runs out, an error, or a result."""
    import os
    import signal

    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        raise WorkError("what went wrong")
    return how


def test_work_that_the_kernel_kills_is_named_by_its_step():
    assert machine.in_child("proof", killed, "well") == "well"
    with pytest.raises(WorkError, match="what went wrong"):
        machine.in_child("proof", killed, "raise")
    with pytest.raises(WorkError, match="step 'proof' was killed.*memory"):
        machine.in_child("proof", killed, "kill")


def test_too_little_memory_is_said_before_the_work(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * 10**9)
    machine.require_memory(10**9, "evaluating", ".")
    with pytest.raises(UserError, match="evaluating needs about 3.0 GB of memory, and 2.0 GB is"):
        machine.require_memory(3 * 10**9, "evaluating", ".")


def test_unpacked_weights_are_removed_also_those_of_a_killed_process(tmp_path):
    import os
    import subprocess
    import sys

    from liteguard.runtime.container import unpacked_weights

    bundle = tmp_path / "x.task"
    bundle.write_bytes(b"")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / f".x.task.{process}-a.unpacked" for process in (gone.pid, os.getpid())]
    other = tmp_path / ".y.task.1-a.unpacked"
    for folder in (*left, other):
        folder.mkdir()
    with unpacked_weights(bundle) as folder:
        assert folder.is_dir() and folder.parent == tmp_path
        assert not left[0].exists() and left[1].exists() and other.exists()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("recipe", "scores", "needed"),
    [("int8", True, 2000), ("int8", False, 1000), ("int8_weight_only", True, 5000)],
)
def test_a_disk_without_room_for_the_unpacked_weights_is_named(
    recipe, scores, needed, tmp_path, monkeypatch
):
    """Phi-2 in int8 wrote 5.5 GB beside its bundle, and ended in the middle of the measurement."""
    from liteguard.runtime import container

    bundle = tmp_path / "x.task"
    bundle.write_bytes(bytes(1000))
    asked = []

    def usage(place):
        asked.append(place)
        return SimpleNamespace(free=free)

    monkeypatch.setattr(container.shutil, "disk_usage", usage)
    free = needed
    container.require_disk(bundle, recipe, scores)
    free = needed - 1
    with pytest.raises(UserError, match=f"x.task is unpacked in .*about {needed // 1000} KB"):
        container.require_disk(bundle, recipe, scores)
    with container.unpacked_weights(bundle) as folder:
        assert set(asked) == {folder.parent}, "the place that is used"


def test_a_log_file_gets_no_bars():
    """transformers draws one for the weights it loads, thousands of characters on one line."""
    code = "from liteguard import machine; machine.quiet_libraries()\n"
    code += "from tqdm import tqdm; list(tqdm(range(3))); print('done')"
    result = run_script("-c", code)
    assert (result.stdout, result.stderr) == ("done\n", "")
