#!/usr/bin/env bash
# Runs tests of the Triton kernels under each Triton given, in throw-away environments: each kernel of each kind in its
# interpreter, and compiled for one architecture. What does not depend on Triton's version runs in `make test-full` only.
# Usage: TESTS="test_parity and lstm" triton_matrix.sh 3.6.0 3.9.0   (RNNFAST_COMPILE= compiles every row for all)
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export RNNFAST_COMPILE=${RNNFAST_COMPILE-one}
TIMEFORMAT="triton-matrix: %U s of CPU"
failed=()
for version in "$@"; do
  "${PYTHON:-python3}" -m venv "$scratch/venv"
  python=$scratch/venv/bin/python
  numpy=numpy
  case $version in 3.6.*) numpy="numpy<2.4" ;; esac # its interpreter fails on runtime loop bounds with newer ones
  "$python" -m pip install -q --no-compile --no-cache-dir "${TORCH:-torch==2.13.0}" "$numpy" pytest expecttest
  # By itself, for a torch with CUDA asks for the one Triton that it was built with; pip warns and obeys.
  "$python" -m pip install -q --no-compile --no-cache-dir "triton==$version"
  echo "triton-matrix: Triton $version"
  time "$python" -m pytest -p no:cacheprovider tests/triton_kernels -k "${TESTS:-test_triton}" || failed+=("$version")
  rm -rf "$scratch/venv"
done
if [ "${#failed[@]}" -gt 0 ]; then
  echo "triton-matrix: failed under Triton ${failed[*]}"
  exit 1
fi
echo "triton-matrix: passed under Triton $*"
