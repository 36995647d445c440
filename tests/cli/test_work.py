"""zoo convert, distill, train, score, generate: real runs on a tiny teacher, and what bad input is answered with."""

from __future__ import annotations

import json

import pytest
import yaml

import zoo

RECIPE = {
    "mixer": "linear_attention+window",
    "mixer_options": {"window": 8},
    "keep": "uniform:1/4",
    "held_out": 0.2,
    "stages": [
        {"kind": "align", "budget": {"tokens": 512}, "length": 32, "batch_size": 2, "lr": 1e-3},
        {"kind": "distill", "budget": {"tokens": 512}, "length": 32, "batch_size": 2, "lr": 1e-3},
    ],
}


@pytest.fixture
def recipe(tmp_path, teacher, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "teacher": str(teacher), "data": str(text)}))
    return path


def test_convert(run, teacher, text, tmp_path):
    ran = run(
        "convert", teacher, "--mixer", "retention+window", "-o", "window=8", "--option", "sinks=1", "--keep", "0,3",
        "--data", text, "--length", 64, "--tokens", 512, "--out", "student",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "2 of 4 layers converted to retention+window, keep=0,3" in ran.out
    config = zoo.create_model(str(tmp_path / "student")).config
    assert config.mixer_names == ["attention", "windowed_linear", "windowed_linear", "attention"]
    assert [config.layers[1]["mixer"][key] for key in ("window", "sinks")] == [8, 1]
    assert "saved in student" in ran.err


def test_convert_as_json_and_overwrite(run, teacher, tmp_path):
    args = ["convert", teacher, "--mixer", "sliding_window", "--no-calibrate", "--out", "student", "--json"]
    report = run(*args).json()
    assert report["out"] == "student"
    assert [layer["mixer"] for layer in report["layers"]] == ["sliding_window"] * 4
    assert "student: exists and is not empty" in run(*args).error
    assert run(*args, "--overwrite").code == 0


def test_convert_without_a_mixer_is_exact(run, teacher, tmp_path):
    ran = run("convert", teacher, "--out", "exact")
    assert ran.code == 0, ran.err
    assert "imported exactly" in ran.out
    assert zoo.create_model(str(tmp_path / "exact")).config.mixer_names == ["attention"] * 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mixer", "retnetion"], "unknown mixer 'retnetion'; did you mean 'retention'"),
        (["--mixer", "retention", "-o", "gat=true"], "mixer.gat: unknown key"),
        (["--mixer", "sliding_window", "-o", "window=many"], "mixer.window: "),
        (["--mixer", "sliding_window", "-o", "window"], "--option 'window': write key=value"),
        (["--mixer", "sliding_window", "-o", "window=[1"], "--option 'window=[1': cannot read the value"),
        (["--mixer", "sliding_window", "--keep", "unifrm:1/3"], "keep: "),
        (["--mixer", "sliding_window", "--keep", "9"], "keep: there is no attention layer 9"),
        (["--mixer", "sliding_window", "--data", "none.txt"], "no file matches 'none.txt'"),
        (["--mixer", "sliding_window", "--data", "hf:a", "--data", "b.txt"], "--data hf:a: a data set stands alone"),
        (["--keep", "none"], "keep='none' says which layers keep attention, but no mixer"),
    ],
)
def test_convert_refuses(run, teacher, tmp_path, args, message):
    assert run("convert", teacher, *args, "--out", "student").error.startswith(message)
    assert not (tmp_path / "student").exists()


def test_convert_of_nothing(run):
    assert "nothing/here" in run("convert", "./nothing/here", "--mixer", "mamba2", "--out", "student").error


def test_distill_then_score(run, recipe, tmp_path):
    ran = run("distill", recipe, "out=run", "stages.1.lr=5e-4")
    assert ran.code == 0, ran.err
    assert [line.split()[0] for line in ran.out.splitlines()] == ["kind", "align", "distill"]
    assert zoo.create_model(str(tmp_path / "run")).config.mixer_names.count("windowed_linear") == 3
    again = run("distill", recipe, "out=run", "stages.1.lr=5e-4", "--json").json()
    assert [stage["tokens"] for stage in again["stages"]] == [512, 512]
    assert "run: holds another run" in run("distill", recipe, "out=run", "seed=1").error
    assert run("distill", recipe, "out=run", "seed=1", "--overwrite").code == 0

    args = ["--length", 32, "--tokens", 128, "--quick", "--no-speed"]
    scored = run("score", "run", *args, "--json").json()
    assert [row["role"] for row in scored["rows"]] == ["teacher", "untrained", "student"]
    assert scored["rows"][2]["train_tokens"] == 1024
    assert json.loads((tmp_path / "run" / "score.json").read_text())["rows"] == scored["rows"]
    shown = run("score", "run", *args, "--out", "elsewhere")
    assert "perplexity" in shown.out
    assert (tmp_path / "elsewhere" / "score.json").is_file()


