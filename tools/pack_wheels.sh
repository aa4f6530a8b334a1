#!/usr/bin/env bash
# Gathers the wheels that dsclip needs on a CUDA machine without network which has torch, NumPy and little else.
#
#   example:  tools/pack_wheels.sh wheels            for the Python that runs here
#             tools/pack_wheels.sh wheels 3.12       for another one, x86-64 Linux
#
# Versions are those of constraints.txt. torch, triton, torchvision and NVIDIA's libraries are left out: they must fit the
# machine's driver and each other, and come with it.
set -euo pipefail

case "${1:---help}" in -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
out=$1 version=${2:-} root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"

# What dsclip imports and a bare image may lack, with what those import in turn.
needed="hjson webdataset braceexpand simplejpeg pydantic pydantic-core annotated-types typing-inspection msgpack ninja
  py-cpuinfo einops psutil urllib3 fsspec pyyaml transformers tokenizers safetensors huggingface-hub hf-xet accelerate
  regex tqdm pillow tensorboard tensorboard-data-server absl-py grpcio markdown protobuf werkzeug
  httpx2 httpcore2 h11 anyio idna truststore click typer annotated-doc shellingham rich markdown-it-py mdurl pygments"
# Peers of the benches; where one can't be had, the bench says "not installed".
peers="open_clip_torch ftfy wcwidth timm memeff siglip-kernel"

target=()
if [ -n "$version" ]; then target=(--python-version "$version" --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64); fi
fetch() { python3 -m pip download -q --no-deps --only-binary=:all: ${target[@]+"${target[@]}"} -c "$root/constraints.txt" -d "$out" "$@"; }

fetch $needed
for peer in $peers; do fetch "$peer" || echo "left out: $peer" >&2; done
# DeepSpeed has no wheel: it is built here, without compiling its operators, which it does on first use.
pinned=$(grep -i '^deepspeed==' "$root/constraints.txt")
DS_BUILD_OPS=0 python3 -m pip wheel -q --no-deps --no-build-isolation -w "$out" "$pinned"

count=$(find "$out" -name '*.whl' | wc -l)
echo "$out: $count wheels, $(du -sm "$out" | cut -f1) MB. On the machine, from the checkout:"
echo "  python3 -m pip install --no-index --no-deps $out/*.whl"
echo "  python3 tools/bench_gpu.py --minutes 10 --out docs/benchmarks/\$(date +%F)-CARD.md"
