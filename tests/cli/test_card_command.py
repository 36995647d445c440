"""zoo card: the card of a run, what is refused and how that is said."""

from __future__ import annotations

import json
import re
import shutil

import yaml


def test_a_run_gets_its_card(run, student, teacher, text, tmp_path):
    shutil.copytree(student, tmp_path / "student")
    assert (
        "no score.json in it, and a card says only what was measured; first: zoo score student"
        in run("card", "student").error
    )
    options = ["--against", teacher, "--data", text, "--length", 32, "--tokens", 64, "--quick", "--no-speed"]
    assert run("score", "student", *options).code == 0
    ran = run("card", "student", "--license", "mit", "--repo", "me/small", "--set", "limits=[It is tiny.]")
    assert ran.code == 0, ran.err
    assert ran.out == "student/README.md: written\n"
    written = (tmp_path / "student" / "README.md").read_text()
    assert yaml.safe_load(written.split("---\n")[1])["license"] == "mit"
    for part in ("hf-hub:me/small", "- It is tiny.", "windowed_linear", "SHA-256 is `"):
        assert part in written, part
    assert run("card", "student", "--json").json() == {"written": ["student/README.md"]}
    assert (tmp_path / "student" / "README.md").read_text() == written
    assert run("card", "student", "--check").out == "student/README.md: says what was measured\n"

    assert run("card", "student", "--set", "repo=null", "--set", "location=./student").code == 0
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "student" / "README.md").read_text(), re.DOTALL)
    assert code[0].count("\n") == 3  # loads in three lines
    names: dict = {}
    exec("\n".join(code), names)
    assert names["model"].config.mixer_names.count("windowed_linear") == 3

    values = json.loads((tmp_path / "student" / "score.json").read_text())
    values["rows"][-1]["kl"] = 0.0
    (tmp_path / "student" / "score.json").write_text(json.dumps(values))
    assert "is not what was measured and recorded here" in run("card", "student", "--check").error
    assert run("card", "student").code == 0
    values["rows"][-1]["weights_sha256"] = "0" * 64
    (tmp_path / "student" / "score.json").write_text(json.dumps(values))
    assert "was measured on other weights (sha256 000000000000" in run("card", "student").error


def test_bad_input(run, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "score.json").write_text(json.dumps({"rows": [{"role": "student", "name": "x"}]}))
    assert run("card", "b").error == "b: no such folder; choose from a"
    assert "card.licence: unknown key; did you mean 'license'" in run("card", "a", "--set", "licence=mit").error
    assert "--set 'x': write key=value" in run("card", "a", "--set", "x").error
    assert "card.repo: expected a repository on the Hub" in run("card", "a", "--repo", "../x").error
    assert "facts belong to one model" in run("card", "a", "a", "--license", "mit").error
    assert "--check writes nothing" in run("card", "a", "--check", "--license", "mit").error
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["score.json"]
