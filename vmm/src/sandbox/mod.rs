//! What a process and its threads may ask of the kernel: seccomp filters and Landlock, in two phases.
//!
//! ```text
//!   process start ── enter() ──► set-up: no path, no socket, no program     ── per thread: enter_io(), enter_vcpu() ──► run:
//!                                what the configuration named is opened up                    no new descriptor but events
//! ```
//!
//! Filters add up: a call must pass those of both phases. What is not in the tables of [`filters`] is refused, and the process
//! ends with the number of the call as its reason ([`forbidden`]).

pub mod filters;
pub mod forbidden;
pub mod landlock;

mod bpf;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::sock_filter;

use bpf::Assembler;
use filters::{IO, PAGER, SETUP, VCPU};

/// Why the sandbox cannot be entered.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The process cannot give up gaining privileges.
    #[error("no_new_privs")]
    Privileges(#[source] io::Error),
    /// The handler of refused calls cannot be installed.
    #[error("handler of SIGSYS")]
    Handler(#[source] io::Error),
    /// Landlock is there and refuses.
    #[error("landlock")]
    Landlock(#[source] io::Error),
    /// The kernel refuses a filter.
    #[error("seccomp: apply the filter of {phase}")]
    Apply {
        /// Phase or kind of thread.
        phase: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

macro_rules! program {
    ($name:ident, $tables:expr) => {
        static $name: &[sock_filter] = {
            const ASSEMBLED: Assembler = Assembler::compile($tables);
            const CUT: [sock_filter; ASSEMBLED.length()] = ASSEMBLED.cut();
            &CUT
        };
    };
}

program!(PROGRAM_SETUP, &[SETUP, IO, VCPU, PAGER]);
program!(PROGRAM_IO, &[IO]);
program!(PROGRAM_VCPU, &[VCPU]);
program!(PROGRAM_PAGER, &[PAGER]);

/// Version of Landlock's interface that denies everything to this process; 0 when none does.
static LANDLOCK: AtomicU32 = AtomicU32::new(0);

/// Enters the first phase: nothing can be opened or executed any more. To be called before there are threads. With `log_only`
/// calls that a filter forbids are logged by the kernel and made.
///
/// # Errors
/// The kernel refuses.
pub fn enter(log_only: bool) -> Result<(), SandboxError> {
    // SAFETY: no pointers are involved.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(SandboxError::Privileges(io::Error::last_os_error()));
    }
    let version = landlock::deny_all().map_err(SandboxError::Landlock)?;
    LANDLOCK.store(version.unwrap_or(0), Ordering::Relaxed);
    forbidden::catch().map_err(SandboxError::Handler)?;
    apply("set-up", PROGRAM_SETUP, log_only)
}

/// Version of Landlock's interface that holds this process; `None` where the kernel has none.
pub fn landlock_version() -> Option<u32> {
    Some(LANDLOCK.load(Ordering::Relaxed)).filter(|version| *version > 0)
}

/// Puts the filter of the I/O thread on the calling thread.
///
/// # Errors
/// The kernel refuses, for instance because [`enter`] was not called before.
pub fn enter_io(log_only: bool) -> Result<(), SandboxError> {
    apply("the I/O thread", PROGRAM_IO, log_only)
}

/// Puts the filter of a vCPU on the calling thread.
///
/// # Errors
/// The kernel refuses, for instance because [`enter`] was not called before.
pub fn enter_vcpu(log_only: bool) -> Result<(), SandboxError> {
    apply("a vCPU thread", PROGRAM_VCPU, log_only)
}

/// Puts the filter of the thread that answers page faults on the calling thread.
///
/// # Errors
/// As [`enter_io`].
pub fn enter_pager(log_only: bool) -> Result<(), SandboxError> {
    apply("the pager thread", PROGRAM_PAGER, log_only)
}

fn apply(phase: &'static str, program: &[sock_filter], log_only: bool) -> Result<(), SandboxError> {
    /// `SECCOMP_SET_MODE_FILTER`.
    const SET_FILTER: libc::c_ulong = 1;
    let mut changed;
    let mut code = program;
    if log_only {
        changed = program.to_vec();
        changed.iter_mut().filter(|i| i.k == bpf::TRAP && i.code == bpf::RETURN).for_each(|i| i.k = bpf::LOG);
        code = &changed;
    }
    let len = u16::try_from(code.len()).unwrap_or(0);
    let program = libc::sock_fprog { len, filter: code.as_ptr().cast_mut() };
    // SAFETY: the structure and the instructions outlive the call, which only reads them.
    match unsafe { libc::syscall(libc::SYS_seccomp, SET_FILTER, 0 as libc::c_ulong, &raw const program) } {
        0 => Ok(()),
        _ => Err(SandboxError::Apply { phase, source: io::Error::last_os_error() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_either_no_condition_or_conditions_in_each_row() {
        for table in [SETUP, IO, VCPU, PAGER] {
            for row in table {
                let same: Vec<_> = table.iter().filter(|other| other.call == row.call).collect();
                assert!(same.len() == 1 || same.iter().all(|r| !r.only.is_empty()), "call {}", row.call);
            }
        }
    }
}
