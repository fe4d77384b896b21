//! A real agent process, real jails and a stand-in for the VMM: apply, run, stop, kill the agent, remove.
//!
//! This program is three things: the test runner, and, executed by the agent under test, the VMM (`--config-fd N`). The VMM
//! here boots no guest; it speaks the control protocol and tells what its jail looks like. Real guests are tested in the rig.
//! Needs root, for the jails; without it the one line printed is the reason.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a failed test is what they are for"
)]

mod agent;
mod cases;
mod vmm;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["--config-fd", number] => vmm::run(number.parse().unwrap()),
        ["probe", "--json"] => {
            println!(r#"{{"guests":"no_kvm","reason":"a stand-in"}}"#);
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    if let Some(reason) = agent::cannot_run() {
        println!("skipped: agent lifecycle: {reason}");
        return ExitCode::SUCCESS;
    }
    if words.iter().any(|word| word == "--list") {
        return ExitCode::SUCCESS;
    }
    let wanted = words.iter().find(|word| !word.starts_with('-'));
    let mut failed = 0;
    for (name, case) in cases::ALL {
        if wanted.is_some_and(|wanted| !name.contains(wanted.as_str())) {
            continue;
        }
        let begin = std::time::Instant::now();
        let passed = catch_unwind(AssertUnwindSafe(case)).is_ok();
        println!(
            "test {name} ... {} ({:.1} s)",
            if passed { "ok" } else { "FAILED" },
            begin.elapsed().as_secs_f32()
        );
        failed += u32::from(!passed);
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
