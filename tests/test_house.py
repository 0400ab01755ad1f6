"""The house's own rules: imports point one way, every field has help, every recipe runs, the README
names every module, script and page."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from decaf_hf import DecentralizedConfig
from decaf_hf.recipe import read_recipe

from .tiny_recipe import SECTIONS, command, owned_rows, write_csv, write_images, write_model

ROOT = Path(__file__).parent.parent
FILES = {path.stem: path for path in sorted((ROOT / "decaf_hf").glob("*.py"))}
WORDS = "{art: ' museum', bio: ' gene', law: ' judge'}"
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, `.name` for the package's own; type-checking imports left out."""
    found = set()
    todo = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        statement = todo.pop()
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == "TYPE_CHECKING":
            continue
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom):
            if statement.level and statement.module is None:
                found |= {f".{alias.name}" for alias in statement.names}
            elif statement.level:
                found.add(f".{statement.module}")
            else:
                found |= {statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)}
        todo += list(ast.iter_child_nodes(statement))
    return found


IMPORTS = {name: imports(path) for name, path in FILES.items()}


def own(name: str) -> set[str]:
    return {module.removeprefix(".") for module in IMPORTS[name] if module.startswith(".")}


def importers(library: str) -> set[str]:
    return {
        name
        for name, modules in IMPORTS.items()
        if any(module == library or module.startswith(f"{library}.") for module in modules)
    }


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("errors", set()),
        ("seeds", set()),
        ("files", {"errors"}),
        ("lowrank", set()),
        ("topology", {"errors"}),
        ("mixing", {"errors", "files", "topology"}),
        ("partition", {"errors"}),
        ("algorithms", {"lowrank"}),
        ("sampling", {"seeds"}),
        ("exchange", {"errors", "presence"}),
        ("presence", {"errors"}),
        ("tables", {"errors"}),
        ("labels", {"errors", "tables"}),
        ("data", {"errors", "tables"}),
        ("metrics", {"errors"}),
    ],
)
def test_lower_files_import_nothing_heavier(name, below):
    assert own(name) <= below


def test_mathematics_needs_no_hugging_face_library():
    for name in ("errors", "seeds", "files", "lowrank", "topology", "mixing", "partition", "algorithms"):
        assert not any(name in importers(library) for library in ("transformers", "peft", "datasets", "accelerate"))


def test_imports_have_no_circle():
    todo, done = {name: own(name) - {name} for name in FILES if name != "__init__"}, set()
    while todo:
        ready = {name for name, needs in todo.items() if needs <= done}
        assert ready, f"a circle among {sorted(todo)}"
        done |= ready
        todo = {name: needs for name, needs in todo.items() if name not in ready}


def test_torch_distributed_is_used_in_two_files():
    assert importers("torch.distributed") == {"exchange", "launch"}


def test_peft_is_used_in_few_files():
    heart = {"adapters", "lora_checks", "hosting", "rounds", "trainer"}
    assert importers("peft") == heart | {"tasks", "recipe", "loading", "selfcheck", "evaluation"}


def test_inner_attributes_of_peft_are_touched_in_one_file():
    inner = {"_active_adapter"}
    users = {
        name
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in inner
    }
    assert users == {"hosting"}


def test_every_field_of_the_config_has_help():
    theirs = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    fields = [field for field in dataclasses.fields(DecentralizedConfig) if theirs.get(field.name) != field]
    ours = [field for field in fields if field.name in inspect.get_annotations(DecentralizedConfig)]
    assert len(ours) > 10
    for field in ours:
        words = field.metadata.get("help", "")
        assert words.endswith("."), field.name
        assert len(words) > 20, field.name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_takes_two_steps(path, tmp_path, monkeypatch):
    """On a tiny model of its task, and on samples that are there without the Hub."""
    recipe = read_recipe(path)
    task, data, agents = recipe.model.task, recipe.data, recipe.network.agents
    write_model(tmp_path / "model", task)
    words = [
        f"output_dir={tmp_path / 'out'}",
        f"model.name_or_path={tmp_path / 'model'}",
        "model.gguf_file=null",
        "algorithm.rounds=2",
        "algorithm.local_steps=1",
        "data.text=text",
        "data.label=label",
        "data.labels=null",
        "data.config=null",
        "data.split=train",
        "data.test_split=null",
        "data.test_size=0.2",
        "training.per_device_train_batch_size=2",
        "training.dataloader_num_workers=0",
        "training.bf16=false",
    ]
    words.append(f"data.max_length={32 if task == 'causal-lm' else 8}")
    if task != "text-classification":
        targets = ",".join(SECTIONS[task]["lora"]["target_modules"])
        words.append(f"lora.target_modules=[{targets}]")
    if task == "causal-lm" and recipe.labeled:
        words += ["data.label_words=null", f"data.label_words={WORDS}"]  # in place of the recipe's, not besides
    if task == "image-text":
        words += ["data.label_words=null", "data.label_words={art: museum, bio: gene, law: judge}"]
    if data.validation_size:
        words.append("data.validation_size=0.2")
    owners = [f"owner{agent}" for agent in range(agents)]
    column = data.partition.by
    count = 12 if data.partition.kind != "dirichlet" else 60
    columns = [name for names in recipe.text_columns.values() for name in names if name != "text"]
    if recipe.samples == "images":
        write_images(tmp_path / "images", count=5 * agents)
        words.append(f"data.source={tmp_path / 'images'}")
    elif data.partition.kind == "files":
        for agent in range(agents):
            write_csv(tmp_path / f"{agent}.csv", owned_rows(["x"], count), columns)
        words.append(f"data.source='{tmp_path}/{{agent}}.csv'")
    else:
        write_csv(tmp_path / "all.csv", owned_rows(owners, count), columns)
        words.append(f"data.source={tmp_path / 'all.csv'}")
    if data.partition.kind == "column":
        words.append("data.partition.by=owner")
    elif column is not None:
        words.append("data.partition.by=label")
    if data.test_source is not None:
        write_csv(tmp_path / "test.csv", owned_rows(["x"], 12), columns)
        words.append(f"data.test_source={tmp_path / 'test.csv'}")
    monkeypatch.chdir(ROOT)  # a recipe may name a file of edges as seen from the repository
    code, _, err = command("train", path, *words, "training.disable_tqdm=true")
    assert (code, err) == (0, "")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_says_what_it_is(path):
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_the_readme_names_every_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    others = [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("recipes/offline/*")]
    missing = [path.name for path in [*FILES.values(), *others] if path.name not in text and path.stem != "__init__"]
    assert missing == []
