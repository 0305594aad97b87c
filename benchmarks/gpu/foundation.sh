#!/usr/bin/env bash
# Train the foundation of the second miniature on one GPU: every stage of `make foundation`, with
# seconds instead of samples. Run it in the root of the repository.
#
#   [VAE=120] [FLUX=300] [DISTILL=40] [POOL=57344] [PERCEPTION=170] [MODELS="parser_guiding ..."]
#   [START=FLUX folder whose autoencoder is trained further; VAE=0: taken as it is]
#   [FURTHER=1: the transformer of START is trained further, too] [BATCH=128] [RATE=1.2e-3]
#     bash benchmarks/gpu/foundation.sh
#
# MODELS="" leaves guides and evaluators out. The autoencoder has the GPU for itself; guides and
# evaluators are trained beside the transformer.
# Results are packed into OUT as soon as they are there: vae.tar, base.tar, flux.tar.*,
# perception.tar, logs.tar.
set -u
. "$(dirname "$0")/environment.sh"
: "${VAE:=120}" "${FLUX:=300}" "${DISTILL:=40}" "${POOL:=57344}" "${PERCEPTION:=170}"
: "${MODELS=parser_guiding parser_scoring clip_guiding clip_scoring facts}"
export OUT OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false

bundle=data/mini128
work=runs/foundation/mini128
logs=runs/foundation/logs
mkdir -p "$bundle" "$work" "$logs"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >"$logs/device.csv"
trap 'tar -C runs -cf "$OUT/logs.tar" $(cd runs && find . -name "*.log" -o -name "*.csv" -o -name metrics.jsonl)' EXIT

run() { # run LOG ARGUMENTS...: says how long it took
  local log=$1 start=$SECONDS
  shift
  "$PYTHON" "$@" >"$logs/$log.log" 2>&1
  local status=$?
  echo "$SECONDS s: $log ended with status $status after $((SECONDS - start)) s"
  [ $status -eq 0 ] || tail -n 25 "$logs/$log.log"
}

perceive() { # perceive LOG ARGUMENTS...: train a perception model
  run "$1" -m ec2face_lab pretrain "${@:2}" --device cuda --seconds "$PERCEPTION"
}

run foundation benchmarks/gpu/foundation.py "$VAE" "$FLUX" "$DISTILL" "$POOL" &
foundation=$!
run captions -m ec2face_lab pretrain captions --samples "$POOL" --processes 10
while [ ! -e "$work/vae.json" ] && kill -0 $foundation 2>/dev/null; do sleep 0.5; done
models=()
for model in $MODELS; do
  role=${model#*_}
  perceive "$model" "${model%%_*}" $([ "$role" = "$model" ] || echo --role "$role") &
  models+=($!)
done
[ -z "$MODELS" ] || { wait "${models[@]}" && tar -C "$bundle" -cf "$OUT/perception.tar" --exclude=./flux .; }
wait $foundation
