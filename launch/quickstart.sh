#!/usr/bin/env bash
# Pre-trains bivl on images, texts and pairs (six minutes on two idle CPU cores), evaluates it beside the
# same network untrained, and says where the pictures are. Run again, it resumes or says it is done:
#   bash launch/quickstart.sh [DIR]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
run=${1:-runs/quickstart}

train=(python -m bivl.train --config=configs/quickstart.py)

echo "== 1/3 pre-training: ${train[*]} --workdir=$run"
"${train[@]}" --workdir="$run"
echo "== 2/3 the same network, untrained"
"${train[@]}" --workdir="$run/untrained" --config.steps=0 > "$run/untrained.log"
echo "== 3/3 evaluation on held-out emoji"
for which in "$run" "$run/untrained"; do
  python -m bivl.evaluate --checkpoint="$which" > "$which.evaluation.log"
done
python - "$run" << 'PYTHON'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
trained, untrained = (json.loads((d / "evaluation.json").read_text()) for d in (run, run / "untrained"))
both = [f"retrieval/{way}_recall_at_10" for way in ("image_to_text", "text_to_image")]
names = ["knn/accuracy", "linear/accuracy", *both]
rows = {
    "pre-trained": [trained[name] for name in names],
    "the same network, untrained": [untrained[name] for name in names],
    "from raw pixels (kNN; ridge to words)": [
        trained["knn/pixels"], None, *(trained[name.replace("/", "/floor_")] for name in both)
    ],
    "by chance": [trained["knn/chance"], None, *[trained["retrieval/chance_at_10"]] * 2],
}
heads = ("kNN", "linear", "image->text", "text->image")
print("\n399 held-out emoji: accuracy among nine categories, recall@10 of words and of images")
print(f"{'':38}" + "".join(f"{head:>13}" for head in heads))
for name, values in rows.items():
    shown = ("" if value is None else f"{value:.1%}" for value in values)
    print(f"{name:38}" + "".join(f"{value:>13}" for value in shown))
print(f"\npictures  {run}/pictures\nnumbers   {run}/metrics.jsonl, {run}/evaluation.json")
print(f"model     python -c 'import bivl; print(bivl.load(\"{run}\").config)'")
PYTHON
