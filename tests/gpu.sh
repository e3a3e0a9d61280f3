#!/bin/bash
# The GPU checklist: what must work, and how fast it is, on a machine with a GPU. Stops after 9 minutes.
#
#     bash tests/gpu.sh OUT               writes everything into the folder OUT; the last line says what passed
#     DEVICE=cpu bash tests/gpu.sh OUT    the same at toy size, to test this script
#
# Needs torch >= 2.11 and the other packages of requirements.txt. A part that fails does not stop the others.
set -uo pipefail
export DEVICE=${DEVICE-cuda}
mkdir -p "${1?the folder to write to}" && out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
passed= failed=

part() { # NAME SECONDS COMMAND...
    local name=$1 start=$SECONDS limit=$((SECONDS + $2 < 530 ? $2 : 530 - SECONDS))
    shift 2
    [ "$limit" -gt 0 ] || { failed+=" $name(no time left)" && return; }
    echo "== $name: $*"
    if timeout -k 20 "$limit" "$@" >"$out/$name.txt" 2>&1; then passed+=" $name"; else failed+=" $name"; fi
    tail -n 12 "$out/$name.txt" && echo "   $((SECONDS - start)) s"
}
train_for() { # SECONDS OUT FLAGS...: stops by Ctrl-C, which must save, after at least one measured speed
    timeout --preserve-status -k 30 -s INT "$1" python train.py "${@:3}" --device="$DEVICE" --out="$2"
    local status=$?
    [[ $status = 0 || $status = 130 ]] && grep -q '"tokens_per_second": [0-9]' "$2/log.jsonl"
}
export -f train_for

versions='import sys, torch; cuda = torch.cuda.is_available(); print(sys.version, torch.__version__, torch.version.cuda)
print(torch.cuda.get_device_properties(0) if cuda else "no GPU", torch.get_num_threads(), "threads")'
if [ "$DEVICE" = cpu ]; then
    default="--size=tiny" larger="--size=tiny --n_layer=6" long=20 short=10 interval=5
    shape="--size tiny --batch 2 --context 64" graphs=
else
    default= larger="--size=124m" long=120 short=75 interval=20
    shape="--batch 64 --context 4096" graphs=--compile
fi
part versions 60 python -c "$versions"
part data 120 python data/prepare.py
part tests 200 python -m pytest tests/test_gpu.py -m gpu
part default $((long + 40)) bash -c 'train_for "$@"' - "$long" "$out/default" $default --eval_interval=$interval
part larger $((short + 40)) bash -c 'train_for "$@"' - "$short" "$out/larger" $larger --eval_interval=$interval
part decode 100 python bench.py --device "$DEVICE" $shape --rounds=1 --out="$out/decode"
part graphs 120 python bench.py --device "$DEVICE" $shape --rounds=1 --attn mha mla_prerope $graphs --out="$out/graphs"
part spectrum 60 python spectrum.py "$out/default/ckpt.pt" --out="$out/spectrum"
rm -f "$out"/*/*.pt # large, and not needed any more
echo "passed:$passed${failed:+; FAILED:$failed} ($SECONDS s)" | tee "$out/summary.txt"
[ -z "$failed" ]
