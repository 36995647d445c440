"""A run that is killed anywhere and started again ends with the same bits as one that was not.

The runs are children of one process that has imported everything and computed nothing, so that a kill costs no import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import json, os, random, signal, sys, warnings
import torch
torch.set_num_threads(1)
import zoo
import tiny_images, tiny_runs
from zoo.train import checkpoint, folder, loop, recipe
import zoo.train.api

STAGES = [
    {"kind": "align", "budget": {"tokens": 32 * 9}, "length": 16, "lr": 1e-3},
    {"kind": "distill", "budget": {"tokens": 32 * 12}, "length": 16, "lr": 1e-3, "epochs": 2, "ema": 0.5,
     "train": "all", "accumulate": 2},
    {"kind": "finetune", "budget": {"tokens": 32 * 7}, "length": 16, "lr": 1e-3, "precision": "fp32"},
]

IMAGES = {"batch_size": 4, "lr": 1e-3, "augment": {"crop": 2, "flip": True}}
IMAGE_STAGES = [
    {"kind": "align", "budget": {"images": 4 * 7}, **IMAGES},
    {"kind": "distill", "budget": {"images": 4 * 12}, "epochs": 2, "ema": 0.5, "train": "all", "accumulate": 2,
     "loss": {"kl": 1.0, "mixer": 1.0}, **IMAGES},
    {"kind": "finetune", "budget": {"images": 4 * 7}, "label_smoothing": 0.1, "precision": "fp32", **IMAGES},
]

def text():
    teacher = tiny_runs.make_teacher(embedding_dropout=0.1)
    return tiny_runs.make_student(teacher), teacher, tiny_runs.make_texts(), tiny_runs.TOKENIZER, STAGES

def images():
    teacher = tiny_images.make_classifier(embedding_dropout=0.1)
    return tiny_images.make_scan_student(teacher), teacher, tiny_images.make_images(30), None, IMAGE_STAGES

def run(out, kill_at):
    count = 0
    def event():
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    def watched(owner, name):
        function = getattr(owner, name)
        def call(*args, **kwargs):
            event()
            return function(*args, **kwargs)
        setattr(owner, name, call)
    for owner, names in [(checkpoint, ["_fsync", "save_file"]), (checkpoint.os, ["rename"]), (folder.os, ["replace"]),
                         (checkpoint.shutil, ["rmtree"]), (loop.StageLoop, ["_step", "_guide"])]:
        for name in names:
            watched(owner, name)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    student, teacher, data, tokenizer, stages = {"text": text, "images": images}[sys.argv[5]]()
    random.seed(1)
    zoo.distill(student, teacher, data=data, tokenizer=tokenizer, stages=stages, out=out,
                checkpoints=recipe.Checkpoints(every_steps=2, keep=2), progress=False, eval_tokens=32)
    with open(out + ".events", "w") as file:
        file.write(str(count))

def child(out, kill_at):
    pid = os.fork()
    if pid == 0:
        try:
            run(out, kill_at)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

whole, killed, seed, kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
codes = [child(whole, 0)]
events = int(open(whole + ".events").read()) if codes == [0] else 0
rng = random.Random(seed)
codes += [child(killed, rng.randrange(1, max(4, events // 3))) for _ in range(kills)]
codes.append(child(killed, 0))
print(json.dumps({"codes": codes, "events": events}))
"""


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


def rows(folder):
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    clocks = ("tokens_per_second", "cpu_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("text", 0), ("images", 0), *(pytest.param(k, 1, marks=pytest.mark.slow) for k in ("text", "images"))],
)
def test_killed_anywhere_the_run_ends_with_the_same_bits(tmp_path, kind, seed):
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, whole, killed, str(seed), "9" if kind == "text" else "4", kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["codes"][0] == report["codes"][-1] == 0, done.stderr
    assert set(report["codes"][1:-1]) <= {-9, 0}, done.stderr  # killed, or complete: nothing else may happen
    assert -9 in report["codes"]
    assert report["events"] > 100
    assert weights(whole) == weights(killed)
    assert rows(whole) == rows(killed)
    summaries = [json.loads((Path(f) / "train.json").read_text()) for f in (whole, killed)]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
    assert not [p for f in (whole, killed) for p in Path(f).rglob("*tmp-*")]
