"""A plan as a page: one HTML file that needs no other, from what plan.json holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from distilljax.planning.memory import OWNERS
from distilljax.planning.words import gib, options, parts_sent, peak_note, seconds

# Okabe and Ito, "Color Universal Design", 2008: told apart by the colour-blind too.
COLORS: dict[str, str] = dict(
    zip(
        OWNERS,
        ("#0072b2", "#009e73", "#56b4e9", "#999999", "#f0e442", "#e69f00", "#d55e00"),
        strict=True,
    )
)
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
tr{border-top:1px solid #ddd}
.bar{display:flex;height:2.2rem;background:#eee;border:1px solid #999}
.bar div{height:100%}.no{color:#b00020}.yes{color:#00703c}
i.key{display:inline-block;width:.9em;height:.9em;margin-right:.5em}
@media (prefers-color-scheme:dark){body{background:#181818;color:#ddd}
.bar{background:#333}tr{border-color:#444}.no{color:#ff6b81}.yes{color:#5fd38d}}
"""
# A class of the style and words, by `fits`.
_VERDICTS = {
    True: ("yes", "fits"),
    False: ("no", "does not fit"),
    None: ("", "whether it fits is not known"),
}


def page(result: Mapping[str, Any]) -> str:
    """The page of a plan.

    Args:
      result: What `Plan.to_json` returns, perhaps with the rows of a `search`.
    """
    title = f"{result['name']} on {result['topology']}"
    batch = result["batch"]
    size = f"{batch['examples']:,} examples"
    if batch["tokens"] is not None:
        size += f" of {batch['context']:,} tokens"
    if batch["accumulate"] > 1:
        size += f", in {batch['accumulate']} parts"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>Devices: {result['num_devices']}; a step of {size}. Compiled "
        f"ahead of time on {result['date']}; times are those of a roofline and were "
        "not measured.</p>",
    ]
    for name, program in result["programs"].items():
        body += _program(name, program)
    flops = result["flops"]
    body += [
        "<h2>Operations of a step</h2>",
        _table(
            ("what", "operations"),
            [
                ("teacher, forward", f"{flops['teacher']:.3g}"),
                ("student, forward and backward", f"{flops['student']:.3g}"),
                ("executed by the step, with what is computed again",
                 f"{flops['executed']:.3g}"),
            ],
        ),
    ]  # fmt: skip
    if even := result["balance"]:
        body.append(
            f"<p>The teacher's program takes {even['teacher_to_student']:.2f} of the "
            f"student's; with {even['devices']} of {even['of']} devices it would be as "
            "fast.</p>"
        )
    if result.get("search"):
        body += _search(result["search"])
    used = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    body.append(f"<p><small>{escape(used)}</small></p>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"{''.join(body)}</html>\n"
    )


def _program(name: str, program: Mapping[str, Any]) -> list[str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in program["mesh"].items())
    memory, limit = program["memory"], program["limit"]
    kind, verdict = _VERDICTS[program["fits"]]
    used = program["needs"] if memory is None else memory["allocated"]
    of = f" of {gib(limit)}" if limit is not None else ""
    room = program["headroom"]
    left = "" if room is None or room < 0 else f", {gib(room)} left"
    owners = program["owners"] if memory is None else memory["owners"]
    out = [
        f"<h2>{escape(name)}</h2><p>Mesh: {escape(mesh)}. "
        f'<b class="{kind}">{verdict}</b>: {gib(used)}{of} on each device{left}.</p>',
        _bar(owners, limit or used or 1),
        _table(
            ("owner", "bytes of a device"),
            [(_key(owner) + escape(owner), gib(n)) for owner, n in owners.items() if n],
        ),
    ]
    if memory is not None:
        out.append(_peak(memory))
        rows = [
            (f"{escape(x['array'])} <small>{escape(x['from'][-90:])}</small>",
             gib(x["bytes"]))
            for x in memory["largest"]
        ]  # fmt: skip
        out.append(_table(("array", "bytes"), rows))
    if program["collectives"]:
        out.append("<h3>What a device sends in a step</h3>")
        out.append(
            _table(
                ("collective", "bytes", "times"),
                [
                    (escape(kind), gib(row["bytes_per_step"]), f"{row['times']:,}")
                    for kind, row in program["collectives"].items()
                ],
            )
        )
        out.append(f"<p>Of all that: {parts_sent(program['sent_by_part'])}.</p>")
    if line := program["roofline"]:
        parts = ("compute", "memory", "interconnect", "at_least", "at_most")
        rows = [(part.replace("_", " "), seconds(line[part])) for part in parts]
        low, high = line["mfu"]
        rows.append(("MFU if nothing, and if everything overlaps",
                     f"{low:.2f} to {high:.2f}"))  # fmt: skip
        out += [f"<h3>Roofline: bound by {line['bound_by']}</h3>",
                _table(("part", "seconds"), rows)]  # fmt: skip
    return out


def _peak(memory: Mapping[str, Any]) -> str:
    walk, said = memory["predicted_peak"], memory["peak"]
    states = f"; its compiler says {gib(said)}" if said else ""
    note = peak_note(walk, said)
    return (
        f"<p>At the peak {gib(walk)}, by a walk through the compiled program{states}. "
        f"{gib(memory['allocated'])} are set aside. "
        f"{f'Note: {escape(note)}. ' if note else ''}The largest arrays then:</p>"
    )


def _bar(owners: Mapping[str, int], whole: int) -> str:
    whole = max(whole, sum(owners.values()))
    parts = "".join(
        f'<div style="width:{100 * n / whole:.3f}%;background:{COLORS[owner]}" '
        f'title="{escape(owner)}: {gib(n)}"></div>'
        for owner, n in owners.items()
        if n
    )
    return f'<div class="bar" role="img" aria-label="memory by owner">{parts}</div>'


def _key(owner: str) -> str:
    return f'<i class="key" style="background:{COLORS[owner]}"></i>'


def _search(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    shown = []
    for row in rows:
        what = options(row["changes"])
        times = row["seconds"] or (None, None)
        refused = row["fits"] is False
        no = escape(row["error"] or "does not fit")
        shown.append(
            (
                escape(what),
                gib(row["allocated"]),
                no if refused else _or_dash(times[0]),
                "" if refused else _or_dash(times[1]),
                row["bound_by"] or "",
            )
        )
    names = ("changes", "set aside", "at least", "at most", "bound by")
    return ["<h2>What else was compiled</h2>", _table(names, shown)]


def _or_dash(value: float | None) -> str:
    return "–" if value is None else seconds(value)


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(names)
    head = "".join(
        f'<th class="n">{name}</th>' if i else f"<th>{name}</th>"
        for i, name in enumerate(names)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="n">{cell}</td>' if i else f"<td>{cell}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
