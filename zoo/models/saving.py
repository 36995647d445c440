"""How a model is saved, and published on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OF_PUSH = ("repo_id", "private", "commit_message", "revision", "create_pr", "token", "endpoint")


class Saving:
    """Goes before transformers' `PreTrainedModel` among the bases of a model."""

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish this model as `zoo.push` does, with its options; the address of the commit or pull request."""
        from zoo.hub.push import push

        if "commit_message" in options:  # as transformers names it
            options["message"] = options.pop("commit_message")
        if options.get("private", False) is None:  # as transformers says "by default"
            del options["private"]
        pushed = push(self, repo_id, **options)
        if pushed.commit is None:
            return pushed.url
        return pushed.pull_request or f"{pushed.url}/commit/{pushed.commit}"

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers does; the weights get the permissions that the config has, not those of a private file."""
        to_hub = kwargs.pop("push_to_hub", False)
        options = {key: kwargs.pop(key) for key in OF_PUSH if to_hub and key in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        config = Path(save_directory) / "config.json"
        for file in Path(save_directory).glob("*.safetensors") if config.is_file() else ():
            file.chmod(config.stat().st_mode)
        if to_hub:
            self.push_to_hub(options.pop("repo_id", Path(save_directory).name), **options)
