#!/usr/bin/env bash
# Everything that is owed on a GPU, in nine minutes: bash bench/gpu.sh, from the repository's root.
#
# Wants torch with CUDA, triton and the package's dependencies; diffusers for its rows in the table,
# pytest for the kernels' tests. Each part has a time limit, so that one that fails or hangs does not
# take the others along. Writes to ${OUT:-bench/results}: gpu.log, encoder.json, and what the runs say.
set -uo pipefail
out=$(realpath "${OUT:-bench/results}"); mkdir -p "$out"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
seconds=530  # for all parts together

# The package need not be installed, but a run writes its version down.
mkdir "$work/latentcache-0.dist-info"
printf 'Metadata-Version: 2.1\nName: latentcache\nVersion: 0\n' >"$work/latentcache-0.dist-info/METADATA"
export PYTHONPATH="$PWD/src:$work:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 RAY_AUTH_MODE=disabled
export XDG_CACHE_HOME="$work/cache"
latentcache() { python3 -m latentcache.cli "$@"; }
export -f latentcache

part() {  # name, time limit in seconds, command
  local left=$((seconds - SECONDS)) began=$SECONDS
  echo; echo "== $1"
  timeout -k 5 $(($2 < left ? $2 : left > 1 ? left : 1)) bash -o pipefail -c "$3"
  echo "== $1: exit $? after $((SECONDS - began)) s"
}

make_inputs() {
  latentcache demo-data "$work/shards" --shards 8 --samples 96 >"$work/drawn" && python3 - "$work" <<'PYTHON'
import json, shutil, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from latentcache.vae.model import Architecture, KLAutoencoder

work = Path(sys.argv[1])
(work / "many").mkdir()
for path in (work / "shards").glob("*.tar"):  # the same pictures, as sixteen shards each
    for index in range(16):
        shutil.copy(path, work / "many" / f"{path.stem}-{index:02d}.tar")
fields = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
torch.manual_seed(0)
vae = KLAutoencoder(Architecture(block_out_channels=(128, 256, 512, 512), layers_per_block=2))
(work / "vae").mkdir()
(work / "vae" / "config.json").write_text(json.dumps(fields | {"_class_name": "AutoencoderKL"}))
save_file(vae.state_dict(), work / "vae" / "diffusion_pytorch_model.safetensors")
PYTHON
  # Trained weights, real gates, and a precision that the images decide; then the published size.
  cat >"$work/demo.yaml" <<YAML
name: gpu-demo
source: {shards: "$work/shards/*.tar", keep: [txt, json]}
transform: {resolution_px: 256, buckets: {max_ratio: 2.0, step_px: 64}, min_side_px: 64}
vae: {checkpoint: demo}
output: {url: "$work/demo"}
compute: {num_gpus: 1}
qa: {fraction: 0.1, min_rows_per_bucket: 4, min_psnr_db: 18}
YAML
  cat >"$work/large.yaml" <<YAML
name: gpu-large
source: {shards: "$work/many/*.tar", keep: [txt]}
transform: {resolution_px: 256}
vae: {checkpoint: "$work/vae"}
output: {url: "$work/large"}
compute: {num_gpus: 1, precision: fp16}
rejects: {max_rate: 0.5}
YAML
}
export -f make_inputs; export work out

{
  python3 -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  part 'kernels' 100 'python3 -m pytest -q --noconftest -p no:cacheprovider tests/vae/test_kernels.py'
  part 'checks' 120 'python3 bench/gpu_check.py'
  part 'inputs' 60 make_inputs
  part 'run, demo VAE with QA' 90 'latentcache run "$work/demo.yaml" --json | tee "$out/run-demo.json"'
  part 'verify' 30 'latentcache verify "$work/demo.yaml" --json'
  part 'run, published size' 90 'latentcache run "$work/large.yaml" --json | tee "$out/run-large.json"'
  part 'status' 20 'latentcache status "$work/large.yaml" --json'
  part 'loader' 30 'python3 bench/gpu_loader.py "$work/large"'
  part 'encoder' 400 'python3 bench/encoder.py'
} 2>&1 | tee "$out/gpu.log"
[ "$out" = "$(realpath bench/results)" ] || cp bench/results/encoder.json "$out/"
