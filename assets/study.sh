#!/bin/bash
# The study of README.md: trains everything into study/SCALE, then makes its tables and figures there.
#
#     bash assets/study.sh cpu     about 100 minutes on 2 cores
#     bash assets/study.sh gpu     on one H100-class GPU
#
# Stopped, it goes on where it was. Flags of train.py may follow, to try it: bash assets/study.sh cpu --steps=20
set -euo pipefail
cd "$(dirname "$0")/.."
scale=${1-}
case $scale in
cpu) flags="--size=tiny --n_embd=256 --n_head=4 --optimizer=adamw --batch_size=4 --steps=1000 --lr=0.003" rates="0.00075 0.0015 0.006" jobs=$(nproc) ;;
gpu) flags="--size=30m --optimizer=adamw --batch_size=64 --steps=800 --lr=0.001" rates="0.0005 0.002" jobs=1 ;;
*) echo "study.sh: '$scale': must be cpu or gpu" >&2 && exit 2 ;;
esac
export out=study/$scale flags="$flags ${*:2}"
mkdir -p $out/rates
exec 9>$out/lock
flock -n 9 || { echo "study.sh: another one is at work in $out" >&2 && exit 1; }
[ ! -e $out/flags ] || [ "$(<$out/flags)" = "$flags" ] || {
    echo "study.sh: $out was made with $(<$out/flags); move it away" >&2 && exit 2
}
echo "$flags" >$out/flags

runs() {
    for seed in 0 1 2; do
        for attn in mha mha_rope mla mla_rope mla_decoupled; do echo "--attn=$attn --seed=$seed"; done
        # what stood out with one seed
        printf '%s\n' "--attn=mla --rank=1 --seed=$seed" "--attn=mla_decoupled --rank=0.25 --seed=$seed"
        [ $seed = 0 ] || continue
        printf '%s\n' "--attn=gqa" "--attn=mla_prerope" "--attn=mla_decoupled --joint"
        printf '%s\n' "--attn=mla_rope --rank="{1,0.25,0.125} "--attn=mla_decoupled --rank="{1,0.125}
    done
    for attn in mha mha_rope mla_rope; do # is the learning rate right for all?
        for lr in $rates; do echo "--attn=$attn --lr=$lr"; done
    done
}
run() { # its own flags are its name, too
    local folder=$out
    [[ $* != *--lr* ]] || folder=$out/rates
    folder=$folder/$(sed 's/--attn=//; s/ --/-/g' <<<"$*")
    mkdir -p "$folder"
    if ! grep -qs "^next:" "$folder/printed"; then
        echo "$(date +%H:%M) $folder"
        python train.py $flags $* --out="$folder" $([ ! -e "$folder/last.pt" ] || echo --resume) >>"$folder/printed"
    fi
}
export -f run
[ -e data/stories/meta.json ] || python data/prepare.py
# Runs of one thread each, side by side, train more than one run of all threads. A GPU needs one, and its threads.
[ $scale = gpu ] || export OMP_NUM_THREADS=1
runs | xargs -P "$jobs" -I{} bash -c "run {}"
unset OMP_NUM_THREADS

python bench.py $out/*/ckpt.pt --judge=50 --out=$out
python bench.py $out/{mha,mha_rope,mla_rope}-seed=0/ckpt.pt $out/rates/*/ckpt.pt \
    --rounds=1 --columns val_loss excess loss_to_mha --out=$out/rates
for null in chain mp; do
    python spectrum.py $out/{mha_rope-seed=0,mla_prerope,mla_decoupled-seed=0} --null=$null --out=$out |
        tee $out/spectrum_$null.txt
done
