#!/usr/bin/env bash
# The main job, end to end, as `make demo` runs it: one pipeline, then one table.
# One further text a row, where this data would get five by default: the teacher has a fifth of them to label.
set -euo pipefail
out=${DEMO_OUT:-kdcli-out/demo}

kdcli distill --teacher minilm --student tiny --augment 1 -o "$out/student" --force \
  | kdcli prune - --sparsity 0.3 -o "$out/pruned" --force \
  | kdcli quantize - -o "$out/int8" --force \
  | kdcli evaluate -
