#!/usr/bin/env bash
# Everything that has to hold, in one command. Without arguments all parts run, in this order; name some to run
# only those:
#
#   install  what the rest needs and the machine lacks: mosquitto, a C compiler, the Rust peer, the pinned tools
#   static   format, vet, lint, tidy go.mod files, Rust format, known vulnerabilities
#   go       all Go tests with the race detector, in random order, with every peer
#   fuzz     each fuzz target for FUZZTIME (2s)
#
# The last line counts what really ran: Go tests, checks and fuzz targets. With CI=true a skipped test is a failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

# Where cargo builds the Rust peer, which takes minutes: once for all checkouts of this user.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/sealmq/rust}"

passed=0 failed=0 skipped=0
bad=()                 # names of what failed
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

say() { printf '\n== %s\n' "$*"; }

# step NAME COMMAND...: one check. Its output is shown when it fails.
step() {
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$out/step" 2>&1; then
    passed=$((passed + 1))
    printf 'ok    %-28s %4ds\n' "$name" $((SECONDS - start))
  else
    failed=$((failed + 1))
    bad+=("$name")
    printf 'FAIL  %-28s %4ds\n' "$name" $((SECONDS - start))
    cat "$out/step"
  fi
}

# need NAME COMMAND...: as step, but nothing after it makes sense without it.
need() {
  local before=$failed
  step "$@"
  [ "$failed" -eq "$before" ] || finish
}

finish() {
  say "result"
  local name
  for name in ${bad[@]+"${bad[@]}"}; do printf 'failed: %s\n' "$name"; done
  if [ "${CI:-}" = true ] && [ "$skipped" -gt 0 ]; then
    printf 'failed: %d tests were skipped, and nothing may be skipped in CI\n' "$skipped"
    failed=$((failed + 1))
  fi
  printf '%d passed, %d failed, %d skipped\n' "$passed" "$failed" "$skipped"
  [ "$failed" -eq 0 ]
  exit
}

# The folders of all Go modules of ours: the main one first, then the nested ones.
modules() { git ls-files --cached --others --exclude-standard 'go.mod' '*/go.mod' | xargs -n1 dirname | sort; }

# --- install

have() { command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ]; }

packages() { # Debian packages for the programs that are missing
  local missing=() as_root=()
  have mosquitto || missing+=(mosquitto)
  have mosquitto_sub || missing+=(mosquitto-clients)
  have cc || missing+=(gcc libc6-dev)
  [ ${#missing[@]} -gt 0 ] || return 0
  echo "missing: ${missing[*]}"
  [ "$(id -u)" -eq 0 ] || as_root=(sudo -n)
  if have apt-get && { [ "$(id -u)" -eq 0 ] || sudo -n true; }; then
    "${as_root[@]}" apt-get update -qq && "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends "${missing[@]}"
    return
  fi
  if [ "${CI:-}" = true ]; then return 1; fi
  echo "install them to run the tests that need them; without them those are skipped"
}

rust_peer() {
  if ! have cargo; then
    echo "cargo is missing: install Rust (https://rustup.rs) to run the tests against the original implementation"
    [ "${CI:-}" != true ]
    return
  fi
  cargo build --release --locked --manifest-path integration/rust/Cargo.toml
}

tools() { go -C tools build -o ../bin/ tool; }

run_install() {
  say "install"
  need "Debian packages" packages
  need "pinned tools" tools
  need "Rust peer" rust_peer
}

# --- static

format() {
  local wrong
  wrong=$(git ls-files --cached --others --exclude-standard '*.go' | xargs -r gofmt -l) || return
  [ -z "$wrong" ] || { printf 'not formatted, run make fmt:\n%s\n' "$wrong"; return 1; }
}

lint() { (cd "$1" && "$OLDPWD/bin/golangci-lint" run --config "$OLDPWD/.golangci.yml" ./...); }

rust_format() { cargo fmt --check --manifest-path integration/rust/Cargo.toml; }

# govulncheck ends with 3 when it found something, and with 1 when it could not look.
vulnerabilities() {
  local code=0
  say "govulncheck"
  timeout 300 bin/govulncheck ./... >"$out/vuln" 2>&1 || code=$?
  case $code in
    0) step "known vulnerabilities" true ;;
    3) step "known vulnerabilities" cat_and_fail "$out/vuln" ;;
    *) printf 'not available: known vulnerabilities were NOT looked up: %s\n' "$(grep -v "^$" "$out/vuln" | tail -n 1)" ;;
  esac
}
cat_and_fail() { cat "$1"; return 1; }

