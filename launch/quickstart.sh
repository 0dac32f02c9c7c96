#!/usr/bin/env bash
# The main job on a fresh machine: makes .venv, installs, quantises the bundled model to NF4, and lets it answer over two MPI ranks.
# Needs Python 3.11 or newer and nothing else. A second run finds everything in place and takes seconds.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

case ${1:-} in
    "") ;;
    -h | --help)
        echo "usage: ${0##*/}    (no arguments; TPCPU_PYTHON names the Python to use)"
        exit 0
        ;;
    *) fail "takes no arguments, found: $*" ;;
esac

make_environment
install mpich

# The environment's own mpiexec comes first: one from elsewhere would not match the MPI that was installed here.
export PATH="$VENV/bin:$PATH"
model=$ROOT/build/yuan-tiny-nf4
if [ ! -d "$model" ]; then # quantize leaves a complete folder or none
    mkdir -p "$ROOT/build"
    echo "quantising yuan-tiny to NF4" >&2
    tpcpu quantize "$ROOT/tests/data/yuan-tiny" "$model" --format nf4
fi

question="Tom has 3 boxes with 12 pencils in each box. He gives 9 pencils to his sister. How many pencils does Tom have now?"
printf '\nquestion, to two MPI ranks:\n%s\n\nanswer:\n' "$question"
tpcpu generate --model "$model" --ranks 2 --message "$question" --temperature 0 --max-tokens 64

cat <<EOT

The model is a tiny one, trained for the tests: it writes sentences, it does not reckon. To go on:

  . .venv/bin/activate
  tpcpu generate --model build/yuan-tiny-nf4 --prompt "Once upon a time"
  tpcpu generate --model build/yuan-tiny-nf4 --prompt "Once upon a time" --ranks 3
  tpcpu inspect build/yuan-tiny-nf4
  tpcpu chat --model tests/data/llama-tiny
EOT
