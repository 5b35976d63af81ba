#!/usr/bin/env bash
# Run benchmarks/gpu.py on a machine with a CUDA GPU that may have no internet access.
#
#   benchmarks/gpu.sh pack FOLDER [DATA]   on this machine: put the working tree, wheels and scans into FOLDER (< 64 MiB)
#   bash FOLDER/run.sh OUTPUT [options]    on the GPU machine, with a copy of FOLDER: write OUTPUT/results.tar.gz
#   benchmarks/gpu.sh unpack FILE          on this machine: put the results into benchmarks/results/, update the tables
#
# The GPU machine needs Python 3.12 with jax, torch and transformers for its GPU. Set PYTHON to use a command other than
# python3, and PYTHON_VERSION to pack wheels for another version. The options are those of `python -m benchmarks.gpu`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
max_bytes=$((64 * 1024 * 1024))

# Packages that JAX and PyTorch do not install. pip does not resolve their dependencies, so all are listed.
wheels=(
    array-record docstring-parser grain jsonargparse msgspec nibabel platformdirs portpicker tabulate typeshed-client
)

pack() {
    local folder=$1 data=${2:-} version=${PYTHON_VERSION:-3.12}
    if [ -e "$folder" ]; then echo "error: $folder: already exists. Choose another folder." >&2; exit 2; fi
    mkdir -p "$folder/wheels" "$folder/tree"
    (cd "$root" && git ls-files --cached --others --exclude-standard -z | tar -c --null -T - ) | tar -x -C "$folder/tree"
    local platforms=() n
    for n in 2014 _2_17 _2_24 _2_27 _2_28; do platforms+=(--platform "manylinux${n}_x86_64"); done
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        "${platforms[@]}" -d "$folder/wheels" "${wheels[@]}"
    # The package looks up its own version, so it is installed too.
    "$python" -m pip wheel -q --no-deps -w "$folder/wheels" "$folder/tree"
    rm -rf "$folder/tree/build" "$folder/tree"/*.egg-info
    if [ -n "$data" ]; then cp -rL "$data" "$folder/data" && chmod -R u+w "$folder/data"; fi
    cp "$root/benchmarks/gpu.sh" "$folder/run.sh"
    local bytes
    bytes=$(du -sb "$folder" | cut -f1)
    echo "$folder: $((bytes / 1024 / 1024)) MiB"
    if [ "$bytes" -gt "$max_bytes" ]; then echo "error: $folder: larger than 64 MiB. Pack fewer scans." >&2; exit 2; fi
}

# FOLDER is the folder of this script. The results are archived even if a stage fails.
run() {
    folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    mkdir -p "$1" && output=$(cd "$1" && pwd) && shift
    site=$(mktemp -d)
    trap 'tar -czf "$output/results.tar.gz" -C "$output/stages" . && rm -rf "$site" "$output/stages"' EXIT
    mkdir -p "$output/stages"
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$folder"/wheels/*.whl
    export PYTHONPATH=$site PYTHONUNBUFFERED=1
    local data=()
    if [ -d "$folder/data" ]; then data=(--data="$folder/data"); fi
    cd "$folder/tree"
    "$python" -m benchmarks.gpu --output="$output/stages" "${data[@]}" "$@" 2>&1 | tee "$output/log.txt"
}

unpack() {
    cd "$root" && "$python" -m benchmarks.tables --unpack="$1"
}

case ${0##*/}-${1:-} in
    gpu.sh-pack) pack "${@:2}" ;;
    gpu.sh-unpack) unpack "$(realpath "$2")" ;;
    run.sh-?*) run "$@" ;;
    *) sed -n '2,9p' "${BASH_SOURCE[0]}" && exit 2 ;;
esac
