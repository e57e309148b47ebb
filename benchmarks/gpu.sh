#!/usr/bin/env bash
# What there is to learn on a GPU, the most valuable first, in nine minutes at most:
#
#     benchmarks/gpu.sh OUT
#     benchmarks/gpu.sh OUT throughput methods   these parts alone, such as those that there was no time left for
#     BIN=.venv/bin benchmarks/gpu.sh OUT        where another python than the PATH's has torch
#     PEERS=~/checkouts benchmarks/gpu.sh OUT    also against other projects, as in run.py
#
# Each part has a time limit and leaves OUT/NAME.log, and what it found in OUT/NAME.json. What fails, misses a goal or
# takes too long keeps nothing that comes after it from being run; what the nine minutes have no room for is named. Most
# of the time goes into the search for the fastest kernels: a minute for a step of MGD, on an H200. On a machine that
# has just been started, reading PyTorch takes another half.
set -uo pipefail

[[ ${1-} ]] || { echo 'usage: benchmarks/gpu.sh OUT [PART...]' >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) && cd "$(dirname "$0")/.." || exit
shift
wanted=" $* " unknown=" $* "
python=${BIN:+$BIN/}python3 work=$(mktemp -d) total=540
trap 'rm -rf "$work"' EXIT

part() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 left=$((total - SECONDS)) begun=$SECONDS
    shift 2
    [[ $wanted == '  ' || $wanted == *" $name "* ]] || return
    unknown=${unknown/ $name / }
    ((left > 15)) || { echo "$name: no time left"; return; }  # not enough to import and build anything
    timeout --kill-after=5 $((limit < left ? limit : left)) "$@" > "$out/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - begun)) s"  # 124: it took too long
    cp "$work/$name"/*.json "$out/$name.json" 2> /dev/null
}

bench() {  # CASE SECONDS
    part "$1" "$2" "$python" benchmarks/run.py "$1" --device cuda --rounds 5 ${PEERS:+--peers "$PEERS"} \
        --output "$work/$1"
}

profile() {  # NAME SECONDS FLAGS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m benchmarks.breakdown --device cuda --batch 256 --output "$work/$name" "$@"
}

nvidia-smi > "$out/nvidia-smi.log" 2>&1
# Whether it is right comes before how fast it is. Four processes share the memory.
part test_cuda 180 "$python" -m pytest -o addopts= -q --tb=short --at-once -n 4 tests/test_cuda.py
bench cifar-kd 120
profile profile-bf16 90 --amp bf16
bench mgd-step 180
bench cifar-run 200  # most of it is compiling, and filling the teacher's table
bench throughput 330  # two runs of the script, most of each compiling
bench throughput-device 450
bench mgd-overhead 150
part curves 240 "$python" -m benchmarks.curves --device cuda --jobs 6 --train 200 --output "$work/curves"
bench memory 120
profile profile-bf16-compiled 150 --amp bf16 --compile  # most of it is compiling
profile profile-fp32 90
bench methods 120
bench loader 180
bench mv2-features 60
bench flow-tracking 60
bench cifar-data 60
[[ $unknown != *[^' ']* ]] || echo "there is no part$unknown"
echo "$SECONDS s, all in $out"
