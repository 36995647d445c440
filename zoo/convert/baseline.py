"""The baseline that every efficient student has to beat: a sliding window with sinks whose state has as many bytes.

Bytes are measured by running the mixers, not computed from formulas, so that whatever a state carries is counted.
"""

from __future__ import annotations

import math
from typing import Any

from zoo.convert.surgery import replace_mixers
from zoo.errors import ConversionError
from zoo.mixers.base import SequenceMixer
from zoo.models.backbone import ZooPreTrainedModel
from zoo.models.costs import mixer_state_bytes
from zoo.registry import mixer_class

LONGEST = 1 << 17


def converted_layers(student: ZooPreTrainedModel) -> list[int]:
    """The layers that are not softmax attention any more."""
    return [i for i, block in enumerate(student.model.layers) if block.mixer.name != "attention"]


def final_state_bytes(mixer: SequenceMixer) -> int:
    """Bytes of a mixer's state where it has stopped growing. Raises ConversionError where it never does."""
    if mixer.traits.state == "grows":
        raise ConversionError(f"the state of {mixer.name!r} grows with the length: no window has as many bytes")
    length = 2 * max(_windows(mixer.config.plain()), default=0) + 64
    size = mixer_state_bytes(mixer, length)
    while (longer := mixer_state_bytes(mixer, 2 * length)) != size:
        size, length = longer, 2 * length
        if length > LONGEST:
            raise ConversionError(f"the state of {mixer.name!r} still grows after {length} positions")
    return size


def _windows(options: dict[str, Any]) -> list[int]:
    nested = [w for value in options.values() if isinstance(value, dict) for w in _windows(value)]
    return nested + [v for k, v in options.items() if k == "window" and isinstance(v, int)]


def window_of_equal_bytes(
    student: ZooPreTrainedModel, *, sinks: int | None = None, teacher: ZooPreTrainedModel | None = None
) -> int:
    """The window of `sliding_window` whose states, in all converted layers together, have at least the student's bytes.

    Rounded up, in the baseline's favour. `sinks` are the student's own by default, or 4. A student that is a sliding
    window already gets its own window back. The window's heads are those of the `teacher`, where it is given, else of
    the student's mixers. Raises ConversionError without a converted layer, for layers whose state
    grows with the length, and for encoders, which carry no state.
    """
    layers = converted_layers(student)
    if not layers:
        raise ConversionError("no layer of this student is converted, so there is no state to compare with")
    mixers = [student.model.layers[i].mixer for i in layers]
    if not student.model.is_causal:
        raise ConversionError("an encoder carries no state, so no window has as many bytes")
    wanted = sum(final_state_bytes(m) for m in mixers)
    sinks = student_sinks(student) if sinks is None else sinks
    shaped = mixers if teacher is None else [teacher.model.layers[i].mixer for i in layers]
    small, large = 8, 24
    bytes_small, bytes_large = (sum(_window_bytes(m, w, sinks) for m in shaped) for w in (small, large))
    slope = (bytes_large - bytes_small) / (large - small)
    return max(1, small + math.ceil((wanted - bytes_small) / slope))


def student_sinks(student: ZooPreTrainedModel) -> int:
    """The most sinks that a converted layer has; 4 where the mixers know none."""
    options = [student.model.layers[i].mixer.config for i in converted_layers(student)]
    return max((o.sinks for o in options if hasattr(o, "sinks")), default=4)


def is_window(student: ZooPreTrainedModel) -> bool:
    """Whether every converted layer is a sliding window, so that the student is its own baseline."""
    return all(student.model.layers[i].mixer.name == "sliding_window" for i in converted_layers(student))


def _window_bytes(mixer: SequenceMixer, window: int, sinks: int) -> int:
    """Bytes of a sliding window's state in the place of `mixer`, with its heads and sizes."""
    c, shape = mixer.config, ("num_heads", "num_kv_heads", "head_dim", "value_head_dim", "rotary")
    if not hasattr(c, "num_heads") or not hasattr(c, "head_dim"):
        raise ConversionError(f"{mixer.name!r} has no heads to take a window's shape from; give the teacher")
    cls: Any = mixer_class("sliding_window")
    options = {key: getattr(c, key, None) for key in shape}
    made = cls(cls.Config(name="sliding_window", window=window, sinks=sinks, **options), mixer.width)
    weight = next(mixer.parameters())
    return mixer_state_bytes(made.to(weight.device, weight.dtype), 2 * window + sinks + 64)


def window_baseline(teacher: ZooPreTrainedModel, student: ZooPreTrainedModel) -> ZooPreTrainedModel:
    """The teacher with a sliding window of equal state bytes in every layer that `student` has converted.

    Untrained: train it as long as the student before comparing. Raises ConversionError as `window_of_equal_bytes`, and
    where the student has another number of layers than the teacher.
    """
    if len(teacher.model.layers) != len(student.model.layers):
        raise ConversionError(
            f"the student has {len(student.model.layers)} layers, the teacher {len(teacher.model.layers)}: "
            "it was not converted from this teacher"
        )
    sinks = student_sinks(student)
    window = window_of_equal_bytes(student, sinks=sinks, teacher=teacher)
    options = {"name": "sliding_window", "window": window, "sinks": sinks}
    return replace_mixers(teacher, dict.fromkeys(converted_layers(student), options))
