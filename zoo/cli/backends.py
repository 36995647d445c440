"""`zoo backends`: which implementation of each op can run here, and why the others cannot."""

from __future__ import annotations

from zoo.cli.common import JsonOption, print_json, print_table


def backends(as_json: JsonOption = False) -> None:
    """Which implementations of the operations are present; the first present one of each op is used."""
    from zoo.ops.backends import backends as table

    rows = table()
    if as_json:
        print_json(rows)
        return
    cells = [(r["op"], r["backend"], "yes" if r["present"] else "no", r["why"]) for r in rows]
    print_table(("op", "backend", "present", "why not"), cells)
