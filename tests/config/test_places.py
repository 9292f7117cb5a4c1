"""Names of files and folders: ``~`` and variables mean the same in flags and configurations of every command."""

import getpass
import os
import sys

import pytest
from doors import refused

from mocov3.cli import parse_embed, parse_finetune, parse_knn, parse_lincls, parse_pretrain
from mocov3.cli.commands import COMMANDS
from mocov3.config.fields import path, write_yaml
from mocov3.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX names")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA_ROOT", "/data/of/mine")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)


def test_what_a_name_means(tmp_path):
    home = str(tmp_path / "home")
    for given, meant in {
        "~": home,
        "~/a b/c": f"{home}/a b/c",
        "$DATA_ROOT/x": "/data/of/mine/x",
        "${DATA_ROOT}x/$HOME": f"/data/of/minex/{home}",
        "fashion-mnist:~/sets": f"fashion-mnist:{home}/sets",
        "~/sets:0.3": f"{home}/sets:0.3",
        f"~{getpass.getuser()}/x": os.path.expanduser(f"~{getpass.getuser()}/x"),
        "a~b/c~": "a~b/c~",
        "./~/x": "./~/x",
        "cost$5": "cost$5",
        "": "",
        "auto": "auto",
    }.items():
        assert path(given) == meant, given
    (tmp_path / "a$DATA_ROOT").mkdir()
    (tmp_path / "b$NOWHERE").mkdir()
    assert path("a$DATA_ROOT") == "a$DATA_ROOT"  # there as it stands
    assert path("b$NOWHERE") == "b$NOWHERE"
    for given, named in {"~nobody-here/x": "~nobody-here", "$NOWHERE/x": "$NOWHERE", "x" * 300: "too long"}.items():
        with pytest.raises(UserError) as error:
            path(given)
        assert named in str(error.value)


@pytest.mark.parametrize(
    ("parse", "fields"),
    [
        (parse_pretrain, ("output_dir", "resume", "init")),
        (parse_finetune, ("output_dir", "resume", "finetune", "data_path")),
        (parse_lincls, ("output_dir", "resume", "pretrained")),
    ],
)
def test_flags_and_configurations_alike(tmp_path, parse, fields):
    (tmp_path / "home").mkdir()
    home = str(tmp_path / "home")
    by_flag = parse(
        [f"--{name}=~/{name}" if "_" not in name else f"--{name.replace('_', '-')}=~/{name}" for name in fields],
        prog="p",
    )
    (tmp_path / "home" / "c.yaml").write_text("".join(f"{name}: $HOME/{name}\n" for name in fields))
    by_file = parse(["--config", "~/c.yaml"], prog="p")
    for name in fields:
        assert getattr(by_flag, name) == getattr(by_file, name) == f"{home}/{name}"
    write_yaml(by_file, tmp_path / "again.yaml", "x")
    again = parse(["--config", str(tmp_path / "again.yaml")], prog="p")
    assert [getattr(again, name) for name in fields] == [getattr(by_file, name) for name in fields]


def test_data_and_models(tmp_path):
    home = str(tmp_path / "home")
    config = parse_pretrain(["~/a:0.5", "$DATA_ROOT"], prog="p")
    assert config.data.split("\n") == [f"{home}/a:0.5", "/data/of/mine"]
    (tmp_path / "c.yaml").write_text("data: [~/a, '${DATA_ROOT}/b']\n")
    assert parse_pretrain(["--config", "c.yaml"], prog="p").data.split("\n") == [f"{home}/a", "/data/of/mine/b"]
    knn = parse_knn(["~/d", "--model=~/m.pth", "--labels=~/l.csv"], prog="p")
    assert (knn.data, knn.model, knn.labels) == tuple(f"{home}/{name}" for name in ("d", "m.pth", "l.csv"))
    assert parse_embed(["d", "-o", "~/x.npy"], prog="p").output == f"{home}/x.npy"


def test_refused_in_one_line(tmp_path):
    (tmp_path / "c.yaml").write_text("output_dir: ~nobody-here/x\n")
    assert "~nobody-here/x: ~nobody-here is no user's folder" in refused("pretrain", "d", "--config", "c.yaml")
    for text in ("12", "[a]", '"a\\0b"', "null"):
        (tmp_path / "c.yaml").write_text(f"output_dir: {text}\n")
        assert "field 'output_dir' must be" in refused("pretrain", "d", "--config", "c.yaml")
    for command, rest in (
        ("inspect", []),
        ("report", []),
        ("pack", ["--out", "o"]),
        ("export", ["--to", "timm", "--output", "o"]),
        ("compare", ["d"]),
        ("verify", ["d"]),
    ):
        assert command in COMMANDS
        assert "$NOWHERE" in refused(command, "$NOWHERE/x", *rest)
        assert "too long" in refused(command, "n" * 300, *rest)
    for argv in (
        ("convert", "--input", "f", "--output", "$NOWHERE/x"),
        ("check", "d", "--sheet", "$NOWHERE/x"),
        ("demo", "--output-dir", "$NOWHERE/x"),
        ("pack", "d", "--out", "$NOWHERE/x"),
    ):
        assert "$NOWHERE" in refused(*argv)
    assert os.listdir(tmp_path) == ["c.yaml"]
