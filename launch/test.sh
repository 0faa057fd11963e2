#!/usr/bin/env bash
# Checks style and types and runs the tests, on a machine that has nothing but Python 3.11 or newer:
#   bash launch/test.sh [arguments of pytest, as in: tests/data -k masking]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="[test]"
# shellcheck source=launch/setup.sh
source launch/setup.sh
echo "== set up: $SECONDS s"

failed=()
stage() { # name, command: a failure does not keep the next stages from telling what they find
  local name=$1 start=$SECONDS
  shift
  echo "== $name"
  "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - start)) s"
}

stage "ruff check" ruff check .
stage "ruff format" ruff format --check .
stage "pyright" python -m pyright --pythonpath "$VIRTUAL_ENV/bin/python"
stage "pytest" python -m pytest -n 2 --dist loadfile -q "$@"

if ((${#failed[@]})); then
  printf '== failed: %s\n' "${failed[@]}"
  exit 1
fi
