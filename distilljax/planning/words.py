"""A plan in words: the lines that the command prints, and the parts of its page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from distilljax.planning.collectives import by_kind
from distilljax.planning.memory import OWNERS
from distilljax.planning.plan import Plan, ProgramPlan, balance

BAR_WIDTH = 60
# One letter for each owner in the bar of a terminal.
LETTERS: dict[str, str] = dict(zip(OWNERS, "TSOobga", strict=True))


def gib(nbytes: float | None) -> str:
    """Bytes as GiB, MiB or KiB.

    Example:
      >>> gib(3 * 2**30), gib(5 * 2**20), gib(100), gib(-(2**30))
      ('3.00 GiB', '5.00 MiB', '0.10 KiB', '-1.00 GiB')
    """
    if nbytes is None:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(nbytes) >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes / 2**10:.2f} KiB"


def seconds(value: float) -> str:
    """Seconds, or milliseconds.

    Example:
      >>> seconds(2.5), seconds(0.0123), seconds(1.5e-5)
      ('2.50 s', '12.3 ms', '0.015 ms')
    """
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-4 else f"{1e3 * value:.2g} ms"


def headline(found: Plan) -> str:
    """What was planned, for what."""
    top, batch = found.topology, found.batch
    count = len(top.devices)
    where = f"{count} device{'s' if count > 1 else ''} of this machine"
    if top.chip is not None:
        where = f"{count} x {top.chip.name}"
    size = f"{batch['examples']:,} examples"
    if batch["tokens"] is not None:
        size += f" of {batch['context']:,} tokens"
    if batch["accumulate"] > 1:
        size += f", in {batch['accumulate']} parts"
    return f"{found.name} on {top.name} ({where}): a step of {size}"


def lines(found: Plan) -> list[str]:
    """The whole plan, for a terminal."""
    out = [headline(found)]
    for name, program in found.programs.items():
        out += ["", *program_lines(name, program)]
    out += ["", *flops_lines(found)]
    if (even := balance(found.programs)) is not None:
        out += ["", balance_sentence(even)]
    return out


def program_lines(name: str, program: ProgramPlan) -> list[str]:
    """Memory, what is sent, and the roofline of one program."""
    mesh = ",".join(f"{axis}={size}" for axis, size in program.mesh.items())
    out = [f"{name} over {mesh}: {verdict(program)}"]
    owners = program.owners if program.memory is None else program.memory.owners
    for owner, nbytes in owners.items():
        if nbytes:
            out.append(f"  {LETTERS[owner]}  {owner:30}{gib(nbytes):>12}")
    if program.memory is None:
        return out
    out.append("  " + bar(owners, program.limit))
    peak, said = program.memory.predicted_peak, program.memory.peak
    states = f"; the compiler says {gib(said)}" if said else ""
    out.append(f"  at the peak {gib(peak)}{states}. Largest:")
    for live in program.memory.largest[:4]:
        where = live.op_name or "(the compiler's own)"
        out.append(f"     {live.shape!s:38}{gib(live.nbytes):>12}  {where[-60:]}")
    if note := peak_note(peak, said):
        out.append(f"  note: {note}")
    sent = by_kind(program.sent)
    if sent:
        out.append("  what a device sends in a step:")
    for kind, row in list(sent.items())[:8]:
        out.append(
            f"     {kind:38}{gib(row['bytes_per_step']):>12}  {row['times']:,} times"
        )
    if sent:
        out.append(f"     of all that: {parts_sent(program.sent_by_part)}")
    if program.roofline is not None:
        line = program.roofline
        low, high = line.mfu
        out.append(
            f"  roofline: compute {seconds(line.compute)}, memory "
            f"{seconds(line.memory)}, interconnect {seconds(line.interconnect)}: bound "
            f"by {line.bound_by}; MFU {low:.2f} (nothing overlaps) to {high:.2f}"
        )
    out.append(f"  compiled in {program.compile_seconds:.0f} s")
    return out


def parts_sent(sent: Mapping[str, int]) -> str:
    """What is sent, by what it is for.

    Example:
      >>> parts_sent({"teacher": 2**20, "student": 0, "loss": 0, "other": 512})
      'teacher 1.00 MiB, other 0.50 KiB'
    """
    parts = (f"{part} {gib(nbytes)}" for part, nbytes in sent.items() if nbytes)
    return ", ".join(parts) or "nothing"


def peak_note(walk: int, said: int) -> str:
    """What to make of two peaks that differ by more than 5 %; "" if they do not.

    Args:
      walk: The peak of the walk, which is the sum over the owners.
      said: The compiler's; 0 if it states none.

    Example:
      >>> peak_note(99, 100), peak_note(99, 0)
      ('', '')
      >>> peak_note(40, 100)[:42]
      'walk and compiler differ by 60%: the compi'
    """
    if not said or abs(walk - said) <= 0.05 * said:
        return ""
    differ = f"walk and compiler differ by {abs(walk - said) / said:.0%}"
    if walk < said:
        return (
            f"{differ}: the compiler also counts what lies in the chip's own memory, "
            "which is not in the owners, nor in what is set aside"
        )
    return f"{differ}: arrays share their place that the walk counts apart"


def verdict(program: ProgramPlan) -> str:
    """Whether it fits, and what is left."""
    if program.memory is None:
        return (
            f"DOES NOT FIT: it needs {gib(program.needs)} of {gib(program.limit)} "
            "on each device"
        )
    used, limit = program.memory.allocated, program.limit
    if limit is None:
        return f"{gib(used)} on each device; whether it fits is not known"
    word = "fits" if program.fits else "DOES NOT FIT"
    left = (limit - used) / limit
    return f"{word}: {gib(used)} of {gib(limit)} on each device, {left:.0%} left"


def bar(owners: Mapping[str, int], limit: int | None) -> str:
    """The memory of a device, a letter for each sixtieth of it.

    Example:
      >>> bar({"teacher parameters": 30, "gradients": 10}, 60)
      '[TTTTTTTTTTTTTTTTTTTTTTTTTTTTTTgggggggggg....................]'
    """
    whole = limit or max(1, sum(owners.values()))
    drawn, total = "", 0
    for owner, nbytes in owners.items():
        total += nbytes
        upto = min(BAR_WIDTH, round(BAR_WIDTH * total / whole))
        drawn += LETTERS[owner] * (upto - len(drawn))
    return f"[{drawn.ljust(BAR_WIDTH, '.')}]"


def flops_lines(found: Plan) -> list[str]:
    """Operations of a step."""
    flops = found.flops
    again = flops.executed - flops.model
    if len(found.programs) > 1:
        again = flops.executed - flops.student
    return [
        f"operations of a step: teacher {flops.teacher:.3g} (its forward pass), "
        f"student {flops.student:.3g} (forward and backward)",
        f"  computed again, or beside the models: {max(0, again):.3g}",
    ]


def balance_sentence(even: Mapping[str, Any]) -> str:
    """Which of two programs waits for the other."""
    ratio = even["teacher_to_student"]
    who = "the student waits" if ratio > 1 else "the teacher waits"
    return (
        f"balance: a step of the teacher takes {ratio:.2f} of the student's: {who}. "
        f"With {even['devices']} of {even['of']} devices the teacher would be as fast."
    )


OPTIONS = {"chunk_tokens": "objective.chunk-tokens"}


def options(changes: Mapping[str, Any]) -> str:
    """A row's changes as they are written behind a command; of remat, in words.

    What is computed again is said by a function, which only a config can name.

    Example:
      >>> options({"mesh": "fsdp=4,tensor=2", "chunk_tokens": 512, "remat": "dots"})
      '--mesh=fsdp=4,tensor=2 --objective.chunk-tokens=512 (remat: dots)'
    """
    words = [
        f"(remat: {value})"
        if name == "remat"
        else f"--{OPTIONS.get(name, name)}={value}"
        for name, value in changes.items()
    ]
    return " ".join(words) or "as it is"


def ranking(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a search tried, the best first."""
    out = [
        f"  {'':2}{'what':46}{'set aside':>12}{'at least':>11}{'at most':>11}  bound by"
    ]
    for number, row in enumerate(rows, 1):
        what = options(row["changes"])
        if row["fits"] is False:
            end = f"  {row['error'] or 'does not fit'}"
        elif row["seconds"] is None:
            end = ""
        else:
            low, high = row["seconds"]
            end = f"{seconds(low):>11}{seconds(high):>11}  {row['bound_by']}"
        out.append(f"  {number:<2}{what:46}{gib(row['allocated']):>12}{end}")
    return out
