"""Recipes: what is read, what is refused and in which words, and the way back to YAML."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from pydantic import BaseModel
from transformers import TrainingArguments

from decaf_hf.algorithms import ALGORITHMS
from decaf_hf.errors import DecafError
from decaf_hf.lora_checks import check_lora_config
from decaf_hf.lowrank import SPLITS
from decaf_hf.optimizer_state import STATES
from decaf_hf.partition import KINDS
from decaf_hf.recipe import (
    REFUSED,
    AlgorithmSection,
    LoraSection,
    PartitionSection,
    Recipe,
    TrainingSection,
    json_schema,
    read_recipe,
    resolved_yaml,
)
from decaf_hf.run import config_of

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))

SMALLEST = """\
name: small
model: {name_or_path: some/model}
data: {source: some/texts}
network: {agents: 3}
algorithm: {rounds: 2}
"""

NO_SIZE = "is neither a share between 0 and 1 nor a whole number of at least 1"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write `x.yaml` into an empty current folder and return its name."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str) -> str:
        Path("x.yaml").write_text(text, encoding="utf-8")
        return "x.yaml"

    return write_text


def refusal(path: str | Path, *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(DecafError) as error:
        read_recipe(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def sections(model: type[BaseModel] = Recipe) -> list[type[BaseModel]]:
    """The model and all sections below it."""
    inner = [field.annotation for field in model.model_fields.values() if isinstance(field.annotation, type)]
    return [model] + [deep for hint in inner if issubclass(hint, BaseModel) for deep in sections(hint)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_the_repository_parses_and_survives_its_resolved_form(path, write):
    recipe = read_recipe(path)
    assert read_recipe(write(resolved_yaml(recipe))) == recipe


def test_quickstart_is_the_run_that_the_documentation_speaks_of():
    recipe = read_recipe(next(path for path in RECIPES if path.name == "quickstart.yaml"))
    assert recipe.lora.model_dump() == {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
    assert recipe.training.model_dump() == {
        "learning_rate": 4e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
    }
    assert (recipe.network.agents, recipe.network.topology, recipe.algorithm.name) == (6, "ring", "decaf")
    assert (recipe.data.partition.kind, recipe.data.partition.alpha) == ("dirichlet", 0.1)
    assert recipe.evaluation.on == "global"  # `on` is true in YAML 1.1


def test_defaults_are_filled_in(write):
    recipe = read_recipe(write(SMALLEST))
    assert (recipe.seed, recipe.checkpoint_rounds, recipe.run_folder) == (0, 1, Path("runs/small"))
    assert (recipe.network.topology, recipe.network.weights) == ("ring", "metropolis")
    assert (recipe.algorithm.name, recipe.algorithm.split, recipe.algorithm.align) == ("decaf", "sqrt", True)
    assert (recipe.data.test_size, recipe.data.validation_size, recipe.data.partition.kind) == (0.2, 0, "iid")
    assert recipe.lora.model_dump() == recipe.training.model_dump() == {}
    assert recipe.lora.r == LoraConfig().r
    assert read_recipe("x.yaml", ["output_dir=elsewhere"]).run_folder == Path("elsewhere")


@pytest.mark.parametrize("empty", ["", "\n# a comment\n"])
def test_empty_file_misses_its_first_field(write, empty):
    assert refusal(write(empty)) == "x.yaml: name: missing (and 4 more)"


def test_empty_section_is_its_defaults(write):
    assert read_recipe(write(SMALLEST + "training:\nlora:\n")) == read_recipe(write(SMALLEST))


# --- numbers, texts and overrides


def test_1e_minus_4_is_a_number_in_file_and_command_line(write):
    recipe = read_recipe(
        write(SMALLEST + "training: {learning_rate: 1e-4, weight_decay: 1}\n"), ["lora.lora_dropout=1e-2"]
    )
    assert (recipe.training.learning_rate, recipe.lora.lora_dropout) == (0.0001, 0.01)
    assert type(recipe.training.weight_decay) is float
    again = read_recipe(write(resolved_yaml(recipe)))
    assert (again.training.learning_rate, again.lora.lora_dropout) == (0.0001, 0.01)


def test_overrides_beat_the_file_and_the_last_one_wins(write):
    overrides = [
        "network.agents=4",
        "network.agents=5",
        "lora.target_modules=[query,value]",
        "data.source=/x/{agent}.csv",
        "evaluation.on=own",
        "name=a-b",
    ]
    recipe = read_recipe(
        write(SMALLEST + "lora: {r: 4, target_modules: all-linear}\nevaluation: {on: global}\n"), overrides
    )
    assert recipe.network.agents == 5
    assert recipe.lora.model_dump() == {"r": 4, "target_modules": ["query", "value"]}
    assert recipe.data.source == "/x/{agent}.csv"
    assert recipe.evaluation.on == "own"
    assert recipe.name == "a-b"
    assert recipe.algorithm.rounds == 2


def test_override_keeps_what_follows_its_first_equals_sign(write):
    assert (
        read_recipe(write(SMALLEST), ["data.source=https://x.org/t.csv?a=1"]).data.source == "https://x.org/t.csv?a=1"
    )


def test_override_of_a_section_keeps_the_rest_of_it(write):
    recipe = read_recipe(write(SMALLEST + "evaluation: {on: own, every_rounds: 3}\n"), ["evaluation={on: global}"])
    assert (recipe.evaluation.on, recipe.evaluation.every_rounds) == ("global", 3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("network.agents='6'", "network.agents: '6' is not a whole number"),
        ("network.agents=6.0", "network.agents: 6.0 is not a whole number"),
        ("network.agents=3.0", "network.agents: 3.0 is not a whole number"),
        ("network.agents=0", "network.agents: 0 must be at least 1"),
        ("network.gossip_steps=0", "network.gossip_steps: 0 must be at least 1"),
        ("network.agents=", "network.agents: null is not a whole number"),
        ("algorithm.rounds=true", "algorithm.rounds: true is not a whole number"),
        ("algorithm.rounds=ten", "algorithm.rounds: 'ten' is not a whole number"),
        ("algorithm.align=1", "algorithm.align: 1 is not true or false"),
        ("algorithm.align='true'", "algorithm.align: 'true' is not true or false"),
        ("seed=-1", "seed: -1 must be at least 0"),
        ("seed=4294967296", "seed: 4294967296 must be at most 4294967295"),
        ("training.learning_rate='1e-4'", "training.learning_rate: '1e-4' is not a number"),
        ("network.link_failure=1", "network.link_failure: 1 must be less than 1"),
        ("training.learning_rate=true", "training.learning_rate: true is not a number"),
        ("training.learning_rate=.nan", "training.learning_rate: nan is not a finite number"),
        ("training.bf16=1", "training.bf16: 1 is not true or false"),
        ("lora.r=8.5", "lora.r: 8.5 is not a whole number or a list (each item a whole number)"),
        ("lora.target_modules=[query,3]", "lora.target_modules: ['query', 3] is not text or a list (each item text)"),
        ("lora.rank_pattern=[1]", "lora.rank_pattern: [1] is not a mapping"),
        ("name=2024", "name: 2024 is not text; put it in quotes"),
        ("data.labels=[yes,no]", "data.labels: true is not text; put it in quotes"),
        ("data.labels=[a,b,a]", "data.labels: 'a' is given twice; name each label once"),
        ("data.source=''", "data.source: empty"),
        ("network=6", "network: 6 is not a mapping"),
        ("name=a/b", "name: 'a/b' may hold only ASCII letters, digits, '.', '_' and '-', not '.' first"),
        ("name=..", "name: '..' may hold only ASCII letters, digits, '.', '_' and '-', not '.' first"),
        ("network.probability=2", "network.probability: 2 must be at most 1"),
        ("data.test_size=1.0", f"data.test_size: 1.0 {NO_SIZE}"),
        ("data.test_size=0", f"data.test_size: 0 {NO_SIZE}"),
        ("data.test_size=true", "data.test_size: true is not a number"),
        ("data.validation_size=-1", f"data.validation_size: -1 {NO_SIZE}"),
        ("evaluation.metrics=[]", "evaluation.metrics: empty"),
        (
            "evaluation.metrics=f1",
            "evaluation.metrics: 'f1' is not a list (each item one of accuracy, f1, perplexity)",
        ),
        (
            "evaluation.metrics=[f1,acuracy]",
            "evaluation.metrics: 'acuracy' is not one of accuracy, f1, perplexity; did you mean 'accuracy'?",
        ),
        (
            "algorithm.name=decav",
            "algorithm.name: 'decav' is not one of local, dlora, dlora-fa, decaf, fedavg, flexlora, centralized; "
            "did you mean 'decaf'?",
        ),
        (
            "model.dtype=float8",
            "model.dtype: 'float8' is not one of float32, bfloat16, float16; did you mean 'float32'?",
        ),
        ("model.name_or_path=???", "model.name_or_path: missing"),
    ],
)
def test_wrong_value_is_refused_in_these_words(write, override, words):
    assert refusal(write(SMALLEST), override) == f"command line: {words}"


@pytest.mark.parametrize("size", ["0.5", "1", "300"])
def test_test_size_is_a_share_or_a_count(write, size):
    value = read_recipe(write(SMALLEST), [f"data.test_size={size}"]).data.test_size
    assert (repr(value), read_recipe("x.yaml", ["data.validation_size=0"]).data.validation_size) == (size, 0)


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("network.topology=rnig", "ring"),
        ("training.lr_scheduler_type=linaer", "linear"),
        ("training.optim=sdg", "sgd"),
        ("lora.init_lora_weights=gausian", "gaussian"),
        ("algorithm.split=sqr", "sqrt"),
    ],
)
def test_misspelt_name_gets_the_nearest_one(write, override, near):
    key, _, value = override.partition("=")
    message = refusal(write(SMALLEST), override)
    assert message.startswith(f"command line: {key}: {value!r} is not ")
    assert message.endswith(f"; did you mean {near!r}?")


@pytest.mark.parametrize("topology", ["star", "graphs/mine", "mine.npy", "mine.edges", "mine.csv"])
def test_topology_is_a_name_or_a_file(write, topology):
    assert read_recipe(write(SMALLEST), [f"network.topology={topology}"]).network.topology == topology


def test_names_with_dots_stay_names(write):
    given = read_recipe(write(SMALLEST), ["lora.rank_pattern={a.b: 4}"])
    assert given.lora.model_dump() == {"rank_pattern": {"a.b": 4}}


@pytest.mark.parametrize("name", ["yes", "no", "on", "off", "null", "1", "0.50", "2024-01-01"])
@pytest.mark.parametrize("key", ["data.label_words", "lora.rank_pattern", "training.lr_scheduler_kwargs"])
def test_fault_d_a_name_that_yaml_reads_as_something_else_is_to_be_quoted(write, name, key):
    section, _, field = key.partition(".")
    lines = {"lora.rank_pattern": "3", "data.label_words": "' x'", "training.lr_scheduler_kwargs": "1"}
    text = SMALLEST if section != "data" else SMALLEST.replace("data: {source: some/texts}\n", "")
    source = ", source: some/texts" if section == "data" else ""
    path = write(f"{text}{section}: {{{field}: {{{name}: {lines[key]}}}{source}}}\n")
    if name != "2024-01-01":  # text here: no dates in recipes
        where = "line 6" if name == "null" and section != "data" else key if name != "null" else "line 5"
        assert refusal(path).startswith(f"x.yaml: {where}: the name ")
        assert refusal(path).endswith(" is not text; put it in quotes")
    quoted = Path(path).read_text(encoding="utf-8").replace(f"{{{name}:", f"{{'{name}':")
    assert "put it in quotes" not in str(try_reading(write(quoted)))


def try_reading(path: str) -> object:
    try:
        return read_recipe(path)
    except DecafError as error:
        return error


HUGE = "1" + 30 * "0"


@pytest.mark.parametrize(
    "key",
    [
        "seed", "checkpoint_rounds", "lora.r", "lora.lora_alpha", "lora.layers_to_transform", "data.max_length",
        "data.shots", "data.test_size", "data.validation_size", "data.split_seed", "network.agents", "network.degree",
        "algorithm.rounds", "training.per_device_train_batch_size", "training.logging_steps",
        "evaluation.every_rounds", "hub.every_rounds",
    ],
)  # fmt: skip
def test_fault_d_numbers_beyond_all_use_are_refused(write, key):
    for number in (HUGE, f"-{HUGE}"):
        message = refusal(write(SMALLEST), f"{key}={number}")
        assert message.startswith(f"command line: {key}: ")
        assert len(message) < 120
    message = refusal(write(SMALLEST), f"lora.rank_pattern={{a: {HUGE}}}")
    assert message.startswith("command line: lora.rank_pattern.a: 1000")


def test_fault_d_which_letters_a_name_may_hold(write):
    assert "'Ünï' may hold only ASCII letters, digits" in refusal(write(SMALLEST), "name=Ünï")


# --- unknown and refused keys, and who is to blame


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("training: {learning_rat: 1}", "training.learning_rat: unknown key; did you mean 'training.learning_rate'?"),
        ("learning_rate: 1", "learning_rate: unknown key; did you mean 'training.learning_rate'?"),
        ("lora: {learning_rate: 1}", "lora.learning_rate: unknown key; did you mean 'training.learning_rate'?"),
        ("rounds: 3", "rounds: unknown key; did you mean 'algorithm.rounds'?"),
        ("evaluation: {rounds: 3}", "evaluation.rounds: unknown key; did you mean 'algorithm.rounds'?"),
        ("topologie: ring", "topologie: unknown key; did you mean 'network.topology'?"),
        ("lora: {rr: 8}", "lora.rr: unknown key; did you mean 'lora.r'?"),
        ("evaluation: {metrik: [f1]}", "evaluation.metrik: unknown key; did you mean 'evaluation.metrics'?"),
        ("zzzzzz: 1", "zzzzzz: unknown key; `decaf schema` lists them"),
        ("1: 1", "1: unknown key; `decaf schema` lists them"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(write, line, words):
    assert refusal(write(f"{SMALLEST}{line}\n")) == f"x.yaml: {words}"


def test_unknown_key_comes_before_the_field_it_was_meant_for(write):
    text = SMALLEST.replace("agents:", "agentz:").replace("rounds: 2", "rounds: ten")
    assert refusal(write(text)) == "x.yaml: network.agentz: unknown key; did you mean 'network.agents'? (and 2 more)"


@pytest.mark.parametrize(
    ("gone", "key"),
    [
        ("model: {name_or_path: some/model}", "model.name_or_path"),
        ("data: {source: some/texts}", "data.source"),
        ("network: {agents: 3}", "network.agents"),
        ("algorithm: {rounds: 2}", "algorithm.rounds"),
        ("name: small", "name"),
    ],
)
def test_missing_field_is_named(write, gone, key):
    assert refusal(write(SMALLEST.replace(gone, ""))) == f"x.yaml: {key}: missing"


def test_fault_is_laid_at_the_door_of_file_or_command_line(write):
    write(SMALLEST.replace("agents: 3", "agents: x"))
    assert refusal("x.yaml").startswith("x.yaml: network.agents: 'x'")
    assert refusal("x.yaml", "seed=1").startswith("x.yaml: network.agents: 'x'")
    assert refusal("x.yaml", "network.agents=y").startswith("command line: network.agents: 'y'")
    assert refusal("x.yaml", "network.agents=3", "network.topologie=ring") == (
        "command line: network.topologie: unknown key; did you mean 'network.topology'?"
    )


@pytest.mark.parametrize("section", list(REFUSED))
def test_fields_that_the_run_sets_are_refused_with_the_reason(write, section):
    for name, reason in REFUSED[section].items():
        message = refusal(write(SMALLEST), f"{section}.{name}=1")
        assert message == f"command line: {section}.{name}: cannot be set in a recipe: {reason}"


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.max_steps", "algorithm.rounds x algorithm.local_steps"),
        ("training.save_steps", "checkpoint_rounds"),
        ("training.eval_strategy", "evaluation.every_rounds"),
        ("training.deepspeed", "an agent lives in one process"),
        ("training.hub_token", "the recipe's hub section"),
        ("lora.task_type", "set by the run"),
    ],
)
def test_reason_of_a_refused_field_says_what_to_do(write, key, words):
    assert words in refusal(write(SMALLEST), f"{key}=1")


# --- partitions and held-out data


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.partition.kind=dirichlet"], "data.partition.alpha: missing; kind dirichlet needs it"),
        (["data.partition.alpha=1"], "data.partition.alpha: only kind dirichlet has it, not iid; set it to null"),
        (["data.partition={kind: dirichlet, alpha: 0}"], "data.partition.alpha: 0 must be more than 0"),
        (["data.partition.kind=column"], "data.partition.by: missing; kind column needs the name of the column"),
        (["data.partition.by=label"], "data.partition.by: kind iid looks at no column; set it to null"),
        (["data.partition.kind=files"], "data.partition.kind: 'files' needs {agent} in data.source"),
        (["data.source=/x/{agent}.csv", "data.partition.kind=iid"], "data.partition.kind: 'iid', but data.source has"),
        (["data.source=/x/{agent}.csv"], "evaluation.on: 'global' needs data.test_source when each agent"),
        (["data.text=x", "data.label=x"], "data.text: 'x' is the column of the labels; name that of the texts"),
        (["data.test_split=train"], "data.test_split: 'train' is what agents train on, and no test of what they"),
        (["data.source=a", "data.test_source=a"], "data.test_source: 'a' is what agents train on, and no test of"),
        (["data.test_source=a", "data.test_split=b"], "data.test_split: a split of data.source; set it or"),
        (["evaluation.on=own", "data.test_split=b"], "data.test_split: evaluation.on is own, which holds out a share"),
        (["evaluation.on=own", "data.test_source=a"], "data.test_source: evaluation.on is own, which holds out a"),
        (["evaluation.split=validation"], "evaluation.split: 'validation' needs data.validation_size, which is 0"),
        (
            ["data.source=/x/{agent}.csv", "data.test_source=a", "data.validation_size=5"],
            "data.validation_size: each agent has its own file",
        ),
    ],
)
def test_values_that_do_not_fit_each_other_are_refused(write, overrides, words):
    assert refusal(write(SMALLEST), *overrides).startswith(f"command line: {words}")


def test_conflict_within_the_file_names_the_file(write):
    text = SMALLEST.replace("some/texts", "some/texts, partition: {kind: column}")
    assert refusal(write(text), "seed=1").startswith("x.yaml: data.partition.by: missing")


@pytest.mark.parametrize("kind", ["classes", "dirichlet"])
def test_partition_by_is_the_label_column_unless_given(write, kind):
    overrides = [f"data.partition.kind={kind}", "data.label=topic"] + ["data.partition.alpha=1"] * (
        kind == "dirichlet"
    )
    assert read_recipe(write(SMALLEST), overrides).data.partition.by == "topic"
    assert read_recipe("x.yaml", [*overrides, "data.partition.by=city"]).data.partition.by == "city"


def test_source_per_agent_is_partitioned_by_files(write):
    recipe = read_recipe(write(SMALLEST), ["data.source=/x/{agent}.csv", "data.test_source=/x/test.csv"])
    assert (recipe.data.partition.kind, recipe.evaluation.on) == ("files", "global")
    assert read_recipe(write(resolved_yaml(recipe))) == recipe


# --- files that are no recipes


def test_missing_file_and_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert refusal("no.yaml") == "no.yaml: no such file; give the path of a recipe"
    assert refusal("folder") == "folder: a folder; give the path of a recipe in it"


def test_file_that_is_not_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_bytes(b"name: \xff\n")
    assert refusal("x.yaml") == "x.yaml: not UTF-8 text (byte 6); save it as UTF-8"


def test_broken_yaml_is_named_by_its_line(write):
    assert refusal(write(SMALLEST + "lora: [1\nseed: 2\n")).startswith("x.yaml: line 7: ")


@pytest.mark.parametrize("text", ["just words", "- a\n- b\n", "5", "null"])
def test_yaml_that_is_no_mapping(write, text):
    assert refusal(write(text)) == "x.yaml: not a recipe: a mapping with keys such as `name: my-run` is expected"


def test_key_given_twice(write):
    assert refusal(write(SMALLEST + "name: other\n")) == "x.yaml: line 6: found duplicate key name"
    assert refusal(write(SMALLEST + "lora: {r: 1, r: 2}\n")) == "x.yaml: line 6: found duplicate key r"


def test_interpolations_are_resolved_or_refused(write):
    assert read_recipe(write(SMALLEST.replace("small", "seed-${seed}") + "seed: 3\n")).name == "seed-3"
    assert (
        refusal(write(SMALLEST + "output_dir: ${nowhere}\n"))
        == "x.yaml: output_dir: Interpolation key 'nowhere' not found"
    )
    assert refusal("x.yaml", "output_dir=${no}") == "command line: output_dir: Interpolation key 'no' not found"
    assert refusal(write(SMALLEST + "output_dir: ${\n")).startswith("x.yaml: ")


@pytest.mark.parametrize("override", ["foo", "network.agents", "=3", ""])
def test_override_without_key_or_equals_sign(write, override):
    assert refusal(write(SMALLEST), override) == f"command line: {override!r} is not of the form section.key=value"


def test_override_that_cannot_be_read_or_set(write):
    assert refusal(write(SMALLEST), "data.source={agent}.csv") == (
        "command line: the value of 'data.source={agent}.csv' is not YAML; "
        "quote the value inside the argument: \"data.source='{agent}.csv'\""
    )
    assert read_recipe("x.yaml", ["data.source='{agent}.csv'", "evaluation.on=own"]).data.source == "{agent}.csv"
    message = refusal(write(SMALLEST + "lora: {target_modules: [a]}\n"), "lora.target_modules[7]=x")
    assert message.startswith("command line: 'lora.target_modules[7]=x' cannot be set: ")


# --- the way back to YAML

words = st.text(min_size=1, max_size=12).filter(lambda text: text != "???")  # OmegaConf's mark for a missing value
TRICKY = [
    "1e-4",
    "yes",
    "on",
    "null",
    "1:30",
    "010",
    "${seed}",
    "\\${seed}",
    "\\\\${a}",
    "a\\",
    "{x}",
    "# no",
    "a: b",
    "\n",
]
tricky = st.sampled_from(TRICKY)
floats = st.floats(min_value=1e-12, max_value=1e12)


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_resolved_yaml_reads_as_an_equal_recipe(tmp_path_factory, data):
    def draw(strategy):
        return data.draw(strategy)

    texts = words.filter(lambda text: "{agent}" not in text) | tricky
    recipe = Recipe.model_validate(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,9}", fullmatch=True)),
            "seed": draw(st.integers(0, 2**32 - 1)),
            "output_dir": draw(st.none() | texts),
            "model": {"name_or_path": draw(texts), "dtype": draw(st.sampled_from(["float32", "bfloat16", None]))},
            "lora": draw(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "r": st.integers(1, 64),
                        "lora_dropout": floats,
                        "target_modules": texts | st.lists(texts),
                        "rank_pattern": st.dictionaries(texts, st.integers(1, 9), max_size=3),
                        "init_lora_weights": st.booleans() | st.just("gaussian"),
                        "layers_to_transform": st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9)),
                    },
                )
            ),
            "data": {
                "source": draw(texts),
                "label": draw(texts),
                "labels": draw(st.none() | st.lists(texts, min_size=1, max_size=4, unique=True)),
                "partition": draw(
                    st.just({})
                    | st.just({"kind": "classes"})
                    | st.fixed_dictionaries({"kind": st.just("dirichlet"), "alpha": floats})
                    | st.fixed_dictionaries({"kind": st.just("column"), "by": texts})
                ),
                "test_size": draw(st.integers(1, 10**6) | st.floats(1e-6, 0.999)),
            },
            "network": {"agents": draw(st.integers(1, 99)), "probability": draw(st.none() | st.floats(0, 1))},
            "algorithm": {"rounds": draw(st.integers(1, 9)), "align": draw(st.booleans())},
            "training": draw(
                st.fixed_dictionaries(
                    {},
                    optional={
                        "learning_rate": floats | st.just(1e-4),
                        "bf16": st.booleans(),
                        "optim": st.just("sgd"),
                        "run_name": st.none() | texts,
                        "lr_scheduler_kwargs": st.dictionaries(texts, floats | texts, max_size=2),
                    },
                )
            ),
            "evaluation": {
                "on": draw(st.sampled_from(["global", "own"])),
                "every_rounds": draw(st.none() | st.just(2)),
            },
        }
    )
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(resolved_yaml(recipe), encoding="utf-8")
    again = read_recipe(path)
    assert again == recipe
    assert again.model_dump() == recipe.model_dump()  # the same fields count as given


def test_text_that_looks_like_something_else_stays_text(write):
    recipe = read_recipe(write(SMALLEST))
    recipe.data.labels = TRICKY
    assert read_recipe(write(resolved_yaml(recipe))).data.labels == TRICKY


def test_resolved_yaml_keeps_the_order_of_the_model_and_only_the_given_library_fields(write):
    text = resolved_yaml(read_recipe(write(SMALLEST + "training: {weight_decay: 0.1, learning_rate: 1e-4}\n")))
    top = [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"]
    assert top == list(Recipe.model_fields)
    assert "training:\n  learning_rate: 0.0001\n  weight_decay: 0.1\n" in text
    assert "lora: {}\n" in text


# --- the models and the schema


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_has_a_description(section):
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not (field.description or "").strip()] == []


@pytest.mark.parametrize(("section", "config"), [(LoraSection, LoraConfig), (TrainingSection, TrainingArguments)])
def test_library_section_has_every_field_of_the_library_or_refuses_it(section, config):
    refused = REFUSED["lora" if config is LoraConfig else "training"]
    fields = {field.name for field in dataclasses.fields(config)}
    assert not set(refused) & set(section.model_fields)
    assert set(section.model_fields) == fields - set(refused)


def test_defaults_of_the_library_pass_their_own_check():
    for section in (LoraSection, TrainingSection):
        defaults = {name: field.get_default(call_default_factory=True) for name, field in section.model_fields.items()}
        assert section.model_validate(defaults).model_dump() == defaults


def test_names_are_those_of_the_modules_that_use_them():
    def names(section: type[BaseModel], field: str) -> tuple[str, ...]:
        return typing.get_args(section.model_fields[field].annotation)

    assert names(AlgorithmSection, "name") == tuple(ALGORITHMS)
    assert names(AlgorithmSection, "split") == tuple(SPLITS)
    assert names(AlgorithmSection, "optimizer_state") == tuple(STATES)
    assert names(PartitionSection, "kind") == tuple(KINDS)


def test_schema_is_json_and_refuses_unknown_keys_in_every_section():
    schema = json.loads(json.dumps(json_schema(), allow_nan=False))
    assert set(schema["properties"]) == set(Recipe.model_fields)
    definitions = schema["$defs"]
    assert set(definitions) == {section.__name__ for section in sections()[1:]}
    for model in [schema, *definitions.values()]:
        assert model["additionalProperties"] is False
        assert model["description"]
        assert all("description" in field or "$ref" in field for field in model["properties"].values())
    assert [kind["type"] for kind in definitions["LoraSection"]["properties"]["r"]["anyOf"]] == ["integer", "array"]
    assert definitions["LoraSection"]["properties"]["lora_dropout"]["type"] == "number"
    assert definitions["TrainingSection"]["properties"]["learning_rate"]["type"] == "number"
    assert set(schema["required"]) == {"name", "model", "data", "network", "algorithm"}


def values(schema: dict) -> list:
    """The values that a field's schema lists by name."""
    own = [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]
    own += [True, False] if schema.get("type") == "boolean" else []
    return own + [value for kind in schema.get("anyOf", []) for value in values(kind)]


