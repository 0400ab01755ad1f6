"""Files are whole or absent: a failure leaves what was there, a success replaces it, nothing temporary stays."""

import pytest

from decaf_hf.files import DamagedError, append_line, is_empty, parse_json, read_json, write_folder, write_text

from .tiny_recipe import tree


def test_a_failing_block_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "old").write_text("old", encoding="utf-8")
    before = tree(tmp_path)

    def fill():
        with write_folder(folder) as new:
            (new / "half").write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert tree(tmp_path) == before


def test_a_failing_block_leaves_no_new_folder(tmp_path):
    with pytest.raises(OSError, match="full"), write_folder(tmp_path / "a" / "adapter"):
        raise OSError("the disk is full")
    assert list((tmp_path / "a").iterdir()) == []


def test_success_replaces_the_whole_folder(tmp_path):
    folder = tmp_path / "adapter"
    for name in ("first", "second"):
        with write_folder(folder) as new:
            assert new != folder
            (new / name).write_text(name, encoding="utf-8")
    assert tree(tmp_path) == {"adapter": None, "adapter/second": b"second"}


def test_what_a_killed_run_left_does_not_get_in(tmp_path):
    folder = tmp_path / "adapter"
    for left in (".adapter.new", ".adapter.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "stale").write_text("stale", encoding="utf-8")
    folder.mkdir()
    with write_folder(folder) as new:
        (new / "fresh").write_text("fresh", encoding="utf-8")
    assert tree(tmp_path) == {"adapter": None, "adapter/fresh": b"fresh"}


def test_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "summary.json"
    write_text(path, "one\n")
    write_text(path, "zwei \N{SNOWMAN}\n")
    assert tree(tmp_path) == {"deep": None, "deep/summary.json": "zwei \N{SNOWMAN}\n".encode()}

    def no_space(_):
        raise OSError("the disk is full")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="full"):
        write_text(path, "three\n")
    assert path.read_text(encoding="utf-8") == "zwei \N{SNOWMAN}\n"
    assert [left.name for left in path.parent.iterdir()] == ["summary.json"]


def test_lines_are_appended(tmp_path):
    for number in range(3):
        append_line(tmp_path / "metrics.jsonl", str(number))
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == "0\n1\n2\n"


def test_what_a_killed_writer_left_is_nothing(tmp_path):
    assert is_empty(tmp_path)
    (tmp_path / ".recipe.yaml.new").write_text("half", encoding="utf-8")
    (tmp_path / ".consensus.old").mkdir()
    (tmp_path / ".lock").touch()
    assert is_empty(tmp_path)
    (tmp_path / ".bashrc").write_text("mine", encoding="utf-8")
    assert not is_empty(tmp_path)


DAMAGED = {
    "": "no JSON",
    "{": "no JSON",
    "[1] 2": "no JSON",
    100_000 * "[": "more than 50 levels",
    "[" * 60 + "]" * 60: "more than 50 levels",
    '{"a": ' * 60 + "1" + "}" * 60: "more than 50 levels",
    '{"a": 1, "b": 2, "a": 3}': "'a' is there twice",
    '{"a": NaN}': "NaN is not a finite number",
    '{"a": [-Infinity]}': "-Infinity is not a finite number",
    '{"a": 1e999}': "1e999 is not a finite number",
    '{"a": ' + 400 * "9" + "}": "is too large a number",
    '{"a": "\\ud800"}': "half a character",
}


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:12])
def test_fault_b7_json_is_read_strictly(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DamagedError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path} is damaged: ")
    assert DAMAGED[text] in str(error.value)


def test_fault_b7_what_is_no_mapping_no_text_or_no_plain_file(tmp_path):
    path = tmp_path / "a.json"
    for content, told in ((b"[]", "a mapping is expected"), (b"\xff", "not UTF-8"), (b"\xef\xbb\xbf{}", "BOM")):
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=told):
            read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="no plain file"):
        read_json(path)
    (tmp_path / "endless.json").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="no plain file"):
        read_json(tmp_path / "endless.json")


def test_a_score_may_be_no_number_where_that_is_meant():
    assert str(parse_json('{"a": [NaN, Infinity, 1e999, "\\ud83d\\ude00"]}', finite=False)) == (
        "{'a': [nan, inf, inf, '\N{GRINNING FACE}']}"
    )