def test_train(run, text, tmp_path):
    args = ["train", "pretrain-tiny", f"data={text}", "stages.0.budget.tokens=512", "stages.0.length=32"]
    ran = run(*args, "out=tiny", "eval_tokens=0")
    assert ran.code == 0, ran.err
    assert "pretrain" in ran.out
    assert zoo.create_model(str(tmp_path / "tiny")).config.mixer_names == ["retention"] * 2
    assert "does not say what it was made from" in run("score", "tiny", "--data", text).error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["distill", "quik"], "no recipe 'quik'; did you mean 'quick'?"),
        (["distill", "quick"], "out: this key is needed; name a folder"),
        (["distill", "quick", "teacher=null", "mixer=null", "out=x"], "teacher: this key is needed"),
        (["distill", "quick", "out=x", "lr"], "'lr': write key.path=value"),
        (["train", "quick", "stages.0.lrr=1"], "stages.0.lrr: unknown key; did you mean 'lr'"),
        (["train", "quick", "stages.9.lr=1"], "stages.9: expected a number from 0 to"),
        (["train", "pretrain-tiny", "out=x"], "data: this key is needed"),
        (["train", "pretrain-tiny", "out=x", "data=none/*.txt"], "no file matches 'none/*.txt'"),
        (["train", "pretrain-tiny", "out=x", "data=d.txt", "model=retnt-tiny"], "unknown model 'retnt-tiny'"),
        (["score", "nowhere"], "nowhere: no such folder"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such folder"),
    ],
)
def test_bad_input(run, tmp_path, args, message):
    (tmp_path / "d.txt").write_text("some text " * 200)
    assert run(*args).error.startswith(message)


def test_score_needs_text_and_a_teacher(run, student, teacher, text, tmp_path):
    assert "no run here that held anything out; name data with --data" in run("score", student).error
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in run("score", student, "--data", "empty.txt").error
    (tmp_path / "latin.txt").write_bytes("d\xe9j\xe0 vu".encode("latin-1"))
    assert "latin.txt" in run("score", student, "--data", "latin.txt").error
    args = ["--against", teacher, "--data", text, "--length", 32, "--tokens", 64, "--quick", "--no-speed"]
    scored = run("score", student, *args, "--json", "--out", "o").json()
    assert [row["role"] for row in scored["rows"]] == ["teacher", "student"]


def test_generate(run, student):
    args = ["generate", student, "--prompt", "the cat", "--max-new-tokens", 8]
    ran = run(*args)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("the cat")
    assert "tokens/s" in ran.err
    made = run(*args, "--json").json()
    assert ran.out.rstrip("\n") == "the cat" + made["text"].rstrip("\n")
    assert made["tokens"] <= 8
    sampled = [run(*args, "--temperature", 3, "--top-p", 0.9, "--seed", seed, "--json").json() for seed in (0, 0, 1)]
    assert sampled[0]["text"] == sampled[1]["text"] != sampled[2]["text"]
    assert run(*args, "--beams", 3).out.startswith("the cat")


def test_generate_agrees_with_the_library(run, student):
    made = run("generate", student, "--prompt", "the cat", "--max-new-tokens", 6, "--json").json()
    from zoo.cli.common import load_tokenizer

    model, tokenizer = zoo.create_model(str(student)).eval(), load_tokenizer(student)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    assert made["text"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generate_with_a_chat_template(run, student, tmp_path):
    import shutil

    assert "its tokenizer has no chat template" in run("generate", student, "--prompt", "x", "--chat").error
    shutil.copytree(student, "chatty")
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
    args = ["generate", "chatty", "--max-new-tokens", 4, "--json", "--prompt"]
    assert run(*args, "hi", "--chat").json()["text"] == run(*args, "<user>hi<bot>").json()["text"]


def test_generate_refuses(run, student, tmp_path):
    zoo.create_model("bert-tiny").save_pretrained(tmp_path / "encoder")
    zoo.create_model("retnet-tiny", vocab_size=50).save_pretrained(tmp_path / "small")
    zoo.create_model("retnet-tiny").save_pretrained(tmp_path / "bare")
    assert "masked-lm model, which does not generate" in run("generate", "encoder", "--prompt", "x").error
    assert "bare: no tokenizer in it; name one" in run("generate", "bare", "--prompt", "x").error
    assert run("generate", "bare", "--prompt", "x", "--tokenizer", "bytes", "--max-new-tokens", 2).code == 0
    assert "the model's vocabulary has 50" in run("generate", "small", "--prompt", "x", "--tokenizer", "bytes").error
    assert "--prompt is empty" in run("generate", student, "--prompt", "").error
    assert (
        "tokenizer './none' cannot be loaded"
        in run("generate", student, "--prompt", "x", "--tokenizer", "./none").error
    )