run_static() {
  say "static"
  [ -x bin/golangci-lint ] && [ -x bin/govulncheck ] || need "pinned tools" tools
  step "gofmt" format
  local dir
  for dir in $(modules); do
    # go mod tidy -diff changes nothing and fails where it would.
    step "go mod tidy ($dir)" go -C "$dir" mod tidy -diff
    [ "$dir" != tools ] || continue
    step "go vet ($dir)" go -C "$dir" vet ./...
    step "golangci-lint ($dir)" lint "$dir"
  done
  if have rustfmt; then
    step "cargo fmt" rust_format
  else
    printf 'not available: rustfmt; the format of the Rust peer was NOT checked\n'
  fi
  vulnerabilities
}

# --- go

go_tests() { # MODULE
  local dir=$1
  say "go test ($dir)"
  rm -f "$out/counts"
  # gotestsum hands the counts of the run to the command in its environment.
  if (cd "$dir" && "$OLDPWD/bin/gotestsum" --format "${TEST_FORMAT:-pkgname}" --format-hide-empty-pkg \
      --post-run-command "sh -c 'echo \$TESTS_TOTAL \$TESTS_FAILED \$TESTS_SKIPPED \$TESTS_ERRORS >$out/counts'" \
      -- -race -shuffle=on -timeout 15m ./...); then
    :
  else
    bad+=("go test ($dir)")
    [ -s "$out/counts" ] || failed=$((failed + 1))
  fi
  local total=0 wrong=0 skip=0 errors=0
  [ -s "$out/counts" ] && read -r total wrong skip errors <"$out/counts"
  passed=$((passed + total - wrong - skip))
  failed=$((failed + wrong + errors))
  skipped=$((skipped + skip))
}

run_go() {
  [ -x bin/gotestsum ] || need "pinned tools" tools
  local dir
  for dir in $(modules); do [ "$dir" = tools ] || go_tests "$dir"; done
}

# --- fuzz

# fuzz_one NUMBER FILE TARGET: one target on one core; what it says and how it ended goes into files. Now and then go
# test takes the end of the fuzzing time for a failure of the target: then it has no failing input, and runs again.
# Inputs whose coverage changes from run to run would be minimized for a minute, whatever the fuzzing time.
fuzz_one() {
  local start=$SECONDS code dir try
  dir=$(dirname "$2")
  for try in 1 2 3; do
    code=0
    go test -run='^$' -fuzz="^$3\$" -fuzztime="${FUZZTIME:-2s}" -fuzzminimizetime=1s -parallel=1 "./$dir" >"$out/fuzz.$1" 2>&1 || code=$?
    [ "$code" -ne 0 ] && grep -qx ' *context deadline exceeded' "$out/fuzz.$1" &&
      ! grep -q 'Failing input written' "$out/fuzz.$1" || break
  done
  printf '%s\n' "$code $((SECONDS - start)) $dir $3" >"$out/fuzz.$1.end"
}

run_fuzz() {
  say "fuzz, ${FUZZTIME:-2s} each"
  local file target i n=0 code took dir cores
  cores=$(nproc 2>/dev/null || echo 2)
  git ls-files --cached --others --exclude-standard '*_test.go' | xargs -r grep -Hos '^func Fuzz[A-Za-z0-9_]*' |
    sed 's/:func /:/' | sort -u >"$out/targets"
  [ -s "$out/targets" ] || { step "fuzz targets exist" false; return; }
  while IFS=: read -r file target; do
    while [ "$(jobs -rp | wc -l)" -ge "$cores" ]; do wait -n; done
    n=$((n + 1))
    fuzz_one "$n" "$file" "$target" &
  done <"$out/targets"
  wait
  for ((i = 1; i <= n; i++)); do
    code=1 took=0 dir="target $i" target=""
    [ -s "$out/fuzz.$i.end" ] && read -r code took dir target <"$out/fuzz.$i.end"
    if [ "$code" -eq 0 ]; then
      passed=$((passed + 1))
      printf 'ok    %-40s %4ds\n' "$dir $target" "$took"
    else
      failed=$((failed + 1))
      bad+=("$dir $target")
      printf 'FAIL  %-40s %4ds\n' "$dir $target" "$took"
      cat "$out/fuzz.$i"
    fi
  done
}

parts=("$@")
[ $# -gt 0 ] || parts=(install static go fuzz)
for part in "${parts[@]}"; do
  case $part in
    install | static | go | fuzz) "run_$part" ;;
    *)
      echo "$0: unknown part $part: use install, static, go or fuzz" >&2
      exit 64
      ;;
  esac
done
finish
