"""The run configuration: files, overrides, errors. Layer: pure Python, no torch."""

import dataclasses
import pickle
import subprocess
import sys

import pytest

from fusemesh import config
from fusemesh.config import Config
from fusemesh.run.settings import load_config
from fusemesh.tasks.registry import defaults_of
from fusemesh.transformer.config import TransformerConfig
from tests.support import fresh_process

EXAMPLE = """
layout = "dp2 x tp2"
[training]
steps = 7
learning_rate = 1
[run]
sequence_parallel = false
"""


def test_file_and_command_line_name_a_key_alike_and_the_command_line_wins(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(EXAMPLE)
    from_file = config.load(path)
    assert (from_file.layout, from_file.training.steps, from_file.run.sequence_parallel) == ("dp2 x tp2", 7, False)
    assert from_file.training.learning_rate == 1.0 and isinstance(from_file.training.learning_rate, float)
    over = config.load(path, {"training.steps": "9", "run.sequence_parallel": "true", "layout": "fsdp4"})
    assert (over.layout, over.training.steps, over.run.sequence_parallel) == ("fsdp4", 9, True)
    assert over.training.learning_rate == 1.0
    assert over == config.load(None, {"training.steps": "9", "layout": "fsdp4", "training.learning_rate": "1"})


def test_resolved_configuration_loads_back_equal(tmp_path):
    resolved = config.load(
        None,
        {
            "data.path": 'C:\\texts\\"é\n"',
            "training.learning_rate": "1e-5",
            "layout": "tp2",
            "run.keep_checkpoints": "0",
        },
    )
    config.save(resolved, tmp_path / "config.toml")
    assert config.load(tmp_path / "config.toml") == resolved
    assert config.load(base=config.as_dict(resolved)) == resolved
    assert config.load(tmp_path / "config.toml", base=config.as_dict(Config())) == resolved


def test_every_key_says_what_it_means():
    fields = config.fields_of(Config)
    assert len(fields) > 30 and {"layout", "model.hidden_size", "training.steps", "run.directory"} <= fields.keys()
    for key, field in fields.items():
        assert field.doc, key
        assert config.get(Config(), key) == field.default
        assert type(field.default) is field.type, key


def test_the_models_section_is_made_of_the_transformers_fields():
    """A field and its default are stated once; what the data says is no key."""
    sizes = dataclasses.fields(TransformerConfig)
    section = {field.name: field for field in dataclasses.fields(config.ModelConfig)}
    assert section.pop("pretrained").default == ""
    assert section.keys() < {field.name for field in sizes} and not section.keys() & {"vocab_size", "num_classes"}
    for field in sizes:
        if field.name in section and field.default is not dataclasses.MISSING:
            assert section[field.name].default == field.metadata.get("default", field.default), field.name
    # A Transformer of one's own keeps the eps that it has always had.
    assert (TransformerConfig(8, 8, 1, 2, 2, 8, 8).norm_eps, config.ModelConfig().norm_eps) == (1e-6, 1e-5)
    assert pickle.loads(pickle.dumps(Config())) == Config()


WRONG_OVERRIDES = [
    (
        {"trainin.steps": "3"},
        r"trainin\.steps: not a key of the configuration; did you mean training\.steps\?",
    ),
    ({"optimizer.foo": "3"}, r"not a key of the configuration; the keys are: task, layout, model\.pretrained"),
    ({"steps": "3"}, r"steps: not a key .*; did you mean training\.steps\?"),
    ({"training.steps": "many"}, r"--training\.steps: expected a whole number, received 'many'"),
    ({"training.steps": "1.5"}, r"--training\.steps: expected a whole number, received '1\.5'"),
    ({"training.steps": "0"}, r"training\.steps: expected a number of at least 1, received 0"),
    ({"training.learning_rate": "fast"}, r"--training\.learning_rate: expected a number, received 'fast'"),
    ({"training.learning_rate": "nan"}, r"training\.learning_rate: expected a number of at least 0\.0, received nan"),
    ({"training.learning_rate": "inf"}, r"training\.learning_rate: expected a number of at least 0\.0, received inf"),
    ({"training.weight_decay": "-1"}, r"training\.weight_decay: expected a number of at least 0\.0, received -1\.0"),
    ({"training.beta2": "1"}, r"training\.beta2: expected below 1, received 1\.0"),
    (
        {"training.dtype": "fp8"},
        r"training\.dtype: expected one of \('float32', 'bfloat16', 'float64'\), received 'fp8'",
    ),
    ({"training.accumulation": "5"}, r"training\.global_batch_size: expected a multiple of training\.accumulation = 5"),
    ({"run.device": "tpu"}, r"run\.device: expected one of \('auto', 'cpu', 'cuda'\), received 'tpu'"),
    ({"run.backend": "cuda"}, r"run\.backend: expected one of \('auto', 'reference', .*\), received 'cuda'"),
    ({"run.sequence_parallel": "1"}, r"--run\.sequence_parallel: expected true or false, received '1'"),
    ({"model.num_kv_heads": "3"}, r"model\.num_kv_heads: expected a divisor of model\.num_heads = 4, received 3"),
    (
        {"model.hidden_size": "100"},
        r"model\.hidden_size: expected a multiple of 2 \* model\.num_heads = 8 .*received 100",
    ),
    ({"model.num_layers": "0"}, r"model\.num_layers: expected a number of at least 1, received 0"),
    ({"data.sequence_length": "-1"}, r"data\.sequence_length: expected a number of at least 0, received -1"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG_OVERRIDES, ids=[str(case[0]) for case in WRONG_OVERRIDES])
def test_wrong_overrides(overrides, message):
    with pytest.raises(ValueError, match=message):
        config.load(None, overrides)


WRONG_FILES = [
    ("layout = 3", r"layout: expected str, received 3 \(int\)"),
    ("[training]\nsteps = true", r"training\.steps: expected int, received True \(bool\)"),
    ("[training]\nsteps = 1.0", r"training\.steps: expected int, received 1\.0 \(float\)"),
    ("[training]\nspets = 1", r"training\.spets: not a key of the configuration; did you mean training\.steps\?"),
    ("training = 5", r"training: expected a section \[training\], received 5"),
    ("[run]\nsequence_parallel = 1", r"run\.sequence_parallel: expected bool, received 1 \(int\)"),
    ("[optimizer]\nlr = 1", "optimizer: not a key"),
    ("steps = = 1", r"config: '.*wrong\.toml' is not valid TOML"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES, ids=[case[0] for case in WRONG_FILES])
def test_wrong_files(tmp_path, text, message):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.load(path)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"config: expected a TOML file, received '.*absent\.toml': No such file"):
        config.load(tmp_path / "absent.toml")


def test_command_line_starts_without_torch():
    code = (
        "import sys, fusemesh.cli as cli\n"
        "try:\n    cli.main(['--version'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "try:\n    cli.main(['train', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert cli.main(['train', '--training.steps', 'x']) == 2\n"
        "assert not {'torch', 'triton', 'numpy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fusemesh 0.") and "--model.hidden_size" in done.stdout
    assert "fusemesh train: error: --training.steps: expected a whole number, received 'x'" in done.stderr


def test_a_configuration_loads_without_numpy_and_torch(tmp_path):
    """Of every task: its defaults, for which its module is imported, are the run's."""
    (tmp_path / "run.toml").write_text(EXAMPLE)
    fresh_process.run(
        f"""
        import sys
        from fusemesh import config
        from fusemesh.tasks.names import TASKS
        for name in TASKS:
            config.load({str(tmp_path / "run.toml")!r}, {{"task": name}}, base=config.as_dict(config.Config()))
        assert not {{"torch", "triton", "numpy"}} & sys.modules.keys()
        """
    )


def test_a_tasks_defaults_stand_beneath_everything_else(tmp_path):
    defaults = defaults_of("translation")
    assert load_config(None, {"task": "translation"}).training.steps == defaults["training.steps"] != 7
    (tmp_path / "run.toml").write_text('task = "translation"' + EXAMPLE)
    found = load_config(tmp_path / "run.toml", {"evaluation.samples": "3"})
    assert (found.training.steps, found.evaluation.samples) == (7, 3)
    assert found.data.sequence_length == defaults["data.sequence_length"]
    assert load_config(base=config.as_dict(Config(task="translation"))) == Config(task="translation")
    length = defaults_of("language_model")["data.sequence_length"]
    assert load_config() == config.load(None, {"data.sequence_length": str(length)})
    assert config.load() == Config()
    # The length of samples suits the task's own corpus; that of other data is chosen.
    assert load_config(None, {"task": "translation", "data.path": "a.csv"}).data.sequence_length == 0


def test_a_small_learning_rate_alone_still_falls():
    """The default of the end, 3e-4, would be above it."""
    assert load_config(None, {"training.learning_rate": "1e-4"}).training.min_learning_rate == pytest.approx(1e-5)
    assert load_config(None, {"training.learning_rate": "1e-3"}).training.min_learning_rate == 3e-4
    given = {"training.learning_rate": "1e-4", "training.min_learning_rate": "2e-4"}
    saved = load_config(None, given)
    assert saved.training.min_learning_rate == 2e-4 and load_config(base=config.as_dict(saved)) == saved


@pytest.mark.parametrize("load", [config.load, load_config])
def test_an_unknown_task(load):
    with pytest.raises(ValueError, match=r"task: expected one of .*translation.*, received 'poetry'"):
        load(None, {"task": "poetry"})
