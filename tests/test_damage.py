"""Random damage to the files that users write: what is left is right, or refused in one line; never a traceback."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from decaf_hf import evaluation
from decaf_hf.adapters import CONSENSUS, add_agents, save_adapter, trainable
from decaf_hf.errors import DecafError
from decaf_hf.mixing import check_mixing, mixing_schedule
from decaf_hf.recipe import MOST_BYTES, read_recipe, resolved_yaml

from . import tiny
from .test_recipe import RECIPES, SMALLEST

AGENTS = 5
RING = mixing_schedule("ring", AGENTS).matrix(1).numpy()
# What YAML, JSON, numbers and paths take in another way than one thinks.
NASTY = [
    b"!!python/object/apply:os.system [id]", b"!!binary ", b"&a [*a]", b"*a", b"<<: ", b"${name}", b"${oc.env:NONE}",
    b"${", b"???", b"\x00", b"\xff", b"\xef\xbb\xbf", b"\r", b"\t", b"\n", b"\n- ", b"{", b"}", b"[" * 300, b"]", b"'",
    b'"', b": ", b"? ", b"| ", b"%YAML 9.9\n", b"---\n", b"...\n", b"#", b"null", b"~", b"true", b"-1", b"0", b"1e999",
    b"-.inf", b".nan", b"NaN", b"9" * 400, b"0x10", b"1:30", b"2001-01-01", b"../", b"/", b",", b" 0 0\n", b"4 9\n",
]  # fmt: skip
piece = st.one_of(st.sampled_from(NASTY), st.binary(max_size=8), st.just(b""))


@st.composite
def damaged(draw, contents):
    """One of the contents with one to three places overwritten, cut out or put in."""
    content = draw(contents)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + draw(st.sampled_from([0, 1, 8, 200])))))
        content = content[:start] + draw(piece) + content[end:]
    return content


def refusal(use) -> str | None:
    """With what line something is refused, if it is."""
    try:
        use()
    except DecafError as error:
        return str(error)
    return None


def check(path: Path, use) -> None:
    """Use a damaged file; if it is refused, then in one line that names it or what it is for."""
    line = refusal(use) or str(path)
    assert "\n" not in line
    assert any(word in line for word in (str(path), "network.", "mixing matrix"))


often = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@often
@given(content=damaged(st.sampled_from([SMALLEST.encode(), *(path.read_bytes() for path in RECIPES)])))
def test_a_damaged_recipe_is_refused_or_survives_its_resolved_form(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)

    def use():
        recipe = read_recipe(path)
        path.write_text(resolved_yaml(recipe), encoding="utf-8")
        assert read_recipe(path) == recipe

    check(path, use)


@often
@given(
    key=st.sampled_from(["name", "network.agents", "lora", "data.source", "training.learning_rate", "a.b", ""]),
    value=damaged(st.just(b"0.5")),
)
def test_a_damaged_override_is_refused_or_used(tmp_path, key, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALLEST, encoding="utf-8")
    override = f"{key}={value.decode('utf-8', 'surrogateescape')}"
    assert "\n" not in (refusal(lambda: read_recipe(path, [override])) or "")


@often
@given(content=damaged(st.just(b"0 1\n1 2\n# the way back\n2,3\n3 4\n4 0\n")))
def test_a_damaged_file_of_edges(tmp_path, content):
    path = tmp_path / "edges.txt"
    path.write_bytes(content)
    check(path, lambda: check_mixing(mixing_schedule(str(path), AGENTS).matrix(1)))


def matrix_file(suffix: str, path: Path) -> bytes:
    if suffix == ".npy":
        np.save(path, RING)
    elif suffix == ".json":
        path.write_text(json.dumps(RING.tolist()))
    else:
        np.savetxt(path, RING, delimiter="," if suffix == ".csv" else " ")
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".txt", ".json"])
@often
@given(data=st.data())
def test_a_damaged_mixing_matrix(tmp_path, suffix, data):
    path = tmp_path / f"matrix{suffix}"
    path.write_bytes(data.draw(damaged(st.just(matrix_file(suffix, path)))))
    check(path, lambda: check_mixing(mixing_schedule(str(path), AGENTS, "explicit").matrix(1)))


def test_what_is_too_large_for_a_recipe_is_not_read(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(SMALLEST.encode() + b"#" * (MOST_BYTES - len(SMALLEST)))
    read_recipe(path)
    with open(path, "ab") as file:
        file.write(b"#")
    with pytest.raises(DecafError, match=r"recipe\.yaml: more than 1 MiB"):
        read_recipe(path)
    with pytest.raises(DecafError, match=r"/dev/zero: more than 1 MiB"):
        read_recipe("/dev/zero")


def test_aliases_that_multiply_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    lines = [f"x{level}: &x{level} [{', '.join([f'*x{level - 1}'] * 9)}]" for level in range(1, 12)]
    path.write_text("\n".join([SMALLEST, "x0: &x0 [y]", *lines]), encoding="utf-8")
    with pytest.raises(DecafError, match="expansion exceeds"):
        read_recipe(path)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [echo]", "!!python/name:os.system ''", "!mine x"])
def test_tags_make_no_objects(tmp_path, tag):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALLEST.replace("some/model", tag), encoding="utf-8")
    with pytest.raises(DecafError, match="could not determine a constructor for the tag"):
        read_recipe(path)


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "a\x00b"])
def test_a_name_stays_in_its_folder(tmp_path, name):
    path = tmp_path / "recipe.yaml"
    path.write_text(SMALLEST.replace("name: small", f"name: {json.dumps(name)}"), encoding="utf-8")
    with pytest.raises(DecafError, match="may hold only ASCII letters"):
        read_recipe(path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A saved adapter."""
    folder = tmp_path_factory.mktemp("adapter") / "consensus"
    model = add_agents(tiny.bert(), tiny.lora(), [0], freeze_a=False)
    save_adapter(folder, trainable(model, CONSENSUS), model.peft_config[CONSENSUS])
    return folder


@settings(often, max_examples=50)
@given(data=st.data())
def test_a_damaged_adapter_is_refused_or_loads(adapter, tmp_path, data):
    folder = tmp_path / "consensus"
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    file.write_bytes(data.draw(damaged(st.just(file.read_bytes()))))

    def use():
        tensors = evaluation._read_adapter("consensus", folder)
        evaluation._load_adapters(tiny.bert(), {CONSENSUS: folder}, {CONSENSUS: tensors})

    check(folder, use)
