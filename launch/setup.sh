# shellcheck shell=bash
# Sourced by the scripts beside it, from the repository's root: uses the active virtual environment,
# else makes .venv here, installs what is missing and puts its python first. `extras` may name groups
# of optional dependencies, as in extras="[test]".

if [[ -z ${HOME:-} ]]; then
  HOME=$(mktemp -d) # pip, matplotlib and TFDS want one
  export HOME
fi

find_python() {
  local name
  for name in python3 python3.12 python3.13 python3.11 python3.14 python; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$name"
      return
    fi
  done
  echo "bivl needs Python 3.11 or newer on PATH" >&2
  return 2
}

if [[ -n ${VIRTUAL_ENV:-} ]]; then
  venv=$VIRTUAL_ENV
  "$venv/bin/python" -m pip --version > /dev/null 2>&1 || "$venv/bin/python" -m ensurepip
else
  venv=$PWD/.venv
  if ! "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
    python=$(find_python)
    "$python" -m venv --clear "$venv" || {
      echo "$python -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2
      exit 2
    }
  fi
fi
export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH

# Installed once for each content of the two files that say what is needed.
wanted=$(python -c 'import hashlib, sys
digest = hashlib.sha256()
for name in sys.argv[1:]: digest.update(open(name, "rb").read())
print(digest.hexdigest())' requirements.txt pyproject.toml)
stamp=$venv/.bivl${extras:-}
if [[ ! -f $stamp || $(< "$stamp") != "$wanted" ]]; then
  echo "installing bivl${extras:-} into $venv"
  python -m pip install --quiet --disable-pip-version-check --editable ".${extras:-}"
  echo "$wanted" > "$stamp"
fi
