#!/usr/bin/env bash
set -euo pipefail

usage() {
    cat <<'EOF'
tools/quickstart.sh draws first pictures with a trained detector that lies here. Then it trains a small
RetinaNet made of stand-alone self-attention, evaluates it and writes a page of pictures. Nothing need be
installed before but Python 3.10 to 3.13 and g++.

    bash tools/quickstart.sh                     on handwritten digits, made on the spot
    bash tools/quickstart.sh --data DIR          on your own data in COCO's format:
                                                 DIR/annotations/instances_{train,val}.json,
                                                 DIR/train/ and DIR/val/ with the images

    --work-dir DIR   folder for the results (default: work_dirs/quickstart, or work_dirs/NAME for
                     data in a folder NAME)
    --epochs N       train for N epochs instead of the config's number
    --fresh          train anew; an earlier run's folder is renamed, not deleted
    --no-train       stop after the first pictures; goes without other arguments
    --help           show this

Interrupt it as you like: the same command goes on from the last checkpoint. When it has finished,
the same command shows the result again. SASA_PYTHON=/path/to/python uses an environment of yours.
EOF
}

DATA='' WORK_DIR='' EPOCHS='' FRESH='' NO_TRAIN=''
while (($#)); do
    case "$1" in
        --data | --work-dir | --epochs)
            [[ -n "${2:-}" ]] || { echo "$1 needs a value; see --help" >&2; exit 2; }
            case "$1" in
                --data) DATA="$2" ;;
                --work-dir) WORK_DIR="$2" ;;
                --epochs) EPOCHS="$2" ;;
            esac
            shift 2 ;;
        --fresh) FRESH=yes; shift ;;
        --no-train) NO_TRAIN=yes; shift ;;
        --help | -h) usage; exit ;;
        *) echo "unknown argument '$1'; see --help" >&2; exit 2 ;;
    esac
done
[[ -z "$EPOCHS" || "$EPOCHS" =~ ^[1-9][0-9]*$ ]] ||
    { echo "--epochs must be a whole number of at least 1, not '$EPOCHS'" >&2; exit 2; }
[[ -z "$NO_TRAIN" || -z "$DATA$WORK_DIR$EPOCHS$FRESH" ]] ||
    { echo '--no-train goes without other arguments, which are of the training' >&2; exit 2; }
[[ -z "$DATA" || -d "$DATA" ]] || { echo "--data: there is no folder '$DATA'" >&2; exit 2; }

