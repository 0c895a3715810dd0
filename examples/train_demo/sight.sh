#!/usr/bin/env bash
# The recipe of demo-vision on one GPU of 80 GB: sight.sh TOKENS RUN OUT. TOKENS is what tokenizer.py encode wrote, OUT the new checkpoint; these
# are absolute paths. Seconds of the phases: TOWER, JOINT, MTP. START: a checkpoint that sees, which is trained further.
set -euo pipefail
tokens=$1 run=$2 out=$3
cd "$(dirname "$0")"
export PYTHONPATH=../..
python3 train_tower.py --run "$run" --seconds "${TOWER:-180}" --rows 768 ${START:+--start "$START" --muon-lr 0.012 --adam-lr 0.002}
python3 train_sight.py joint --tokens "$tokens" --run "$run" --seconds "${JOINT:-540}" --rows 1024 --text-rows 24 \
  --tower-muon-lr 0.005 --tower-adam-lr 0.0006 ${START:+--start "$START"}
python3 train_sight.py mtp --tokens "$tokens" --run "$run" --seconds "${MTP:-45}" --rows 512
python3 export_sight.py --run "$run" --out "$out"
python3 compare_texts.py ../demo-dense "$out" --tokens "$tokens"
