"""Facts of a compiled step and its text -> the report that `precompile` prints."""

import dataclasses
import math
import re
from collections import defaultdict

from bivl.core import advice, collectives, costs, hlo, roofline
from bivl.core.advice import Leaf
from bivl.core.roofline import Place
from bivl.core.topologies import GIB, Topology

PARTS = ("params", "teacher", "opt_state", "extras", "batch")
ROOM = re.compile(r"\(?([\d.]+)([KMGT])i?B?\)? exceeds available HBM|Used ([\d.]+)([KMGT]) of")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def memory(leaves: list[Leaf], facts: dict, topology: Topology) -> dict:
    """Bytes of one chip by what they are for. `temporaries` are activations, gradients and what
    else is made within a step; `peak` is the fullest moment, all included."""
    found = dict.fromkeys(PARTS, 0)
    for leaf in leaves:
        part = leaf.path.split("/")[0]
        found["opt_state" if part == "step" else part] += leaf.bytes
    found["arguments"] = sum(found.values())
    sizes = facts.get("memory") or {}
    if sizes:
        found["padding"] = max(sizes["argument"] - found["arguments"], 0)
        found["arguments"] = sizes["argument"]
    needed = out_of_memory(facts["error"]) if facts["error"] else None
    found["temporaries"] = sizes.get("temp", needed)
    found["code"] = sizes.get("code")
    found["peak"] = sizes.get("peak") or None
    found["capacity"] = topology.chip.hbm
    return found


def out_of_memory(message: str) -> float | None:
    """The compiler's complaint -> bytes that it wanted; None when it complains of something else.

    Two forms are known: of temporaries alone, and of everything with a table."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    found = ROOM.search(message)
    if not found:
        return math.nan
    number, unit = [x for x in found.groups() if x]
    return float(number) * UNITS[unit]


def analyse(facts: dict, text: str | None, topology: Topology) -> dict:
    """The whole report as plain values. `facts` come from the child that compiled; `text` is the
    compiled program's, None where there is none."""
    leaves = [Leaf(p, tuple(s), tuple(h), i) for p, s, h, i in facts["leaves"]]
    report = {
        "topology": topology.name,
        "chips": topology.count,
        "mesh": facts["mesh"],
        "batch_size": facts["batch_size"],
        "accumulate": facts["accumulate"],
        "remat": facts["remat"],
        "fits": facts["error"] is None,
        "error": facts["error"],
        "compile_seconds": facts["compile_seconds"],
        "memory": memory(leaves, facts, topology),
        "flops": facts["flops"],
        "flops_per_chip": facts["flops"] / topology.count,
        "warnings": advice.replicated(leaves, facts["mesh"]) + _recompiles(facts),
        "suggestions": [],
    }
    if text:
        report |= _from_text(facts, text, topology, leaves, report["warnings"])
    elif facts["error"] is None:
        report["warnings"].append(f"no text of the compiled program: {facts['text_error']}")
    temporary = report["memory"]["temporaries"]
    if facts["error"] and temporary is not None:
        wanted = temporary if not math.isnan(temporary) else topology.chip.hbm
        args = (topology.chip.hbm, leaves, wanted, facts, topology.count)
        report["suggestions"] = advice.cures(*args)
    return report


def _recompiles(facts: dict) -> list[str]:
    """What would make the second step another program than the first."""
    return [
        f"{path} leaves the step as {became}: every run compiles twice"
        for path, became in facts["changed"]
    ]


def _from_text(facts, text, topology, leaves, warnings) -> dict:
    module = hlo.parse(text)
    place = Place(topology, tuple(map(tuple, facts["coords"])), tuple(facts["slices"]))
    matmuls, moved = costs.matmuls(module), costs.traffic(module)
    chips = topology.count // topology.slices
    exchanges = collectives.find(module, chips, topology.slices)
    times = roofline.times(matmuls, math.fsum(moved.values()), exchanges, place)
    lanes = topology.chip.lanes
    warnings += advice.padded(matmuls, lanes) + advice.attention(module)
    warnings += advice.gathers(exchanges, leaves)
    for name in module.unknown_loops():
        warnings.append(f"a loop turns an unknown number of times and counts once: {name}")
    return {
        "compiled_flops_per_chip": math.fsum(m.flops for m in matmuls),
        "padded_flops_per_chip": math.fsum(m.padded(lanes) for m in matmuls),
        "hbm_bytes_per_chip": math.fsum(moved.values()),
        "collectives": _collectives(exchanges, facts["mesh"], place),
        "seconds": dataclasses.asdict(times) | {"step": times.step, "serial": times.serial},
        "bound": times.bound,
        "mfu": {
            name: roofline.mfu(facts["flops"], seconds, topology)
            for name, seconds in {
                **dataclasses.asdict(times),
                "step": times.step,
                "serial": times.serial,
            }.items()
            if seconds
        },
        "assumptions": list(roofline.ASSUMPTIONS),
    }


