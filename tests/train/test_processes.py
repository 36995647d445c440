"""Two processes with half the batch each take the same steps as one with the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

DRIVER = """
import sys
import torch
torch.set_num_threads(1)
import zoo
from tiny_runs import TOKENIZER, make_student, make_teacher, make_texts
from zoo.train.recipe import Checkpoints

teacher = make_teacher()
stage = {"kind": "distill", "budget": {"tokens": 384}, "length": 16, "lr": 1e-3, "batch_size": int(sys.argv[2]),
         "precision": "fp32", "packing": "joined", "train": "all", "ema": 0.5}
zoo.distill(make_student(teacher), teacher, data=make_texts(), tokenizer=TOKENIZER, stages=[stage], out=sys.argv[1],
            progress=False, eval_tokens=64, checkpoints=Checkpoints(every_steps=2))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_are_one_larger_batch(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for extra, name, size in (([], "one", "4"), (launcher, "two", "2")):
        command = [sys.executable, *extra, str(tmp_path / "driver.py"), str(tmp_path / name), size]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
