//! What guests are told of their processor: no more than their baseline says, and nothing that is not so.

use std::io::{self, Write};
use std::process::Command;

use blixard_vmm_api::control::Request;
use blixard_vmm_api::cpu::CpuBaseline;
use blixard_vmm_api::snapshot::SnapshotKind;

use crate::code;
use crate::snapshot::{Snapshot, hundred, kill, refusal, seal, sections};
use crate::vm::{Ended, Vm, possible};

/// Bits of the register that are weaknesses.
const WEAKNESSES: u64 = 1 << 2 | 1 << 19;

/// What this host offers, and what it has in `IA32_ARCH_CAPABILITIES`; nothing where guests cannot be asked.
fn host() -> Option<(CpuBaseline, u64)> {
    if !possible() {
        return None;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_blixard-vmm")).arg("cpu-baseline").output().unwrap();
    let baseline: CpuBaseline = serde_json::from_slice(&output.stdout).unwrap();
    let capabilities = baseline.arch_capabilities;
    if capabilities.is_none() {
        let _ = writeln!(io::stderr(), "skipped: this host's guests have no IA32_ARCH_CAPABILITIES");
    }
    Some((baseline, capabilities?))
}

fn run(baseline: &CpuBaseline, capabilities: u64) -> Ended {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("baseline");
    let baseline = CpuBaseline { arch_capabilities: Some(capabilities), ..baseline.clone() };
    std::fs::write(&path, serde_json::to_vec(&baseline).unwrap()).unwrap();
    Vm::run(code::prints_capabilities(), &["--cpu", path.to_str().unwrap()]).end()
}

fn lacking(capabilities: u64) -> u64 {
    (0..32).map(|bit| 1 << bit).find(|bit| capabilities & bit == 0 && WEAKNESSES & bit == 0).unwrap()
}

/// What a guest of a baseline with `told` reads; nothing where guests cannot read it, as in software flavours of KVM.
fn shown(baseline: &CpuBaseline, told: u64) -> Option<u64> {
    let end = run(baseline, told);
    let letters = end.output.bytes().fold(0, |shown, letter| shown << 4 | u64::from(letter - b'a'));
    match end.code {
        Some(0) => Some(letters),
        Some(5) => None,
        _ => panic!("{end:?}"),
    }
}

#[test]
fn a_guest_is_told_what_its_baseline_says_and_a_host_that_lacks_it_is_refused() {
    let Some((baseline, host)) = host() else { return };
    for told in [host, host & 1, 0] {
        let told = told | host & WEAKNESSES;
        let shown = shown(&baseline, told);
        assert!(shown.is_none_or(|shown| shown == told & 0xFFFF_FFFF), "{shown:x?}, not {told:#x}");
    }
    let end = run(&baseline, host | lacking(host));
    assert_eq!((end.code, end.problems.contains("of MSR 0x10a")), (Some(2), true), "{end:?}");
}

#[test]
fn a_snapshot_that_promises_what_the_host_lacks_is_refused() {
    let Some((_, host)) = host() else { return };
    let vm = Vm::run(code::prints_letters(), &["--control", "DIR/control", "--rng", "--memory", "16"]);
    hundred(&vm);
    vm.control().ask(&Request::Pause);
    let (snapshot, _) = Snapshot::take(&vm.control(), SnapshotKind::Full);
    kill(vm);
    let mut state = std::fs::read(snapshot.path("state")).unwrap();
    assert_eq!(refusal(&snapshot, &state), None);
    let (name, content, length) = sections(&state).into_iter().find(|(name, ..)| name == "vcpu.0").unwrap();
    // The last field is a list of registers: number and value.
    let last = content + length - 12;
    state[last..last + 4].copy_from_slice(&0x10Au32.to_le_bytes());
    state[last + 4..last + 12].copy_from_slice(&(host | lacking(host)).to_le_bytes());
    seal(&mut state, &name, content, length);
    let end = refusal(&snapshot, &state).expect("it is refused");
    assert!(end.problems.contains("section vcpu.0") && end.problems.contains("of MSR 0x10a"), "{end:?}");
}