def _collectives(exchanges, mesh: dict[str, int], place: Place) -> list[dict]:
    """By kind and mesh axes: calls, bytes and seconds of a step of one chip, the longest first."""
    rows: dict[tuple, dict] = defaultdict(
        lambda: {"calls": 0.0, "bytes": 0.0, "ici_seconds": 0.0, "dcn_seconds": 0.0}
    )
    for c in exchanges:
        row = rows[c.kind, "+".join(collectives.axes_of(c.groups, mesh))]
        ici, dcn = roofline.exchange(c, place)
        row["calls"] += c.times
        row["bytes"] += c.times * c.bytes
        row["ici_seconds"] += c.times * ici
        row["dcn_seconds"] += c.times * dcn
    found = [{"kind": kind, "axes": axes, **row} for (kind, axes), row in rows.items()]
    return sorted(found, key=lambda r: -r["ici_seconds"] - r["dcn_seconds"])


def render(report: dict) -> str:
    """The report as text."""
    r, m = report, report["memory"]
    mesh = " ".join(f"{axis}={size}" for axis, size in r["mesh"].items())
    lines = [
        f"{r['topology']}: {r['chips']} chips, mesh {mesh}, batch {r['batch_size']:,} in "
        f"{r['accumulate']}, remat {r['remat']}; compiled in {r['compile_seconds']:.0f} s",
        "",
        f"memory of a chip, GB (holds {m['capacity'] / 1e9:.2f}, {m['capacity'] / GIB:.2f} GiB)",
    ]
    names = {"opt_state": "optimizer", "padding": "padding of these", "peak": "fullest moment"}
    for key in (*PARTS, "padding", "temporaries", "code", "peak"):
        if m.get(key) is not None:
            lines.append(f"  {names.get(key, key):18} {m[key] / 1e9:9.3f}")
    lines += ["", f"FLOPs of a step: {r['flops']:.4g}, of a chip {r['flops_per_chip']:.4g}"]
    if "seconds" in r:
        lines += _render_costs(r)
    lines += [""] * bool(r["warnings"]) + [f"warning: {line}" for line in r["warnings"]]
    if not r["fits"]:
        lines += ["", f"does not fit: {' '.join(r['error'].split())[:300]}"]
        lines += [f"  try {line}" for line in r["suggestions"]]
    return "\n".join(lines)


def _render_costs(r: dict) -> list[str]:
    lines = [
        f"  as compiled {r['compiled_flops_per_chip']:.4g} a chip, matrix unit filled up "
        f"{r['padded_flops_per_chip']:.4g}",
        f"main memory: {r['hbm_bytes_per_chip'] / 1e9:.2f} GB read and written by a chip",
        "",
        "collectives of a chip",
    ]
    for c in r["collectives"]:
        lines.append(
            f"  {c['kind']:20} {c['axes']:18} {c['calls']:8.0f} calls {c['bytes'] / 1e9:10.3f} GB "
            f"{1e3 * c['ici_seconds']:9.2f} ms ICI {1e3 * c['dcn_seconds']:9.2f} ms DCN"
        )
    lines += ["  none"] * (not r["collectives"])
    lines += ["", f"at least, ms (bound by {r['bound']}){'':8} MFU"]
    for name, seconds in r["seconds"].items():
        share = f"{r['mfu'][name]:8.1%}" if name in r["mfu"] else "        "
        lines.append(f"  {name:18} {1e3 * seconds:12.2f} {share}")
    return [*lines, "assumed", *(f"  {line}" for line in r["assumptions"])]
