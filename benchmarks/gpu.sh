#!/usr/bin/env bash
# Run benchmarks/gpu.py on a machine with a CUDA GPU that may have no internet access.
#
#   benchmarks/gpu.sh pack FOLDER [DATA]      here: put the working tree, wheels and scans into FOLDER (under 64 MiB)
#   bash FOLDER/run.sh OUTPUT [options]       there, after copying FOLDER: run the stages, write OUTPUT/results.tar.gz
#   benchmarks/gpu.sh unpack FILE             here: put the results into benchmarks/results/, and render the tables
#
# The machine needs Python 3.12 with jax, torch and transformers for its GPU. PYTHON names another Python (python3),
# PYTHON_VERSION another version for the wheels. Options are those of `python -m benchmarks.gpu`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
max_bytes=$((64 * 1024 * 1024))

# What such a machine's JAX and PyTorch do not bring. Installed without their own dependencies, so all are listed.
wheels=(
    array-record docstring-parser grain jsonargparse msgspec nibabel platformdirs portpicker tabulate typeshed-client
)

pack() {
    local folder=$1 data=${2:-} version=${PYTHON_VERSION:-3.12}
    if [ -e "$folder" ]; then echo "error: $folder: exists. Choose another folder." >&2; exit 2; fi
    mkdir -p "$folder/wheels" "$folder/tree"
    (cd "$root" && git ls-files --cached --others --exclude-standard -z | tar -c --null -T - ) | tar -x -C "$folder/tree"
    local platforms=() n
    for n in 2014 _2_17 _2_24 _2_27 _2_28; do platforms+=(--platform "manylinux${n}_x86_64"); done
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
        "${platforms[@]}" -d "$folder/wheels" "${wheels[@]}"
    # The package itself too: it asks for its own version.
    "$python" -m pip wheel -q --no-deps -w "$folder/wheels" "$folder/tree"
    rm -rf "$folder/tree/build" "$folder/tree"/*.egg-info
    if [ -n "$data" ]; then cp -rL "$data" "$folder/data" && chmod -R u+w "$folder/data"; fi
    cp "$root/benchmarks/gpu.sh" "$folder/run.sh"
    local bytes
    bytes=$(du -sb "$folder" | cut -f1)
    echo "$folder: $((bytes / 1024 / 1024)) MiB"
    if [ "$bytes" -gt "$max_bytes" ]; then echo "error: $folder: more than 64 MiB. Pack fewer scans." >&2; exit 2; fi
}

# The packed folder is this script's own. Results are archived however the stages end.
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
