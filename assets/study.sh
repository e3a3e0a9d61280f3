#!/bin/bash
# The study of assets/study.md: trains every model into study/SCALE, then makes the tables and figures there.
#
#     bash assets/study.sh cpu     about 9 hours on 2 cores; needs data/kjv, see assets/study.md
#     bash assets/study.sh gpu     on one H100-class GPU; not run yet
#
# Stopped, it continues where it was. Flags of train.py may follow, to try it: bash assets/study.sh cpu --steps=20
set -euo pipefail
cd "$(dirname "$0")/.."
scale=${1-}
case $scale in
cpu) flags="--size=tiny --n_head=4 --steps=4000" lr=0.012 adamw=0.004 text=800 fine="--steps=40 --lr=0.002" jobs=$(nproc) ;;
gpu) flags="--size=30m --steps=1000" lr=0.004 adamw=0.001 text=200 fine="--steps=10 --lr=0.001" jobs=1 ;;
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

# Rows are in order of importance: whoever stops early has fewer rows, but all three seeds of each.
seeds() { while read -r row; do printf "%s\n" "$row $* --seed="{0,1,2}; done; }
bible() {
    seeds --data=kjv --steps=$text --lr=$lr <<-END
	--attn=mha
	--attn=mha_rope
	--attn=mla_rope
	--attn=mla_rope --rank=0.125
	--attn=mla
	--attn=gqa
	--attn=mla_prerope
	--attn=mla_decoupled
	--attn=mla_rope --rank=1
	--attn=mla --rank=1
	--attn=mla_decoupled --rank=0.25
	--attn=gqa --rank=0.25
	--attn=mla_rope --rank=0.25
	--attn=mla_decoupled --joint
	--attn=mla_decoupled --joint --latent_norm --q_rank=0.5
	--attn=mla_decoupled --rank=1
	--attn=mla_decoupled --rank=0.125
	--attn=mla_decoupled --joint --rank=0.25
	END
}
bible_adamw() { # B's variants, and A's
    seeds --data=kjv --steps=$text --optimizer=adamw --lr=$adamw <<-END
	--attn=mha_rope
	--attn=mla_prerope
	--attn=mla_decoupled
	--attn=mla_rope
	--attn=mha
	END
}
conversions() { # two trained models at lower ranks, before and after training for 5% of the steps
    for from in mha_rope mha; do
        for rank in 1 0.75 0.5 0.25 0.125; do
            for joint in "" " --joint"; do
                source=$out/$from-data=kjv-steps=$text-lr=$lr-seed=0/ckpt.pt
                row="--attn=${from/mha/mla} --rank=$rank$joint --data=kjv --init_from=$source"
                printf "%s\n" "$row --steps=0" "$row $fine"
            done
        done
    done
}
rates() { # is the rate above a fair one for every attention?
    for attn in mha mha_rope gqa mla mla_rope mla_prerope mla_decoupled; do
        printf "%s\n" "--attn=$attn --data=kjv --steps=$text --seed=0 --lr="{0.5,2}e-2
    done
}
stories() {
    seeds --lr=$lr <<-END
	--attn=mha_rope
	--attn=mha
	--attn=mla_rope --rank=0.125
	--attn=mla_decoupled
	--attn=mla_rope
	--attn=mla_prerope
	END
}
run() { # the flags are the run's name, too
    local folder=$out/$(sed 's/--init_from=[^ ]*/--converted/; s/--attn=//; s/ --optimizer=/-/; s/ --/-/g' <<<"$*")
    mkdir -p "$folder"
    if ! grep -qs "^next:" "$folder/printed"; then
        echo "$(date +%H:%M) $folder"
        python train.py $flags $* --out="$folder" $([ ! -e "$folder/last.pt" ] || echo --resume) >>"$folder/printed"
    fi
}
export -f run
[ -e data/kjv/meta.json ] || { echo "study.sh: make data/kjv first, as assets/study.md says" >&2 && exit 2; }
[ -e data/stories/meta.json ] || python data/prepare.py
# Runs of one thread each, side by side, train more than one run of all threads. A GPU needs one, and its threads.
[ $scale = gpu ] || export OMP_NUM_THREADS=1
for list in bible conversions bible_adamw rates stories; do
    $list | xargs -P "$jobs" -I{} bash -c "run {}"
done
unset OMP_NUM_THREADS

python assets/study.py $out
for run in lr=$lr adamw-lr=$adamw; do
    python spectrum.py $out/{mha_rope,mla_prerope,mla_decoupled}-data=kjv-steps=$text-$run-seed=? --out=$out/spectra-$run |
        tee $out/spectra-$run.txt
done
