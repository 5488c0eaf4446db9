#!/usr/bin/env bash
# Proves the stable ABI: builds rnnfast/_C.so once, with the headers of the first torch given, then loads that file with
# every symbol bound at once and runs tests on it under each torch, in throw-away environments.
# Usage: TESTS="tests/ops/test_parity.py" abi_check.sh 2.15.0 2.11.0   (each torch may bring gigabytes of CUDA packages;
# one is on disk at a time)
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
TESTS=${TESTS:-tests/ops/test_parity.py}
library=$scratch/built/rnnfast/_C.so
for version in "$@"; do
  "${PYTHON:-python3}" -m venv "$scratch/venv"
  python=$scratch/venv/bin/python
  "$python" -m pip install -q --no-compile --no-cache-dir "torch==$version" "setuptools>=77.0.3" pytest numpy expecttest
  if [ ! -e "$library" ]; then
    echo "abi-check: building with the headers of torch $version"
    RNNFAST_BUILD=1 "$python" setup.py -q build_ext --build-lib "$scratch/built" --build-temp "$scratch/objects"
  fi
  echo "abi-check: running under torch $version"
  # shellcheck disable=SC2086
  LD_BIND_NOW=1 RNNFAST_C_LIBRARY=$library "$python" -m pytest -p no:cacheprovider tests/project/test_packaging.py::test_symbols_of_the_library_are_torchs_stable_ones $TESTS
  rm -rf "$scratch/venv"
done
echo "abi-check: one library, built with torch $1, works under torch $*"
