#!/bin/bash
# The study of assets/study.md: trains every model into study/SCALE, then makes the tables and figures there.
#
#     bash assets/study.sh cpu     about 10 hours on 2 cores
#     bash assets/study.sh gpu     on one H100-class GPU; not run yet
#
# Stopped, it continues where it was. Flags of train.py may follow, to try it: bash assets/study.sh cpu --steps=20
set -euo pipefail
cd "$(dirname "$0")/.."
scale=${1-}
case $scale in
cpu) flags="--size=tiny --n_head=4 --steps=4000" lr=0.012 adamw=0.004 fine="--steps=200 --lr=0.002" text=800 jobs=$(nproc) ;;
gpu) flags="--size=30m --steps=1000" lr=0.004 adamw=0.001 fine="--steps=50 --lr=0.001" text=200 jobs=1 ;;
*) echo "study.sh: '$scale': must be cpu or gpu" >&2 && exit 2 ;;
esac
export out=study/$scale flags="$flags ${*:2}"
mkdir -p $out
exec 9>$out/lock
flock -n 9 || { echo "study.sh: another one is at work in $out" >&2 && exit 1; }
[ ! -e $out/flags ] || [ "$(<$out/flags)" = "$flags" ] || {
    echo "study.sh: $out was made with $(<$out/flags); move it away" >&2 && exit 2
}
echo "$flags" >$out/flags

seeds() { while read -r row; do printf "%s\n" "$row --seed="{0,1,2}; done; }
sources() { # of the conversions
    seeds <<-END
	--attn=mha_rope --lr=$lr
	--attn=mha --lr=$lr
	END
}
latents() { # in order of importance: whoever stops early has fewer rows, but all three seeds of each
    seeds <<-END
	--attn=mla_rope --lr=$lr
	--attn=mla_decoupled --lr=$lr
	--attn=mla_rope --rank=0.125 --lr=$lr
	--attn=mla --lr=$lr
	--attn=gqa --lr=$lr
	--attn=mla_prerope --lr=$lr
	--attn=mha_rope --optimizer=adamw --lr=$adamw
	--attn=mla_prerope --optimizer=adamw --lr=$adamw
	--attn=mla_decoupled --optimizer=adamw --lr=$adamw
	--attn=mla_decoupled --joint --rank=0.25 --lr=$lr
	END
}
texts() { # real text, if there is any: see assets/study.md
    [ ! -e data/kjv/meta.json ] || seeds <<-END
	--attn=mha --data=kjv --steps=$text --lr=$lr
	--attn=mha_rope --data=kjv --steps=$text --lr=$lr
	--attn=mla_rope --data=kjv --steps=$text --lr=$lr
	--attn=mla_rope --rank=0.125 --data=kjv --steps=$text --lr=$lr
	--attn=mla --data=kjv --steps=$text --lr=$lr
	--attn=gqa --data=kjv --steps=$text --lr=$lr
	--attn=mla_prerope --data=kjv --steps=$text --lr=$lr
	--attn=mla_decoupled --data=kjv --steps=$text --lr=$lr
	--attn=mla_rope --rank=1 --data=kjv --steps=$text --lr=$lr
	END
}
conversions() { # two trained models at lower ranks, before and after a short training
    for from in mha_rope mha; do
        for rank in 1 0.75 0.5 0.25 0.125; do
            for joint in "" " --joint"; do
                row="--attn=${from/mha/mla} --rank=$rank$joint --init_from=$out/$from-lr=$lr-seed=0/ckpt.pt"
                printf "%s\n" "$row --steps=0" "$row $fine"
            done
        done
    done
}
run() { # the flags are the run's name, too
    local folder=$out/$(sed 's/--init_from=[^ ]*/--converted/; s/--optimizer=//; s/--attn=//; s/ --/-/g' <<<"$*")
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
for list in texts sources conversions latents; do
    $list | xargs -P "$jobs" -I{} bash -c "run {}"
done
unset OMP_NUM_THREADS

python assets/study.py $out
for optimizer in "" -adamw; do
    python spectrum.py $out/{mha_rope,mla_prerope,mla_decoupled}$optimizer-lr=*-seed=* --out=$out/spectra$optimizer |
        tee $out/spectra$optimizer.txt
done
