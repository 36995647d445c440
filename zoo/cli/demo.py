"""`zoo demo`: the main job on a real teacher."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def demo(out: Path, minutes: float, mixer: str | None, as_json: bool, overwrite: bool) -> None:
    """Convert, distill, score and use SmolLM2-135M-Instruct; see `zoo.train.demo`."""
    from rich.console import Console

    from zoo.train.demo import MIXER, Demo, DemoOptions

    command = " ".join(["zoo", *sys.argv[1:]])
    options = DemoOptions(
        out=out, minutes=minutes, mixer=mixer or MIXER, overwrite=overwrite, quiet=as_json, command=command
    )
    result = Demo(options, Console(stderr=as_json)).run()
    if as_json:
        print(json.dumps(result.to_json(), indent=2))
