# Tests on emulated machines: of the CPU device on instruction sets that this machine lacks, and of RDMA. Part of deploy/run,
# whose functions it uses.

arm=aarch64-unknown-linux-gnu
skip="(BATON_SKIP_EMULATED=1 leaves the tests on emulated machines out)"

# Where an emulator cannot be had, BATON_SKIP_EMULATED=1 leaves these tests out.
run_emulated_tests() {
  if [ "${BATON_SKIP_EMULATED:-}" = 1 ]; then
    say "other instruction sets and RDMA are NOT tested: BATON_SKIP_EMULATED=1"
    return
  fi
  case $(uname -m) in
    x86_64)
      test_roce
      test_arm64
      test_avx512
      ;;
    *) say "only x86-64 machines emulate others: on this one the ordinary tests are all" ;;
  esac
}

# The runtime's own tests and its tiny reference models on arm64. SmolLM2 takes an emulator too long.
test_arm64() {
  need_arm64
  say "testing arm64, emulated"
  BATON_TEST_KERNELS="neon, portable" RUSTC=$arm_rustc \
    CARGO_TARGET_DIR=$target/arm CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=0 \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
    cargo test --locked -p baton-runtime --target "$arm" --lib --test huggingface -- --skip smollm2
}

# programs_of NAME...: the programs that `cargo test --workspace` makes of these targets, a line each. Built for their packages
# alone they would be others, as what they depend on has other features then. Fails unless each is found.
programs_of() {
  cargo test --locked --workspace --lib --test rdma --test killed --no-run --message-format json-render-diagnostics |
    python3 -c 'import json, sys
made = [line for line in map(json.loads, sys.stdin) if line.get("executable") and line["profile"]["test"]]
programs = {line["target"]["name"]: line["executable"] for line in made}
missing = [name for name in sys.argv[1:] if name not in programs]
if missing:
    sys.exit("error: no program of tests is made of " + ", ".join(missing))
print(*map(programs.get, sys.argv[1:]), sep="\n")' "$@"
}

# The kernels for AVX-512 against all others, on a machine that is booted for them.
test_avx512() {
  local packages=(bochs bochs-term bochsbios xorriso) program
  dpkg -s "${packages[@]}" >/dev/null 2>&1 || apt_install "${packages[@]}" ||
    die "the tests need an emulator: apt-get install ${packages[*]} $skip"
  say "testing AVX-512, emulated"
  program=$(programs_of baton_runtime)
  BATON_TEST_KERNELS="avx512 vnni, avx512, avx2, portable" \
    "$root/deploy/emulated/avx512" "$program" devices::cpu 2>&1 | tee "$cache/avx512.log"
  grep -q "the_kernels_are_those_expected ... ok" "$cache/avx512.log" || die "the kernels for AVX-512 were not among those tested"
}

# Reads over the kernel's own RDMA, two ports of it. The tests of faults set its network devices down. The machine must be
# made of Debian's packages; where they cannot be had the rest is tested all the same.
test_roce() {
  local why
  if ! why=$(deploy/emulated/roce --fetch 2>&1); then
    say "RDMA is NOT tested, because ${why##*error: }"
    return
  fi
  say "testing RDMA, emulated"
  programs_of baton_kvtransfer rdma killed | while read -r program; do
    BATON_TEST_RDMA_NETWORK="dummy0 dummy1" \
      "$root/deploy/emulated/roce" "$program" rdma --include-ignored --test-threads 1 </dev/null 2>&1 || exit
  done | tee "$cache/roce.log"
  for name in both_ports_are_found caches_cross_over_rdma over_rdma_either_side; do
    grep -q "$name.* ... ok" "$cache/roce.log" || die "the tests of RDMA did not run"
  done
}

# has_arm RUSTC: that compiler has the standard library of arm64.
has_arm() {
  local folder
  folder=$("$1" --print target-libdir --target "$arm" 2>/dev/null) && [ -d "$folder" ]
}

need_arm64() {
  local packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)
  { has aarch64-linux-gnu-gcc && has qemu-aarch64 && [ -e /usr/aarch64-linux-gnu/lib/libc.so ]; } ||
    apt_install "${packages[@]}" || die "the tests need an emulated arm64: apt-get install ${packages[*]} $skip"
  for arm_rustc in rustc "$cache/bin/arm-rustc"; do
    ! has_arm "$arm_rustc" || return 0
  done
  { unpack_arm_rust && has_arm "$arm_rustc"; } ||
    die "the tests need a compiler for arm64: rustup target add $arm $skip"
}

# Debian's compiler, for which Debian has arm64's standard library too, into .cache/arm-rust: installed, it would take the
# place of the machine's own. apt keeps a list of packages of its own there, so that the machine need not know arm64's.
unpack_arm_rust() {
  has apt-get || return 1
  local folder=$cache/arm-rust files=$cache/arm-rust/files package
  say "unpacking a Rust compiler for arm64 (Debian) into ${folder#"$root"/}"
  rm -rf "$folder"
  mkdir -p "$files" "$folder/lists/partial" "$folder/archives/partial"
  cat >"$folder/apt.conf" <<END
APT::Architectures { "$(dpkg --print-architecture)"; "arm64"; };
Dir::State::Lists "$folder/lists";
Dir::Cache "$folder";
Acquire::Languages "none";
Debug::NoLocking "true";
END
  (
    export APT_CONFIG=$folder/apt.conf
    apt-get update -q && cd "$folder/archives" &&
      apt-get install -qy --download-only --reinstall --no-install-recommends rustc-web libstd-rust-web-dev &&
      apt-get download -q libstd-rust-web-dev:arm64
  ) >"$cache/apt.log" 2>&1 || { tail -n 5 "$cache/apt.log" >&2; return 1; }
  for package in "$folder"/archives/*.deb; do
    dpkg-deb -x "$package" "$files" || return 1
  done
  rm -rf "$folder/archives" "$folder/lists"
  local libraries=lib/$(uname -m)-linux-gnu
  wrapper arm-rustc "LD_LIBRARY_PATH='$files/usr/$libraries:$files/$libraries' exec '$files/usr/bin/rustc' \"\$@\""
}
