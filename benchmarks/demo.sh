#!/usr/bin/env bash
# The main job, end to end, as `make demo` runs it: one pipeline, then one table.
# No extra texts, where this data would get five a row by default: the teacher labels a sixth of what it would.
set -euo pipefail
out=${DEMO_OUT:-kdcli-out/demo}

kdcli distill --teacher minilm --student tiny --augment 0 -o "$out/student" --force \
  | kdcli prune - --sparsity 0.3 -o "$out/pruned" --force \
  | kdcli quantize - -o "$out/int8" --force \
  | kdcli evaluate -
