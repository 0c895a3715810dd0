#!/usr/bin/env bash
# The recipe of demo-vision on one GPU, six minutes of training: sight.sh TOKENS RUN OUT. TOKENS is what tokenizer.py encode wrote, OUT the
# new checkpoint; these are absolute paths. Seconds of the phases: TOWER, JOINT, MTP.
set -euo pipefail
tokens=$1 run=$2 out=$3
cd "$(dirname "$0")"
export PYTHONPATH=../..
python3 train_tower.py --run "$run" --seconds "${TOWER:-90}"
python3 train_sight.py joint --tokens "$tokens" --run "$run" --seconds "${JOINT:-240}"
python3 train_sight.py mtp --tokens "$tokens" --run "$run" --seconds "${MTP:-30}"
python3 export_sight.py --run "$run" --out "$out"
python3 compare_texts.py ../demo-dense "$out" --tokens "$tokens"
