"""More than one process: the same training, one writer, and errors that all processes share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest
import yaml
from conftest import ROOT, succeed

from liteguard import distributed
from liteguard.errors import UserError

# Two gradients, averaged, instead of two accumulated: measured difference 0, but the order of
# float32 sums is no promise.
TOLERANCE = 1e-5
SETTINGS = (
    "model.quantization=none",
    "model.compute_dtype=float32",
    "domain.batch_size=2",
    "domain.gradient_accumulation=2",
    # A number that two processes cannot share: the Trainer fills the last batch up with other rows.
    "domain.max_eval_rows=5",
)
SCRIPT = str(ROOT / "train_domain.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def arguments(config, data, output, settings=SETTINGS):
    flags = [word for setting in settings for word in ("--set", setting)]
    return ["--config", str(config), "--data", str(data), "--output", str(output), *flags]


def launcher(configuration):
    """accelerate with two CPU processes and a configuration that is shipped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(ROOT / f"configs/accelerate/{configuration}.yaml")),
        *("--num_processes", "2", "--main_process_port", str(port)),
    ]
    if configuration == "fsdp":
        # Both ask for an accelerator; they are about how the shards are filled, not about training.
        command += ["--fsdp_sync_module_states", "false"]
        command += ["--fsdp_cpu_ram_efficient_loading", "false"]
        command += [str(ROOT / "tests/fsdp_on_cpu.py")]
    return command


