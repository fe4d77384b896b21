//! What a thread may ask of the kernel once the guest runs: a seccomp filter per kind of thread.
//!
//! A call that is not in the table ends the process by SIGSYS. The tables are data in [`filters`].

pub mod filters;

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use filters::{IO, Only, PAGER, Row, VCPU};

/// Why a filter cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The table makes no filter.
    #[error("seccomp: build the filter of a {thread} thread")]
    Build {
        /// Kind of thread.
        thread: &'static str,
        /// What is wrong with it.
        #[source]
        source: seccompiler::BackendError,
    },
    /// The kernel refuses it.
    #[error("seccomp: apply the filter of a {thread} thread")]
    Apply {
        /// Kind of thread.
        thread: &'static str,
        /// The system's answer.
        #[source]
        source: seccompiler::Error,
    },
}

/// Puts the filter of the I/O thread on the calling thread. With `log_only` forbidden calls are logged by the kernel and done.
///
/// # Errors
/// The kernel refuses.
pub fn enter_io(log_only: bool) -> Result<(), SandboxError> {
    enter("I/O", IO, log_only)
}

/// Puts the filter of a vCPU on the calling thread.
///
/// # Errors
/// The kernel refuses.
pub fn enter_vcpu(log_only: bool) -> Result<(), SandboxError> {
    enter("vCPU", VCPU, log_only)
}

/// Puts the filter of the thread that answers page faults on the calling thread.
///
/// # Errors
/// The kernel refuses.
pub fn enter_pager(log_only: bool) -> Result<(), SandboxError> {
    enter("pager", PAGER, log_only)
}

fn enter(thread: &'static str, table: &[Row], log_only: bool) -> Result<(), SandboxError> {
    let build = |source| SandboxError::Build { thread, source };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for row in table {
        let mut conditions = vec![];
        for (argument, value, only) in row.only {
            let operator = match only {
                Only::Equal => SeccompCmpOp::Eq,
                Only::Without => SeccompCmpOp::MaskedEq(*value),
            };
            let value = if let Only::Equal = only { *value } else { 0 };
            conditions.push(
                SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operator, value).map_err(build)?,
            );
        }
        let alternatives = rules.entry(row.call).or_default();
        if !conditions.is_empty() {
            alternatives.push(SeccompRule::new(conditions).map_err(build)?);
        }
    }
    let otherwise = if log_only { SeccompAction::Log } else { SeccompAction::KillProcess };
    let filter =
        SeccompFilter::new(rules, otherwise, SeccompAction::Allow, TargetArch::x86_64).map_err(build)?;
    let program = BpfProgram::try_from(filter).map_err(build)?;
    seccompiler::apply_filter(&program).map_err(|source| SandboxError::Apply { thread, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_has_either_no_condition_or_conditions_in_each_row() {
        for table in [IO, VCPU, PAGER] {
            for row in table {
                let same: Vec<_> = table.iter().filter(|other| other.call == row.call).collect();
                assert!(same.len() == 1 || same.iter().all(|r| !r.only.is_empty()), "call {}", row.call);
            }
        }
    }
}
