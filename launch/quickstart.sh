#!/usr/bin/env bash
# Pre-trains a small model on emoji (about five minutes on two CPU cores), evaluates it beside the
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
print(f"\n{'nine categories, 399 held-out emoji':36} {'kNN':>7} {'linear':>7}")
for name, result in (("pre-trained", trained), ("the same network, untrained", untrained)):
    print(f"{name:36} {result['knn/accuracy']:7.1%} {result['linear/accuracy']:7.1%}")
print(f"{'raw pixels, 16 x 16':36} {trained['knn/pixels']:7.1%}")
print(f"{'always the commonest category':36} {trained['knn/chance']:7.1%}")
print(f"\npictures  {run}/pictures\nnumbers   {run}/metrics.jsonl, {run}/evaluation.json")
print(f"model     python -c 'import bivl; print(bivl.load(\"{run}\").config)'")
PYTHON
