# Sourced by the scripts beside it: Python, the wheels that the machine lacks, where results go.
#
#   PYTHON          the interpreter, default python3
#   OUT             folder of the results, default: the folder of the scripts
#   EC2FACE_COMMIT  commit that results name where the tree is no repository

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/gpu}
site=${TMPDIR:-/tmp}/ec2face-site
missing='import sys; from importlib.util import find_spec as f
sys.exit(all(map(f, ["diffusers", "facer", "lpips", "open_clip", "pydantic"])))'
if compgen -G ".whl/*.whl" > /dev/null && "$PYTHON" -c "$missing"; then
  if [ ! -e "$site/complete" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$site" .whl/*.whl || exit
    touch "$site/complete"
  fi
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # the package need not be installed
export OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"
