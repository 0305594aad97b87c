#!/usr/bin/env bash
# Train the foundation of the second miniature on one GPU: every stage of `make foundation`, with
# seconds instead of samples. Run it in the repository; it resumes when it is run again.
#
#   OUT=DIR [VAE=130] [PERCEPTION=150] [POOL=131072] [FLUX=220] [DISTILL=40] benchmarks/gpu/foundation.sh
#
# Results are packed into OUT as soon as they are there: perception.tar, vae.tar, base.tar,
# flux.tar.* (in parts of 15 MB), gates.csv, logs.tar.
set -u
. "$(dirname "$0")/environment.sh"
: "${PROCESSES:=8}" "${COMPILE:=--compile}"
: "${VAE:=130}" "${PERCEPTION:=150}" "${POOL:=131072}" "${FLUX:=220}" "${DISTILL:=40}" "${RATE:=2e-3}"
export OMP_NUM_THREADS=2 TOKENIZERS_PARALLELISM=false

bundle=data/mini128
work=runs/foundation/mini128
logs=runs/foundation/logs
mkdir -p "$bundle" "$work" "$logs"
began=$SECONDS

stage() { # stage LOG ARGUMENTS...: run one stage; says how long it took
  local log=$1 start=$SECONDS
  shift
  "$PYTHON" -m ec2face_lab pretrain "$@" --device cuda >"$logs/$log.log" 2>&1
  local status=$?
  echo "$((SECONDS - began)) s: $log ended with status $status after $((SECONDS - start)) s"
  [ $status -eq 0 ] || tail -n 25 "$logs/$log.log"
  return $status
}

pack() { # pack NAME FOLDER FILES...
  local name=$1 folder=$2
  shift 2
  tar -C "$folder" -cf "$OUT/$name.tar" "$@"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$logs/device.csv"

stage captions captions --samples "$POOL" --processes "$PROCESSES" &
captions=$!
stage vae vae --seconds "$VAE" &
vae=$!
perception=()
for role in guiding scoring; do
  stage "parser_$role" parser --role "$role" --seconds "$PERCEPTION" &
  perception+=($!)
  stage "clip_$role" clip --role "$role" --seconds "$PERCEPTION" &
  perception+=($!)
done
stage facts facts --seconds "$PERCEPTION" &
perception+=($!)

wait $vae || exit 1
pack vae "$work" vae.pt vae.json
stage latents latents --samples "$POOL" || exit 1
wait $captions || exit 1
stage flux flux --seconds "$FLUX" --lr "$RATE" $COMPILE || exit 1
pack base "$work" base.json base/transformer base/text_encoder base/text_encoder_2
stage distill distill --seconds "$DISTILL" $COMPILE
tar -C "$bundle" -cf - flux | split -b 15M - "$OUT/flux.tar."
wait "${perception[@]}"
pack perception "$bundle" --exclude=flux .
pack logs runs/foundation logs $(cd runs/foundation && ls mini128/*/metrics.jsonl)
echo "$((SECONDS - began)) s: done"
