"""An entry of a layout: some of their tensors, the tensors of ours that hold the same numbers, and the way both ways.

A family lists entries; reading, writing, missing and surplus names and expected shapes all follow from the one list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Way = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Entry:
    """Their tensors by name, ours by name, and how to get from one to the other.

    read: from theirs to ours, in the orders of the names; write: its inverse, which also runs on the meta device,
    where it says which shapes theirs must have. optional: read where they are there, never written; where they
    are absent ours keep their initial values.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    read: Way
    write: Way
    optional: bool = False


def same(theirs: str, ours: str, *, optional: bool = False) -> Entry:
    """One tensor under two names."""
    return Entry((theirs,), (ours,), list, list, optional)


def mapped(
    theirs: str,
    ours: str,
    read: Callable[[Tensor], Tensor],
    write: Callable[[Tensor], Tensor],
    *,
    optional: bool = False,
) -> Entry:
    """One tensor in two forms, such as a decay and its logarithm."""
    return Entry((theirs,), (ours,), lambda t: [read(t[0])], lambda t: [write(t[0])], optional)


def transposed(theirs: str, ours: str, *, optional: bool = False) -> Entry:
    """A matrix stored as (in, out) there and (out, in) here."""
    return mapped(theirs, ours, lambda t: t.T.contiguous(), lambda t: t.T.contiguous(), optional=optional)


def depthwise(theirs: str, ours: str) -> Entry:
    """The kernel of a depthwise convolution: (channels, 1, width) there, (channels, width) here."""
    return mapped(theirs, ours, lambda t: t.squeeze(1), lambda t: t.unsqueeze(1))


def flat(theirs: str, ours: str, shape: Sequence[int], *, optional: bool = False) -> Entry:
    """A vector that has extra axes of size 1 there; `shape` is theirs."""
    return mapped(theirs, ours, lambda t: t.reshape(-1), lambda t: t.reshape(*shape), optional=optional)


def shaped(theirs: str, ours: str, their_shape: Sequence[int], our_shape: Sequence[int]) -> Entry:
    """The same numbers in another shape."""
    return mapped(theirs, ours, lambda t: t.reshape(*our_shape), lambda t: t.reshape(*their_shape))


def initial(ours: str) -> Entry:
    """A tensor of ours that no file has: it keeps its initial value."""
    return Entry((), (ours,), list, lambda t: [], optional=True)


def rows(theirs: Sequence[str], ours: str, shape: Sequence[int]) -> Entry:
    """Vectors there, of `shape`, that are the rows of one matrix here."""
    return Entry(
        tuple(theirs),
        (ours,),
        lambda t: [torch.stack([v.reshape(-1) for v in t])],
        lambda t: [row.reshape(*shape) for row in t[0].unbind()],
    )


def split(theirs: str, ours: Sequence[str], sizes: Sequence[int], *, dim: int = 0) -> Entry:
    """One tensor there that holds several of ours, one behind the other along `dim`."""
    return Entry(
        (theirs,),
        tuple(ours),
        lambda t: [piece.contiguous() for piece in t[0].split(list(sizes), dim)],
        lambda t: [torch.cat(list(t), dim)],
    )


def stacked(theirs: Sequence[str], ours: str) -> Entry:
    """One tensor for each expert there, one stack here."""
    return Entry(tuple(theirs), (ours,), lambda t: [torch.stack(list(t))], lambda t: list(t[0].unbind()))


def pairs(
    theirs: str, ours: str, names: dict[str, str], parameters: Iterable[str] = ("weight",), *, optional: bool = False
) -> Iterator[Entry]:
    """Modules of the same parameters under other names: `theirs` + key to `ours` + value."""
    for name, mine in names.items():
        for parameter in parameters:
            yield same(f"{theirs}{name}.{parameter}", f"{ours}{mine}.{parameter}", optional=optional)
