"""`zoo generate`: text from a saved model."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from zoo.cli.common import JsonOption, load_tokenizer, only_json_on_stdout, print_json, quiet_libraries, say


def generate(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A folder of a saved model.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The text to go on from.")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=1 << 20, metavar="N", help="Longest answer, in tokens.")
    ] = 100,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, metavar="T", help="0 takes the likeliest token; above, samples.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, metavar="P", help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    beams: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="Beam search with this many beams.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Ask with the chat template of the tokenizer.")] = False,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the sampling.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="A folder, a Hub name, or bytes. Default: the one saved with the model."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Go on from a prompt. The text goes to stdout as it is made, the speed to stderr."""
    with only_json_on_stdout(as_json):
        import torch

        from zoo.errors import ConfigError
        from zoo.models.create import load_folder

        quiet_libraries()
        model = load_folder(folder).eval()
        if not model.can_generate():
            raise ConfigError(f"{folder}: a {model.config.task} model, which does not generate; only causal-lm does")
        words = load_tokenizer(folder, tokenizer)
        ids_BL = _encode(words, prompt, chat, folder)
        if (largest := int(ids_BL.max())) >= (size := model.config.vocab_size):
            raise ConfigError(
                f"the tokenizer makes token {largest}, the model's vocabulary has {size}: they do not fit"
            )
        options = _options(model, words, max_new_tokens, temperature, top_p, beams)
        torch.manual_seed(seed)
        start = time.perf_counter()
        streamer = None if as_json or beams > 1 else _streamer(words, skip_prompt=chat)
        out_BL = model.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), streamer=streamer, **options)
    seconds = time.perf_counter() - start
    new = out_BL[0, ids_BL.shape[1] :]
    text = words.decode(new, skip_special_tokens=True)
    if as_json:
        print_json({"prompt": prompt, "text": text, "tokens": len(new), "seconds": round(seconds, 3)})
        return
    if streamer is None:
        print(text if chat else prompt + text)
    say(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s")


def _encode(tokenizer: Any, prompt: str, chat: bool, folder: str) -> Any:
    from zoo.errors import ConfigError, DataError

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"{folder}: its tokenizer has no chat template; leave out --chat")
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
    ids_BL = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids_BL.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise DataError("--prompt is empty; give at least one word")
        ids_BL = ids_BL.new_full((1, 1), tokenizer.bos_token_id).long()
    return ids_BL


def _options(model: Any, tokenizer: Any, new: int, temperature: float, top_p: float, beams: int) -> dict[str, Any]:
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end[0] if isinstance(end, list) else end
    options: dict[str, Any] = {"max_new_tokens": new, "num_beams": beams, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    return {**options, "eos_token_id": end, "pad_token_id": pad}


def _streamer(tokenizer: Any, skip_prompt: bool) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
