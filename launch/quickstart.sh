#!/usr/bin/env bash
# Pre-trains a small model on emoji (about five minutes on two CPU cores), evaluates it beside the
# same network untrained, and says where the pictures are. Run again, it resumes or says it is done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/setup.sh
source launch/setup.sh
run=${1:-runs/quickstart}

echo "1/3 pre-training on emoji: python -m bivl.train --config=configs/quickstart.py --workdir=$run"
python -m bivl.train --config=configs/quickstart.py --workdir="$run"

echo "2/3 the same network, untrained"
python -m bivl.train --config=configs/quickstart.py --config.steps=0 --workdir="$run/untrained" \
  > "$run/untrained.log"

echo "3/3 evaluation on held-out emoji, nine categories"
for which in "$run" "$run/untrained"; do
  python -m bivl.evaluate --checkpoint="$which" > "$which.evaluation.log"
done
python - "$run" <<'PYTHON'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
trained, untrained = (json.loads((p / "evaluation.json").read_text()) for p in (run, run / "untrained"))
print(f"\n{'accuracy on 399 held-out emoji':32} {'kNN':>7} {'linear':>7}")
for name, result in (("pre-trained", trained), ("the same network, untrained", untrained)):
    print(f"{name:32} {result['knn/accuracy']:7.1%} {result['linear/accuracy']:7.1%}")
print(f"{'raw pixels, 16 x 16':32} {trained['knn/pixels']:7.1%}")
print(f"{'always the commonest category':32} {trained['knn/chance']:7.1%}")
print(f"\npictures: {run}/pictures   curves: {run}/metrics.jsonl, tensorboard --logdir {run}")
PYTHON