def listed(section: str) -> list[tuple[str, Any]]:
    """Every field of a section with each value that the schema lists for it."""
    fields = json_schema()["$defs"][section]["properties"].items()
    return [(name, value) for name, field in fields for value in values(field)]


def test_fault_d_the_schema_lists_only_what_an_adapter_can_be():
    assert {name for name, _ in listed("LoraSection")} > {"bias", "init_lora_weights", "use_dora"}
    for name, value in listed("LoraSection"):
        config = LoraConfig(**LoraSection.model_validate({name: value}).model_dump())
        check_lora_config(config)


def test_fault_d_the_schema_lists_only_what_a_run_can_be_trained_with(write):
    """A package or a device that is missing here may be there elsewhere."""
    elsewhere = ("tf32", "dataloader_persistent_workers", "trackio_static_space_id")
    recipe = read_recipe(write(SMALLEST), ["evaluation.every_rounds=1"])
    for name, value in listed("TrainingSection"):
        if name not in elsewhere:
            training = TrainingSection.model_validate({"use_cpu": True, name: value})
            config_of(recipe.model_copy(update={"training": training}))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_fault_d_recipes_fit_their_schema_as_any_yaml_reader_reads_them(path):
    """PyYAML's reader is of YAML 1.1, to which a bare `on` is true."""
    for text in (path.read_text(encoding="utf-8"), resolved_yaml(read_recipe(path))):
        Recipe.model_validate(yaml.safe_load(text))
