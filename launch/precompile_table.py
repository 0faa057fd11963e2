"""The table of launch/README.md: every shipped pre-training recipe on the slice it names.

    python launch/precompile_table.py [--only=TEXT | --write] [--keep=DIR] [--made]

A recipe names its slices in its docstring, a line each: an option of the config, the slice and
what else is set, as in `size=large   2 x v5p:4x4x8  --config.optimizer.accumulate=2`. Each is
compiled by `python -m bivl.precompile`, one after the other, minutes each; reports are kept in
DIR/NAME.json, and one that is there is not made again; with `--made` nothing is compiled and only
what is there has a row. `--write` puts the whole table into the README.
Tokenizers and teachers stand in by kind: their files are not ours to ship and change no shape.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tokenizers

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "launch" / "README.md"
MARKS = ("<!-- precompile table -->", "<!-- end of the precompile table -->")
LINE = re.compile(r"^\s+(size=\w+)\s+(?:(\d+) x )?(v\w+:[\dx]+)((?:\s+--config\.\S+=\S+)*)\s*$")
# A config that is the recipe's, with what cannot be had here replaced.
CONFIG = '''
from bivl.core import config as configs

ROWS = {"clip": 49_408, "wordpiece": 30_522}  # of the table of words


def get_config(text=None):
    c = configs.load("{root}/configs/pretrain/{name}.py:" + text)
    with c.unlocked():
        if "tokenizer" in c and c.tokenizer.kind == "xlmr":
            c.tokenizer.kind = "small_xlmr"  # c.model.vocabulary has the rows
        elif "tokenizer" in c and c.tokenizer.kind == "bpe":
            c.tokenizer.path = "{folder}"
        elif "tokenizer" in c and c.tokenizer.kind in ROWS:
            text = c.model.text if "text" in c.model else c.model
            text.vocabulary, c.tokenizer.kind = ROWS[c.tokenizer.kind], "small_xlmr"
        if c.get("teacher") is not None and c.objective in ("mdm", "mim", "vqkd"):
            fill(c)
    return c


def fill(c):
    """A teacher of the recipe's own kind with as many patches."""
    name = "data2vec_image" if c.objective == "vqkd" else "vqkd"
    teacher = configs.load("{root}/configs/pretrain/" + name + ".py:size=base")
    with teacher.unlocked():
        teacher.model.patch_size, teacher.image_size = c.model.patch_size, c.image_size
        if "teacher" in teacher:
            fill(teacher)
    c.teacher.random, c.teacher.config = True, teacher.to_dict()
'''


def write_vocabulary(folder: Path, size: int = 50_265) -> None:
    """A vocabulary of as many pieces as RoBERTa's, none of them a word."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(alphabet)]
    pieces += [f"piece {i}" for i in range(size - len(pieces) - 1)] + ["<mask>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def recipes() -> list[tuple[str, str, int, str, list[str]]]:
    """(config, option, slices, slice, overrides) of every line that names one."""
    found = []
    for path in sorted((ROOT / "configs" / "pretrain").glob("[!_]*.py")):
        doc = path.read_text().split('"""')[1]
        for line in doc.splitlines():
            match = LINE.match(line)
            if match:
                option, slices, name, rest = match.groups()
                found.append((path.stem, option, int(slices or 1), name, rest.split()))
    return found


def kept(recipe, keep: Path) -> Path:
    """The file of a recipe's report."""
    name, option, slices, topology, _ = recipe
    size = option.removeprefix("size=")
    return keep / f"{name}_{size}_{slices}_{topology.replace(':', '_')}.json"


def report(recipe, keep: Path) -> dict | None:
    """What precompile says of a recipe; None when it failed for another reason than memory."""
    (name, option, slices, topology, overrides), file = recipe, kept(recipe, keep)
    if file.exists():
        return json.loads(file.read_text())
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / f"{name}.py"
        text = CONFIG.replace("{root}", str(ROOT)).replace("{folder}", folder)
        config.write_text(text.replace("{name}", name))
        write_vocabulary(Path(folder))
        command = [sys.executable, "-m", "bivl.precompile", f"--config={config}:{option}", "--json"]
        command += [f"--topology={topology}", f"--num_slices={slices}", *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        said = done.stderr.strip().splitlines()
        print(f"{name}:{option}: {said[-1] if said else done.returncode}", file=sys.stderr)
        return None
    file.write_text(lines[-1] + "\n")
    return json.loads(lines[-1])


def row(recipe, found: dict | None) -> str:
    """A line of the table."""
    name, option, slices, topology, overrides = recipe
    where = topology if slices == 1 else f"{slices} x {topology}"
    mesh = [f"{axis} {n}" for axis, n in (found or {}).get("mesh", {}).items() if n > 1]
    settings = " ".join(x.removeprefix("--config.") for x in overrides)
    cells = [f"`{name}` {option.removeprefix('size=')}", where, settings or "-", ", ".join(mesh)]
    if found is None:
        return "| " + " | ".join([*cells, "did not compile", *[""] * 6]) + " |"
    memory = found["memory"]
    state = sum(memory[part] for part in ("params", "teacher", "opt_state", "extras"))
    cells += [f"{found['batch_size']:,}", f"{state / 1e9:.2f}"]
    if not found["fits"]:
        wanted = memory["temporaries"] or float("nan")
        return "| " + " | ".join([*cells, f"does not fit ({wanted / 1e9:.1f})", *[""] * 4]) + " |"
    peak = memory["peak"] or memory["arguments"] + memory["temporaries"]
    cells += [f"{peak / 1e9:.1f} of {memory['capacity'] / 1e9:.1f}", f"{found['flops']:.3g}"]
    if "seconds" not in found:
        return "| " + " | ".join([*cells, "", "", ""]) + " |"
    seconds = found["seconds"]
    times = " / ".join(f"{1e3 * seconds[k]:.0f}" for k in ("compute", "hbm", "ici", "dcn"))
    exchanged = sum(c["bytes"] for c in found["collectives"])
    cells += [f"{exchanged / 1e9:.2f}", times]
    cells += [f"{found['mfu']['step']:.0%} - {found['mfu']['serial']:.0%}"]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| recipe | slice | set | mesh | batch | state, GB | peak of HBM, GB | FLOPs a step | "
    "exchanged, GB | at least, ms: compute / HBM / ICI / DCN | MFU, overlapped - serial |"
)


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="recipes whose name and option hold this")
    parser.add_argument("--keep", default="precompiled", help="folder of reports")
    parser.add_argument("--made", action="store_true", help="only reports that are there")
    parser.add_argument("--write", action="store_true", help="put the table into launch/README.md")
    args = parser.parse_args(argv)
    if args.only and args.write:  # the rows of all other recipes would be gone
        parser.error("--write puts the whole table there; leave --only out")
    keep = Path(args.keep)
    keep.mkdir(parents=True, exist_ok=True)
    lines = [HEAD, "|" + "---|" * HEAD.count(" |")]
    for recipe in recipes():
        absent = args.made and not kept(recipe, keep).exists()
        if args.only in f"{recipe[0]}:{recipe[1]}" and not absent:
            lines.append(row(recipe, report(recipe, keep)))
            print(lines[-1], flush=True)
    if args.write:
        before, _, rest = README.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        table = "\n".join(lines)
        README.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
