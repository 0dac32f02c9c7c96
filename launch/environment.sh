# shellcheck shell=bash
# The project's own Python environment: found, made, filled. Sourced by quickstart.sh and test.sh.
# Knows Python, venv, pip and the three MPIs; knows nothing of models or tests. Sets ROOT, VENV and PYTHON.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
PYTHON=$VENV/bin/python
LOG=$ROOT/build/install.log

fail() {
    printf '%s: error: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# phase WORD COMMAND...: runs the command quietly and prints the word with the seconds that it took;
# the last lines of what the command wrote are shown when it fails. A quarter of an hour is the limit.
phase() {
    local word=$1 start=$SECONDS
    shift
    mkdir -p "${LOG%/*}"
    printf '%-34s ' "$word ..." >&2
    if timeout 900 "$@" >>"$LOG" 2>&1; then
        printf '%4d s\n' "$((SECONDS - start))" >&2
    else
        printf 'failed after %d s; the end of %s:\n' "$((SECONDS - start))" "$LOG" >&2
        tail -n 20 "$LOG" >&2
        exit 1
    fi
}

# A name on the PATH may be a wrapper that runs nothing, so each candidate is asked and not only looked up.
find_python() {
    local candidate
    local candidates=(python3 python3.13 python3.12 python3.11 python3.14 python)
    [ -z "${TPCPU_PYTHON:-}" ] || candidates=("$TPCPU_PYTHON")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12, 3.13 or 3.14 that runs; tried ${candidates[*]}, and" \
        "${candidates[0]} is $("${candidates[0]}" -V 2>&1 || true);" \
        "install one, or name it: TPCPU_PYTHON=/path/to/python3.12 $0"
}

make_environment() {
    if [ -x "$PYTHON" ] && "$PYTHON" -m pip --version >/dev/null 2>&1; then
        return
    fi
    local python
    python=$(find_python)
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$python has no venv module, which makes private environments;" \
            "on Debian and Ubuntu: apt-get install python3-venv"
    phase "making .venv ($("$python" -V 2>&1))" "$python" -m venv --clear "$VENV"
}

# The extras stand installed when a stamp of what declares them is there; asking pip again would cost seconds at every start.
stamp() {
    local digest
    digest=$(cat "$ROOT/setup.cfg" "$ROOT/pyproject.toml" "$ROOT/tpcpu/__init__.py" | sha256sum)
    printf '%s/installed-%s-%.16s' "$VENV" "$1" "$digest"
}

# install EXTRA...: the package itself, editable, with these extras.
install() {
    local extra missing=""
    for extra in "$@"; do
        [ -e "$(stamp "$extra")" ] || missing+=,$extra
    done
    [ -n "$missing" ] || return 0
    case $missing in
        *,test*)
            # First and alone: what comes later would otherwise pull in another build of torch.
            phase "installing torch for the tests" \
                "$PYTHON" -m pip install "$(sed -n 's/^ *\(torch==.*\)$/\1/p' "$ROOT/setup.cfg")"
            ;;
    esac
    phase "installing tpcpu[${missing#,}]" "$PYTHON" -m pip install --editable "${ROOT}[${missing#,}]"
    for extra in "$@"; do
        : >"$(stamp "$extra")"
    done
}

# environment_of MPI: where the environment with this MPI is. MPICH has .venv itself; the others, whose wheels overwrite
# one another's mpiexec, have environments of their own.
environment_of() {
    case $1 in
        mpich) printf '%s\n' "$VENV" ;;
        *) printf '%s-%s\n' "$VENV" "$1" ;;
    esac
}

# install_mpi openmpi|impi: an environment that has this MPI and tpcpu itself, and takes all else from .venv.
install_mpi() {
    local mpi=$1 environment site
    environment=$(environment_of "$mpi")
    if [ -e "$environment/installed" ] && [ "$(cat "$environment/installed")" = "$(stamp "$mpi")" ]; then
        return
    fi
    site=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    phase "making ${environment##*/}" "$PYTHON" -m venv --clear --without-pip "$environment"
    # this line is carried out at every start of the environment's Python
    printf 'import site; site.addsitedir("%s")\n' "$site" >"$environment/${site#"$VENV"/}/shared.pth"
    phase "installing tpcpu[$mpi]" "$PYTHON" -m pip --python "$environment/bin/python" install --editable "${ROOT}[$mpi]"
    stamp "$mpi" >"$environment/installed"
}