def launch(*command, cwd, configuration="ddp"):
    """A script under accelerate, to its end."""
    return subprocess.run(
        [*launcher(configuration), *command],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def data(tiny_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("distributed") / "data"
    succeed(ROOT / "prepare_datasets.py", "--config", tiny_config, "--output", output)
    return output


def losses(checkpoint):
    history = json.loads((checkpoint / "log_history.json").read_text())
    return [
        (entry["step"], key, entry[key])
        for entry in history
        for key in ("loss", "eval_loss")
        if key in entry
    ]


# FSDP with the base in NF4, as its configuration file is made for.
NF4 = tuple(setting.replace("none", "nf4") for setting in SETTINGS)


def largest_difference(one, two):
    """Between two adapters, which must have the same tensors."""
    from safetensors.torch import load_file

    adapters = [load_file(path / "adapter_model.safetensors") for path in (one, two)]
    assert adapters[0].keys() == adapters[1].keys() and len(adapters[0]) == 2 * 6 * 2
    assert all(adapters[0][name].any() for name in adapters[0])
    return max((adapters[0][name] - adapters[1][name]).abs().max() for name in adapters[0])


@pytest.mark.parametrize(("configuration", "settings"), [("ddp", SETTINGS), ("fsdp", NF4)])
def test_two_processes_train_like_one(tiny_config, data, tmp_path, configuration, settings):
    flags = arguments(tiny_config, data, tmp_path / "one", settings)
    succeed(SCRIPT, *flags, cwd=tmp_path, env=ENVIRONMENT)
    flags = arguments(tiny_config, data, tmp_path / "two", settings)
    result = launch(SCRIPT, *flags, cwd=tmp_path, configuration=configuration)
    assert result.returncode == 0, result.stdout + result.stderr
    assert largest_difference(tmp_path / "one", tmp_path / "two") < TOLERANCE
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) >= 8 and [entry[:2] for entry in one] == [entry[:2] for entry in two]
    for (step, key, expected), (_, _, found) in zip(one, two, strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE), (step, key)
    assert one[0][2] != one[1][2], "the loss does not move"

    # One writer, one voice.
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert names[0] == names[1]
    assert not list(tmp_path.glob(".*.partial")) and not list(tmp_path.glob(".*.replaced"))
    assert result.stdout.count("trainable parameters") == 1
    assert result.stdout.count("  domain 1/6") == 1
    assert result.stdout.count("wrote ") == 1
    record = json.loads((tmp_path / "two/stage.json").read_text())
    assert record["metrics"]["steps"] == 6 and record["processes"] == 2
    # The step is made of the same rows, so the tokens of all processes count.
    single = json.loads((tmp_path / "one/stage.json").read_text())
    assert record["metrics"]["tokens"] == single["metrics"]["tokens"]

    if configuration == "ddp":
        # Run again: both processes find it finished.
        again = launch(SCRIPT, *flags, cwd=tmp_path, configuration=configuration)
        assert again.returncode == 0 and again.stdout.count("reused") == 1
    else:
        # A sharded model's checkpoint is gathered by PEFT too: go on from one.
        flags = arguments(tiny_config, data, tmp_path / "killed", settings)
        with subprocess.Popen(
            [*launcher(configuration), SCRIPT, *flags],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            for line in process.stdout:
                if line.strip().startswith("domain 5/6"):
                    for one in psutil.Process(process.pid).children(recursive=True):
                        one.kill()
                    process.kill()
        assert not (tmp_path / "killed").exists()
        resumed = launch(SCRIPT, *flags, cwd=tmp_path, configuration=configuration)
        assert "resuming from checkpoint-3" in resumed.stdout, resumed.stderr
        assert largest_difference(tmp_path / "one", tmp_path / "killed") < TOLERANCE


def test_stage_3_runs_under_fsdp_on_a_16_bit_base(tiny_config, data, tmp_path):
    """Its reference is float32 and frozen, beside a base in bfloat16: units of their own."""
    own = ["--config", str(tiny_config), "--data", str(data)]
    own += ["--set", "model.compute_dtype=bfloat16"]
    parent = None
    for stage in ("domain", "instruction"):
        before = ["--checkpoint", str(parent)] if parent else []
        parent = tmp_path / stage
        command = [ROOT / f"train_{stage}.py", *own, *before, "--output", parent]
        succeed(*map(str, command), cwd=tmp_path, env=ENVIRONMENT)
    command = [str(ROOT / "train_safety.py"), *own, "--checkpoint", str(parent)]
    command += ["--set", "safety.batch_size=2", "--set", "safety.gradient_accumulation=2"]
    succeed(*command, "--output", str(tmp_path / "one"), cwd=tmp_path, env=ENVIRONMENT)
    command += ["--output", str(tmp_path / "two")]
    result = launch(*command, cwd=tmp_path, configuration="fsdp")
    assert result.returncode == 0, result.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [loss for _, _, loss in two] == pytest.approx([loss for _, _, loss in one], rel=0.02)


def test_a_batch_that_cannot_be_shared_is_refused(tiny_config, data, tmp_path):
    settings = (*SETTINGS, "domain.gradient_accumulation=3")
    result = launch(
        str(ROOT / "train_domain.py"),
        *arguments(tiny_config, data, tmp_path / "out", settings),
        cwd=tmp_path,
    )
    assert result.returncode != 0
    assert "cannot be shared by 2 processes" in result.stderr
    assert result.stderr.count("error: domain.gradient_accumulation") == 1


def test_accumulation_is_shared_out(monkeypatch):
    assert distributed.accumulation(16, "domain") == 16
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert distributed.accumulation(16, "domain") == 4
    with pytest.raises(UserError, match=r"Start 1 or 2 or 3 or 6 processes"):
        distributed.accumulation(6, "domain")


def test_one_process_needs_no_network(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.is_main() and distributed.world_size() == 1
    assert distributed.on_main(lambda a: a + 1, 1) == 2
    assert distributed.main_first(lambda a: a + 1)(1) == 2
    distributed.barrier()


ERRORS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from liteguard import distributed
from liteguard.errors import UserError
calls = []
assert distributed.on_main(lambda: calls.append(1) or "result") == "result"
assert len(calls) == (1 if distributed.is_main() else 0)
def fill():
    open("order", "a").write(str(distributed.rank()))
distributed.main_first(fill)()
distributed.barrier()
assert open("order").read() == "01"
# One that comes late finds the file written, and joins the others all the same.
once = Path("once")
time.sleep(distributed.rank())
for _ in range(2):
    distributed.write_once(once, lambda: once.open("a").write("written "))
assert once.read_text() == "written "
assert distributed.on_main(lambda: "after") == "after"
# A main process that works for an hour is waited for.
import torch
group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
assert group.options._timeout.total_seconds() > 12 * 3600
del group  # or its threads outlive the interpreter
def fail():
    raise UserError("only the main process saw this")
try:
    distributed.on_main(fail)
except UserError as error:
    open(f"seen-{{distributed.rank()}}", "w").write(str(error))
distributed.barrier()
# Gloo's threads must not outlive the interpreter: on a busy machine that ends in abort().
torch.distributed.destroy_process_group()
"""


def test_results_and_errors_of_the_main_process_reach_all(tmp_path):
    (tmp_path / "check.py").write_text(ERRORS.format(root=str(ROOT)))
    result = launch("check.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        assert (tmp_path / f"seen-{rank}").read_text() == "only the main process saw this"


def test_fsdp_rounds_neither_buffers_nor_sums_of_gradients():
    """Rotary frequencies of 8 bits are another model than the one that the adapter ships with."""
    import torch
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.buffer_dtype == torch.bfloat16
    distributed.keep_precision_under_fsdp(plugin)
    for _ in range(2):
        policy = plugin.mixed_precision_policy
        assert policy.param_dtype == torch.bfloat16
        assert policy.buffer_dtype == policy.reduce_dtype == torch.float32
        # As transformers does for a quantized base, after this.
        plugin.set_mixed_precision(torch.bfloat16, override=True)


def test_accelerate_configurations_are_complete():
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    for name in ("ddp", "fsdp"):
        path = ROOT / f"configs/accelerate/{name}.yaml"
        loaded = load_config_from_file(str(path))
        assert isinstance(loaded, ClusterConfig) and loaded.num_processes == 2
        # The scripts choose the precision; accelerate must not choose another.
        assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"


def test_fsdp_stores_nf4_in_the_compute_dtype_and_places_the_model_itself(tiny_phi, monkeypatch):
    import torch
    import transformers

    from liteguard import models
    from liteguard.config import build, read_yaml

    config = build([("phi-2", read_yaml(ROOT / "configs/phi-2.yaml"))])
    seen = {}

    class Reached(BaseException):
        pass

    def from_pretrained(directory, **options):
        seen.update(options)
        raise Reached

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    for fsdp, storage in (("false", torch.uint8), ("true", torch.bfloat16)):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", fsdp)
        with pytest.raises(Reached):
            models.load_base(config, str(tiny_phi), None, torch.bfloat16, quantize=True)
        assert seen["quantization_config"].bnb_4bit_quant_storage == storage
        assert (seen["device_map"] is None) == (fsdp == "true")


def test_an_adapter_file_without_all_of_its_matrices_is_an_error(tmp_path):
    import peft
    import torch
    from safetensors.torch import load_file, save_file

    from liteguard.errors import WorkError
    from liteguard.training.stage import check_saved_adapter

    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    check_saved_adapter(model, path)
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)
    with pytest.raises(WorkError, match="has 3 LoRA matrices, but 2 layers were trained"):
        check_saved_adapter(model, path)