# The user's paths are relative to the user's folder, ours to the project's folder.
[[ -z "$DATA" ]] || DATA="$(cd "$DATA" && pwd)"
[[ -z "$WORK_DIR" || "$WORK_DIR" == /* ]] || WORK_DIR="$PWD/$WORK_DIR"

# shellcheck source=tools/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" sklearn
cd "$ROOT"

DIGITS_CONFIG='configs/quickstart/retinanet_sasa-tiny_digits.py'
OWN_DATA_BASE='sasa_det::quickstart/retinanet_sasa-tiny_coco-format.py'
: "${WORK_DIR:=work_dirs/$([[ -z "$DATA" ]] && echo quickstart || basename "$DATA")}"
SETTINGS="data: ${DATA:-digits}, epochs: ${EPOCHS:-as configured}"

show_result() {
    "$PYTHON" - "$WORK_DIR/coco.json" <<'EOF'
import json
import sys

numbers = json.load(open(sys.argv[1]))
del numbers['per_class']
print('   '.join(f'{name} {value:.3f}' for name, value in numbers.items()))
print(f'AP50 = {numbers["AP50"]:.3f}')
EOF
    echo "The page with the pictures: $(cd "$WORK_DIR" && pwd)/index.html"
}

first_pictures() {
    # It refuses a folder that another version has made.
    rm -rf work_dirs/demo
    "$PYTHON" -m sasa_det demo --out work_dirs/demo
}

if [[ -n "$NO_TRAIN" ]]; then
    first_pictures
    [[ "$PYTHON" != "$SASA_VENV/bin/python" ]] ||
        printf '\nThe command sasa-det is there after: source %q\n' "$SASA_VENV/bin/activate"
    exit
fi
if [[ -n "$FRESH" && -d "$WORK_DIR" ]]; then
    aside="$WORK_DIR.$(date +%Y%m%d-%H%M%S)"
    mv "$WORK_DIR" "$aside"
    echo "The earlier run is now in $aside"
fi
if [[ -f "$WORK_DIR/settings.txt" && "$(<"$WORK_DIR/settings.txt")" != "$SETTINGS" ]]; then
    echo "$WORK_DIR holds a run with other settings ($(<"$WORK_DIR/settings.txt"))." >&2
    echo 'Name another folder with --work-dir, or train anew with --fresh.' >&2
    exit 1
fi
if [[ -f "$WORK_DIR/finished" ]]; then
    echo "This run has finished before, in $WORK_DIR; --fresh trains anew."
    show_result
    exit
fi

# Even after a long run the terminal should show how to continue.
trap 'echo; echo "Interrupted. The same command goes on from the last checkpoint."; exit 130' INT TERM
mkdir -p "$WORK_DIR"
echo "$SETTINGS" >"$WORK_DIR/settings.txt"

if [[ ! -f "$WORK_DIR/last_checkpoint" ]]; then
    first_pictures
    printf '\nNow a detector of your own is trained. Its page comes at the end.\n'
fi

launch=()
stretch=()
[[ -z "$EPOCHS" ]] || stretch=(--max-epochs "$EPOCHS")
if [[ -z "$DATA" ]]; then
    "$PYTHON" -m sasa_det demo-data
fi
if [[ -z "$DATA$EPOCHS" ]]; then
    CONFIG="$DIGITS_CONFIG"
else
    CONFIG="$WORK_DIR/given/config.py"  # training writes its own into the folder
    BASE="$([[ -z "$DATA" ]] && echo "$DIGITS_CONFIG" || echo "$OWN_DATA_BASE")"
    "$PYTHON" -m sasa_det coco-config "${DATA:-data/digits}" --out "$CONFIG" --base "$BASE" \
        ${stretch[@]+"${stretch[@]}"}
fi

train=(-m sasa_det train "$CONFIG" --work-dir "$WORK_DIR")
# The batch is the config's 8 either way. On a CPU two processes are much faster than one of twice the threads.
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    train+=(--cfg-options "train_dataloader.batch_size=4")
    threads=$(($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) / 2))
    launch=(env "OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 1 ? threads : 1))}")
    train=(-m torch.distributed.run --standalone --nproc_per_node=2 "${train[@]}" --launcher pytorch)
fi
resume=()
if [[ -f "$WORK_DIR/last_checkpoint" ]]; then
    echo "Going on from $(<"$WORK_DIR/last_checkpoint")"
    resume=(--resume)
fi
# mmdet's own tools/train.py and tools/test.py, from its package.
${launch[@]+"${launch[@]}"} "$PYTHON" "${train[@]}" ${resume[@]+"${resume[@]}"}
CHECKPOINT="$(<"$WORK_DIR/last_checkpoint")"
evaluate=(-m sasa_det test "$CONFIG" "$CHECKPOINT" --work-dir "$WORK_DIR" --out "$WORK_DIR/predictions.pkl")
report=(-m sasa_det report "$CONFIG" "$CHECKPOINT" --work-dir "$WORK_DIR" --predictions "$WORK_DIR/predictions.pkl")
"$PYTHON" "${evaluate[@]}"
# The page says how it was made, in as many processes.
as_typed() { printf '%q ' "$@" | sed 's/ $//'; }
"$PYTHON" "${report[@]}" --commands "$(as_typed ${launch[@]+"${launch[@]}"} python "${train[@]}")
$(as_typed python "${evaluate[@]}")
$(as_typed python "${report[@]}")"
touch "$WORK_DIR/finished"
echo
show_result
