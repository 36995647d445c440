"""The mathematics: per op a sequential reference (`reference.py`), a form made of matrix products, one dispatch."""

from zoo.ops.attention import attention
from zoo.ops.conv import short_conv
from zoo.ops.delta import delta_rule
from zoo.ops.grouped import grouped_linear
from zoo.ops.recurrence import linear_recurrence
from zoo.ops.vector_delta import vector_delta_rule
from zoo.ops.window import window_attention

__all__ = [
    "attention",
    "delta_rule",
    "grouped_linear",
    "linear_recurrence",
    "short_conv",
    "vector_delta_rule",
    "window_attention",
]
