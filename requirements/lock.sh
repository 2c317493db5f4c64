#!/usr/bin/env bash
# Resolve the requirements of requirements/*.in and write them with hashes to the requirements files.
#
#   pip install uv==0.13.9 && bash requirements/lock.sh [NAME...]
#
#   NAME  cosyvoice, asr, corpus, verl, verl-gpu or tests; all without one
#
# Versions that a requirements file has already are kept where they still fit; --upgrade in UV_ARGS renews them.
# torch is left out of the environments for a CPU and written without a hash: its builds for CPU and for CUDA are
# different files of the same version, from different indexes. The CUDA libraries of torch's metadata come with it.
set -euo pipefail

cd "$(dirname "$0")"
cuda=(triton cuda-{bindings,pathfinder,toolkit} nvidia-{cublas,cuda-{cupti,nvrtc,runtime},cudnn-cu13,cufft,cufile,curand}
  nvidia-{cusolver,cusparse,cusparselt-cu13,nccl-cu13,nvjitlink,nvshmem-cu13,nvtx})

lock() {
  local name=$1 output=$2
  shift 2
  local part=$output.part
  [[ ! -f $output ]] || cp "$output" "$part"
  # shellcheck disable=SC2086  # several arguments in one variable
  uv pip compile --quiet --generate-hashes --no-annotate --no-header --python-version 3.11.5 \
    --python-platform x86_64-manylinux_2_35 --override overrides.txt "$@" "$name.in" --output-file "$part" ${UV_ARGS-}
  {
    echo "# Made by requirements/lock.sh from requirements/$name.in: edit that file."
    grep -v '^#' "$part"
    sed -n 's/^\(torch==[^ ]*\).*/\1  # no-hash: builds for CPU and CUDA differ/p' "$name.in"
  } >"$output"
  rm "$part"
}

lock_cosyvoice() { lock cosyvoice ../requirements-cosyvoice.txt "${without_torch[@]}"; }
lock_asr() { lock asr ../requirements-asr.txt -c ../requirements-cosyvoice.txt "${without_torch[@]}"; }
lock_corpus() { lock corpus ../tiny_stack/requirements-corpus.txt --no-deps -c ../requirements-cosyvoice.txt; }
lock_tests() { lock tests ../tests/requirements.txt --no-deps; }
lock_verl() { lock verl ../requirements-verl.txt "${without_torch[@]}"; }
lock_verl-gpu() { lock verl-gpu ../requirements-verl-gpu.txt; }

without_torch=(--no-emit-package torch)
for package in "${cuda[@]}"; do without_torch+=(--no-emit-package "$package"); done
(($#)) || set -- cosyvoice asr corpus tests verl verl-gpu
for name; do "lock_$name"; done
