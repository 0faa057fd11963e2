"""Times the PyTorch training step on the CPU, alone or in turns with another program.

    python tests/golden/speed_data2vec_vision.py --size=small --batch-size=8 --steps=10
    python tests/golden/speed_data2vec_vision.py --size=small --batch-size=8 --rounds=3 \\
        --other="python -m bivl.benchmark --config=configs/pretrain/data2vec_image.py --json"

A step is: teacher forward, student forward and backward, clip, AdamW, teacher update, on random
images. `--other` is a shell command that prints JSON with `step_seconds`; taking turns spreads
whatever else the machine does over both. The ratio is the other's time over PyTorch's.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch_data2vec_vision as reference

SIZES = {  # image, patch, width, depth, heads, top K
    "tiny": (64, 8, 128, 4, 4, 2),
    "small": (224, 16, 384, 12, 6, 6),
    "base": (224, 16, 768, 12, 12, 6),
}


def parse(arguments):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps at the start")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=None, help="default 1, with --other 3")
    parser.add_argument("--other", help="shell command that prints JSON with `step_seconds`")
    parser.add_argument("--mask-ratio", type=float, default=0.61)
    parser.add_argument("--drop-path", type=float, default=0.25)
    parser.add_argument("--attention-dropout", type=float, default=0.05)
    parser.add_argument("--fused", action="store_true", help="the fused AdamW of PyTorch")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser.parse_args(arguments)


def make_step(args):
    """A function that runs one step and returns its loss."""
    image, patch, width, depth, heads, top_k = SIZES[args.size]
    torch.manual_seed(0)
    model = reference.ModelConfig(
        image_size=image,
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_dim=4 * width,
        drop_path=args.drop_path,
        attention_dropout=args.attention_dropout,
    )
    student = reference.Data2VecVision(model)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = reference.make_optimizer(student, fused=args.fused)
    config = reference.StepConfig(
        targets=reference.TargetConfig(top_k=top_k), warmup_steps=10, total_steps=10**6
    )
    images = torch.randn(args.batch_size, image, image, 3)
    order = torch.rand(args.batch_size, model.grid**2).argsort(-1)
    mask = order < round(args.mask_ratio * model.grid**2)
    done = 0

    def step():
        nonlocal done
        result = reference.step(student, teacher, optimizer, images, mask, config, done)
        done += 1
        return result["loss"]

    return step


def measure(step, steps):
    """Median wall seconds a step and mean CPU seconds a step (all threads) over `steps`."""
    walls, cpu = [], time.process_time()
    for _ in range(steps):
        start = time.perf_counter()
        step()
        walls.append(time.perf_counter() - start)
    return {
        "step_seconds": statistics.median(walls),
        "cpu_seconds": (time.process_time() - cpu) / steps,
    }


def measure_other(command):
    """`step_seconds` of the last JSON object that the command prints; exits 2 if there is none."""
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    lines = process.stdout.splitlines()
    for first in range(len(lines)):  # logs may come before the object, or the object spread out
        for text in ("\n".join(lines[first:]), lines[-1 - first]):
            try:
                return float(json.loads(text)["step_seconds"])
            except (ValueError, KeyError, TypeError):
                continue
    print(process.stderr[-2000:], file=sys.stderr)
    print(f"--other printed no JSON with step_seconds (exit {process.returncode})", file=sys.stderr)
    sys.exit(2)


def main(arguments=None):
    """Measures and prints."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    step = make_step(args)
    for _ in range(args.warmup):
        step()
    rounds = []
    for _ in range(args.rounds or (3 if args.other else 1)):
        line = measure(step, args.steps)
        if args.other:
            line["other_seconds"] = measure_other(args.other)
            line["ratio"] = line["other_seconds"] / line["step_seconds"]
        rounds.append(line | {"load": os.getloadavg()[0]})
        if not args.json:
            print("  ".join(f"{key} {value:.4f}" for key, value in rounds[-1].items()), flush=True)
    result = {key: statistics.median(line[key] for line in rounds) for key in rounds[0]}
    if args.json:
        settings = {key: getattr(args, key) for key in ("size", "batch_size", "steps", "threads")}
        print(json.dumps(settings | result | {"torch": torch.__version__, "rounds": rounds}))
    else:
        print("median: " + "  ".join(f"{key} {value:.4f}" for key, value in result.items()))


if __name__ == "__main__":
    main()
